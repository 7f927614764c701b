// What one thread does in a pass: scale rows, shrink rows for low-rank terms, and multiply rows panel by panel.
#pragma once
#include "plan.h"

namespace flora {

// From so many rows on, the next tile is fetched while their last block computes; with fewer the product waits for
// memory itself, and the hardware's own fetching does better.
constexpr int kFetchRows = 48;
// Finished rows that wait to be written out together: stores to rows far apart would stall the products between them.
constexpr int kDone = 128;

// A panel, or a part of one where whole panels would leave threads idle.
struct Item {
  int64_t slice, panel;
  int column, columns;
};

struct Output {
  void* y;
  int64_t stride;
  const void* bias;
};

// `next`: the factor of the job after, fetched meanwhile; adapters of a decode step are short cold rows.
template <class T>
void scale_row(const ScaleJob& job, const Lane* next, int64_t in_features) {
  using Storage = typename T::Storage;
  const int64_t whole = in_features / T::kPerLane / kVector * kVector;
  const auto* x = static_cast<const Storage*>(job.x);
  if (!job.factor) {
    std::memcpy(job.out, x, in_features * sizeof(Storage));
  } else {
    for (int64_t k = 0; k < whole; k += kVector) {
      if (next) __builtin_prefetch(next + k, 0, 3);
      store(job.out + k, multiply(T{}, load<Lanes>(x + k * T::kPerLane), load<Lanes>(job.factor + k)));
    }
    const auto* factor = reinterpret_cast<const Storage*>(job.factor);
    for (int64_t k = whole * T::kPerLane; k < in_features; k++)
      from_float(reinterpret_cast<Storage*>(job.out) + k, to_float(x[k]) * to_float(factor[k]));
  }
  // The last lane's missing half meets a zero weight; it must not be a NaN.
  if (in_features % T::kPerLane) reinterpret_cast<Storage*>(job.out)[in_features] = 0;
}

template <class T>
void shrink_row(const ShrinkJob& job, const Layer& layer) {
  constexpr int kAtOnce = 64;
  const Terms& terms = *job.terms;
  auto* out = reinterpret_cast<typename T::Storage*>(job.out);
  for (int first = 0; first < terms.low; first += kAtOnce) {
    const int count = std::min(kAtOnce, terms.low - first);
    float sums[kAtOnce];
    dot_many<T>(job.x, layer.lanes, terms.down.data() + first * layer.row_lanes, layer.row_lanes, count, sums);
    for (int l = 0; l < count; l++) from_float(out + first + l, sums[l]);
  }
  // As in scale_row.
  if (terms.low % T::kPerLane) out[terms.low] = 0;
}

// One worker's share of a pass: items one after another.
template <class T>
class Worker {
 public:
  Worker(const Layer& layer, const Pass& pass, const Output& output, Lane* scratch)
      : layer_(layer), pass_(pass), output_(output), tile_(scratch) {
    sums_ = reinterpret_cast<float*>(scratch + kTileLanes * kPanel);
  }

  void run(const Item& item, const Lane* next_item) {
    const SlicePlan& plan = pass_.slices[item.slice];
    begin(item);
    const Lane* panel = weight_of(layer_, item);
    const int64_t blocks = ceil_div(layer_.lanes, kTileLanes), direct = int64_t(plan.direct.size());
    // The longest run of rows has the most time to fetch the next tile.
    const ModulatedSegment* longest = nullptr;
    for (const ModulatedSegment& segment : plan.segments)
      if (segment.end - segment.begin > (longest ? longest->end - longest->begin : direct)) longest = &segment;
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * kTileLanes, lanes = std::min(kTileLanes, layer_.lanes - first);
      const Lane* w = panel + first * kPanel;
      block_ = {first, lanes, block > 0, block + 1 == blocks};
      const Lane* next = block_.last ? next_item : w + kTileLanes * kPanel;
      multiply(plan.direct, 0, direct, 0, w, longest ? nullptr : next);
      for (const ModulatedSegment& segment : plan.segments) {
        const Terms& terms = *segment.terms;
        const Lane* a = terms.a.data() + first * T::kPerLane * terms.rank_lanes;
        const Lane* b = terms.b.data() + item.panel * terms.rank_lanes * kPanel + item.column;
        modulate_tile<T>(w, lanes, a, b, terms.rank_lanes, plain_of(terms), item.columns, tile_);
        multiply(plan.modulated, segment.begin, segment.end, direct, tile_, &segment == longest ? next : nullptr);
      }
    }
    write_out();
  }

  static const Lane* weight_of(const Layer& layer, const Item& item) {
    const int64_t panel = layer.slices[item.slice].first_panel + item.panel;
    return layer.weight.data() + panel * layer.lanes * kPanel + item.column;
  }

 private:
  using Storage = typename T::Storage;
  struct Block {
    int64_t first, lanes;
    bool add, last;
  };

  void begin(const Item& item) {
    item_ = item;
    const Slice& slice = layer_.slices[item.slice];
    const int64_t column = item.panel * kPanel + item.column;
    column_ = slice.start + column;
    valid_ = int(std::min<int64_t>(item.columns, std::max<int64_t>(slice.size - column, 0)));
    for (int c = 0; c < kPanel; c++)
      bias_[c] = output_.bias && c < valid_ ? to_float(static_cast<const Storage*>(output_.bias)[column_ + c]) : 0.0f;
  }

  // rows[begin..end) through tile w. Their sums stay apart only where W has several K blocks.
  void multiply(const std::vector<Row>& rows, int64_t begin, int64_t end, int64_t sums_before, const Lane* w,
                const Lane* next) {
    const Lane* x[kBlockRows];
    for (int64_t i = begin; i < end;) {
      const int count = block_rows(end - i);
      float* out = sums_ + (block_.add || !block_.last ? (sums_before + i) * kPanel : 0);
      for (int r = 0; r < count; r++) {
        x[r] = rows[i + r].x + block_.first;
        if (block_.last && rows[i + r].component >= 0) fetch(output_side(rows[i + r]));
      }
      const bool ahead = i + count == end && end - begin >= kFetchRows;
      multiply_columns<T>(count, x, block_.lanes, w, kPanel, ahead ? next : nullptr, item_.columns, out, block_.add);
      if (block_.last)
        for (int r = 0; r < count; r++) absorb(rows[i + r], out + r * kPanel);
      i += count;
    }
  }

  // The columns' weights of W x.
  const float* plain_of(const Terms& terms) {
    if (terms.plain) return terms.plain.data() + item_.panel * kPanel + item_.column;
    std::fill_n(even_, kPanel, terms.even_plain);
    return even_;
  }

  // A row of b, wanted when the product is done.
  void fetch(const Lane* output_side) const {
    for (int c = 0; c < item_.columns; c += kLine) __builtin_prefetch(output_side + c, 0, 3);
  }

  const Lane* output_side(const Row& row) const {
    const int lane = row.component / T::kPerLane;
    return row.terms->b.data() + (item_.panel * row.terms->rank_lanes + lane) * kPanel + item_.column;
  }

  // Adds a row's product, by its weight, to its token's sum; the token's last row finishes it:
  // y = sum + low up + bias + offset, rounded once.
  void absorb(const Row& row, const float* product) {
    const Lane* b = row.component >= 0 ? output_side(row) : nullptr;
    const int half = row.component % T::kPerLane;
    const Terms* terms = row.terms;
    const float* plain = row.component == kByPlain ? plain_of(*terms) : nullptr;
    const float* offset = terms && terms->offset ? terms->offset.data() + item_.panel * kPanel + item_.column : nullptr;
    Storage* y = done_rows_ + done_ * kPanel;
    for (int c = 0; c < item_.columns; c += kVector) {
      Floats value = load<Floats>(product + c);
      if (b) value *= component(T{}, load<Lanes>(b + c), half);
      if (plain) value *= load<Floats>(plain + c);
      if (row.component == kAsNothing) value = Floats{};
      if (!row.first) value += load<Floats>(token_ + c);
      if (!row.last) {
        store(token_ + c, value);
        continue;
      }
      if (row.low) {
        const Lane* up = terms->up.data() + item_.panel * terms->low_lanes * kPanel + item_.column + c;
        for (int l = 0; l < terms->low_lanes; l++)
          value = dot(T{}, value, spread(row.low[l]), load<Lanes>(up + l * kPanel));
      }
      value += load<Floats>(bias_ + c);
      if (offset) value += load<Floats>(offset + c);
      store_row(y + c, value);
    }
    if (row.last) {
      done_tokens_[done_++] = row.token;
      if (done_ == kDone) write_out();
    }
  }

  void write_out() {
    auto* y = static_cast<Storage*>(output_.y) + column_;
    for (int i = 0; i < done_; i++) {
      Storage* to = y + done_tokens_[i] * output_.stride;
      if (valid_ == kPanel)
        std::memcpy(to, done_rows_ + i * kPanel, kPanel * sizeof(Storage));
      else
        std::memcpy(to, done_rows_ + i * kPanel, valid_ * sizeof(Storage));
    }
    done_ = 0;
  }

  const Layer& layer_;
  const Pass& pass_;
  const Output& output_;
  Lane* tile_;
  float* sums_;
  Item item_{};
  Block block_{};
  int64_t column_ = 0;
  int valid_ = 0;
  alignas(64) float bias_[kPanel];
  alignas(64) float token_[kPanel];
  alignas(64) float even_[kPanel];
  int done_ = 0;
  int64_t done_tokens_[kDone];
  alignas(64) Storage done_rows_[kDone * kPanel];
};

}  // namespace flora
