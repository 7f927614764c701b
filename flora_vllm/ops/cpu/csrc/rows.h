// What rare terms do to rows of their own: runs of rows, each run with vectors of its own, in float32, rounded once.
#pragma once
#include "simd.h"

namespace flora {

// Runs of rows one behind the other: `counts[r]` of them, at `rows[i]` (null: where they are), `stride` apart.
struct Runs {
  const int64_t *rows, *counts;
  int64_t runs, stride, columns;
};

template <class S, class Each>
void each_row(S* data, const Runs& of, Each each) {
  int64_t first = 0;
  for (int64_t r = 0; r < of.runs; first += of.counts[r++]) {
#pragma omp parallel for schedule(static) if (of.counts[r] >= 64)
    for (int64_t i = first; i < first + of.counts[r]; i++) each(data + (of.rows ? of.rows[i] : i) * of.stride, r, i);
  }
}

// (u, v) -> (first u - second v, first v + second u) for the halves of each `group` of columns.
template <class S>
void swap_runs(S* y, const Runs& of, const float* const* first, const float* const* second, int64_t group) {
  const int64_t half = group / 2;
  each_row(y, of, [&](S* row, int64_t r, int64_t) {
    for (int64_t g = 0; g < of.columns; g += group) {
      S *us = row + g, *vs = us + half;
      const float *f = first[r] + g, *s = second[r] + g;
      int64_t j = 0;
      for (; j + kVector <= half; j += kVector) {
        const Floats u = load_row(us + j), v = load_row(vs + j);
        store_row(us + j, load_row(f + j) * u - load_row(s + j) * v);
        store_row(vs + j, load_row(f + half + j) * v + load_row(s + half + j) * u);
      }
      for (; j < half; j++) {
        const float u = to_float(us[j]), v = to_float(vs[j]);
        from_float(us + j, f[j] * u - s[j] * v);
        from_float(vs + j, f[half + j] * v + s[half + j] * u);
      }
    }
  });
}

// row *= factor
template <class S>
void scale_runs(S* data, const Runs& of, const float* const* factor) {
  each_row(data, of, [&](S* row, int64_t r, int64_t) {
    const float* f = factor[r];
    int64_t j = f ? 0 : of.columns;
    for (; j + kVector <= of.columns; j += kVector) store_row(row + j, load_row(row + j) * load_row(f + j));
    for (; j < of.columns; j++) from_float(row + j, to_float(row[j]) * f[j]);
  });
}

// row += factor * added[i], or added[i] itself
template <class S>
void add_runs(S* y, const Runs& of, const S* added, const float* const* factor) {
  each_row(y, of, [&](S* row, int64_t r, int64_t i) {
    const S* more = added + i * of.columns;
    const float* f = factor[r];
    int64_t j = 0;
    for (; j + kVector <= of.columns; j += kVector) {
      const Floats term = f ? load_row(more + j) * load_row(f + j) : load_row(more + j);
      store_row(row + j, load_row(row + j) + term);
    }
    for (; j < of.columns; j++) from_float(row + j, to_float(row[j]) + to_float(more[j]) * (f ? f[j] : 1));
  });
}

}  // namespace flora
