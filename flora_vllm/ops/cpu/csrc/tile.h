// Work on one tile: a panel of kPanel output features times a run of lanes of the input features, resident in cache.
#pragma once
#include <algorithm>

#include "simd.h"

namespace flora {

constexpr int kPanel = 64;          // output features of a panel
constexpr int64_t kTileLanes = 1024;  // 256 KiB a tile, a quarter of a usual L2; 576-2048 bfloat16 measured flat

constexpr int64_t kLine = 16;  // lanes of a cache line

// out[r][c] (+)= Σ_k x[r][k] · w[k][c] for R rows and V registers of columns; rows of `out` are kPanel apart.
// `next`: a tile wanted next, fetched at the pace of w, or null. Every R sums in the same order: a row's bits must not
// depend on its neighbours.
template <class T, int R, int V>
void multiply_block(const Lane* const* x, int64_t lanes, const Lane* w, int64_t stride, const Lane* next, float* out,
                    bool add) {
  Floats sum[R][V] = {};
  const Lane* row[R];
  for (int r = 0; r < R; r++) row[r] = x[r];
  for (int64_t k = 0; k < lanes; k++) {
    Lanes weight[V];
    for (int v = 0; v < V; v++) weight[v] = load<Lanes>(w + k * stride + v * kVector);
    if (next)
      for (int v = 0; v < V; v++) __builtin_prefetch(next + k * stride + v * kVector, 0, 2);
    for (int r = 0; r < R; r++) {
      const Lanes value = spread(load<Lane>(row[r] + k));
      for (int v = 0; v < V; v++) sum[r][v] = dot(T{}, sum[r][v], value, weight[v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      float* to = out + r * kPanel + v * kVector;
      store(to, add ? load<Floats>(to) + sum[r][v] : sum[r][v]);
    }
}

template <class T, int V>
void multiply_rows(int rows, const Lane* const* x, int64_t lanes, const Lane* w, int64_t stride, const Lane* next,
                   float* out, bool add) {
  switch (rows) {
    case 1: return multiply_block<T, 1, V>(x, lanes, w, stride, next, out, add);
    case 2: return multiply_block<T, 2, V>(x, lanes, w, stride, next, out, add);
    case 3: return multiply_block<T, 3, V>(x, lanes, w, stride, next, out, add);
    case 4: return multiply_block<T, 4, V>(x, lanes, w, stride, next, out, add);
    case 5: return multiply_block<T, 5, V>(x, lanes, w, stride, next, out, add);
    case 6: return multiply_block<T, 6, V>(x, lanes, w, stride, next, out, add);
  }
}

// The same for at most kBlockRows rows and `columns` (16, 32 or 64) columns.
template <class T>
void multiply_columns(int rows, const Lane* const* x, int64_t lanes, const Lane* w, int64_t stride, const Lane* next,
                      int columns, float* out, bool add) {
  for (int c = 0; c < columns;) {
    const int left = (columns - c) / kVector;
    const Lane* ahead = next ? next + c : nullptr;
    if (left >= 4 && kBlockVectors >= 4) {
      multiply_rows<T, kBlockVectors>(rows, x, lanes, w + c, stride, ahead, out + c, add);
      c += kBlockVectors * kVector;
    } else if (left >= 2) {
      multiply_rows<T, 2>(rows, x, lanes, w + c, stride, ahead, out + c, add);
      c += 2 * kVector;
    } else {
      multiply_rows<T, 1>(rows, x, lanes, w + c, stride, ahead, out + c, add);
      c += kVector;
    }
  }
}

// Rows of the next block when `left` remain: full blocks, but the last two share what is left, since a block of one
// or two rows is bound by reading the tile.
inline int block_rows(int64_t left) {
  if (left <= kBlockRows) return int(left);
  return left >= kBlockRows + (kBlockRows + 1) / 2 ? kBlockRows : int((left + 1) / 2);
}

// The W ∘ (Bᵀ A) of one register: factor[h] is the float32 factor of component h of each lane.
inline Lanes modulated(Float32, Lanes w, const Floats* factor) { return (Lanes)((Floats)w * factor[0]); }
inline Lanes modulated(BFloat16, Lanes w, const Floats* factor) {
  return join_halves(first_half(w) * factor[0], second_half(w) * factor[1]);
}

// out[k][c] = w[k][c] ∘ (start[c] + Σ_j a[k][j] b[j][c]), rounded once; V registers of columns.
// a: for each input feature its rank lanes; b: (rank lanes, kPanel). J: rank lanes when known at compile time, or 0.
template <class T, int J, int V>
void modulate_columns(const Lane* w, int64_t lanes, const Lane* a, const Lane* b, int rank_lanes,
                      const float* start, Lane* out) {
  constexpr int kHalves = T::kPerLane;
  const int ranks = J ? J : rank_lanes;
  Floats first[V];
  for (int v = 0; v < V; v++) first[v] = load<Floats>(start + v * kVector);
  for (int64_t k = 0; k < lanes; k++, w += kPanel, out += kPanel, a += kHalves * ranks) {
    Floats factor[V][kHalves];
    for (int v = 0; v < V; v++)
      for (int h = 0; h < kHalves; h++) factor[v][h] = first[v];
    for (int j = 0; j < ranks; j++)
      for (int v = 0; v < V; v++) {
        Lanes output_side = load<Lanes>(b + j * kPanel + v * kVector);
        for (int h = 0; h < kHalves; h++)
          factor[v][h] = dot(T{}, factor[v][h], spread(a[h * ranks + j]), output_side);
      }
    for (int v = 0; v < V; v++)
      store(out + v * kVector, modulated(T{}, load<Lanes>(w + v * kVector), factor[v]));
  }
}

template <class T, int V>
void modulate_ranks(const Lane* w, int64_t lanes, const Lane* a, const Lane* b, int rank_lanes,
                    const float* start, Lane* out) {
  switch (rank_lanes) {
    case 1: return modulate_columns<T, 1, V>(w, lanes, a, b, 1, start, out);
    case 2: return modulate_columns<T, 2, V>(w, lanes, a, b, 2, start, out);
    case 4: return modulate_columns<T, 4, V>(w, lanes, a, b, 4, start, out);
    case 8: return modulate_columns<T, 8, V>(w, lanes, a, b, 8, start, out);
    default: return modulate_columns<T, 0, V>(w, lanes, a, b, rank_lanes, start, out);
  }
}

// A modulated tile of `columns` (16, 32 or 64) columns; both tiles have rows of kPanel.
template <class T>
void modulate_tile(const Lane* w, int64_t lanes, const Lane* a, const Lane* b, int rank_lanes, const float* start,
                   int columns, Lane* out) {
  constexpr int kWide = kBlockVectors * kVector;
  for (int c = 0; c < columns;) {
    if (columns - c >= kWide) {
      modulate_ranks<T, kBlockVectors>(w + c, lanes, a, b + c, rank_lanes, start + c, out + c);
      c += kWide;
    } else {
      modulate_ranks<T, 1>(w + c, lanes, a, b + c, rank_lanes, start + c, out + c);
      c += kVector;
    }
  }
}

inline float total(Floats values) {
  float part[kVector];
  store(part, values);
  for (int width = kVector / 2; width; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return part[0];
}

// out[l] = Σ_k x[k] · rows[l][k] for L rows, `stride` lanes apart.
template <class T, int L>
void dot_rows(const Lane* x, int64_t lanes, const Lane* rows, int64_t stride, float* out) {
  Floats sum[L] = {};
  int64_t k = 0;
  for (; k + kVector <= lanes; k += kVector) {
    const Lanes value = load<Lanes>(x + k);
    for (int l = 0; l < L; l++) sum[l] = dot(T{}, sum[l], value, load<Lanes>(rows + l * stride + k));
  }
  // What lies behind x belongs to others; what lies behind a row is zero.
  Lanes value = {};
  std::memcpy(&value, x + k, (lanes - k) * sizeof(Lane));
  for (int l = 0; l < L; l++) out[l] = total(dot(T{}, sum[l], value, load<Lanes>(rows + l * stride + k)));
}

// The same for any number of rows.
template <class T>
void dot_many(const Lane* x, int64_t lanes, const Lane* rows, int64_t stride, int count, float* out) {
  for (; count >= 8; count -= 8, rows += 8 * stride, out += 8) dot_rows<T, 8>(x, lanes, rows, stride, out);
  for (; count >= 4; count -= 4, rows += 4 * stride, out += 4) dot_rows<T, 4>(x, lanes, rows, stride, out);
  for (; count >= 1; count -= 1, rows += stride, out += 1) dot_rows<T, 1>(x, lanes, rows, stride, out);
}

}  // namespace flora
