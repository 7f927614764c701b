// The adapted linear on a CPU: one pass over W; each tile, while in cache, serves the base rows, the stacked rows and
// every modulated segment. Plain C interface, no torch headers: the library outlives torch releases.
#include <omp.h>

#include "plan.h"

namespace flora {
namespace {

constexpr int kFetchRows = 48;
// Finished rows that wait to be written out together: stores to rows far apart would stall the products between them.
constexpr int kDone = 128;
constexpr int kMargin = 16;  // lanes past the end that a full-register load may touch

// Scratch of the calling thread and the workers it leads; grows to its bound and stays.
struct Workspace {
  Buffer<Lane> shared, own;  // `own`: each worker's part, `own_lanes` apart
  int64_t own_lanes = 0;
  int own_threads = 0;
  Pass pass;

  void reserve(int64_t shared_lanes, int64_t lanes_each, int threads) {
    if (shared.bytes() < shared_lanes * 4) shared = Buffer<Lane>(shared_lanes);
    if (own_lanes < lanes_each || own_threads != threads) {
      own_lanes = lanes_each;
      own_threads = threads;
      own = Buffer<Lane>(own_lanes * threads);
    }
  }
};
thread_local Workspace workspace;

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
void shrink_rows(const ShrinkJob& job, int64_t lanes) {
  using Storage = typename T::Storage;
  alignas(64) float sums[kBlockRows * kPanel];
  for (int l0 = 0; l0 < job.terms->low; l0 += kNarrow) {
    const Lane* down = job.terms->down.data() + (l0 / kNarrow) * lanes * kNarrow;
    multiply_columns<T>(job.rows, job.x, lanes, down, kNarrow, nullptr, kNarrow, sums, false);
    const int columns = std::min(kNarrow, job.terms->low_lanes * T::kPerLane - l0);
    for (int r = 0; r < job.rows; r++)
      for (int l = 0; l < columns; l++)
        from_float(reinterpret_cast<Storage*>(job.out[r]) + l0 + l, sums[r * kPanel + l]);
  }
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
        modulate_tile<T>(w, lanes, a, b, terms.rank_lanes, terms.identity, item.columns, tile_);
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
      // Fetched while the last block computes; with few rows the hardware's own fetching does better.
      const bool fetch = i + count == end && end - begin >= kFetchRows;
      multiply_columns<T>(count, x, block_.lanes, w, kPanel, fetch ? next : nullptr, item_.columns, out, block_.add);
      if (block_.last)
        for (int r = 0; r < count; r++) absorb(rows[i + r], out + r * kPanel);
      i += count;
    }
  }

  void fetch(const Lane* output_side) const {
    for (int c = 0; c < item_.columns; c += kLine) __builtin_prefetch(output_side + c, 0, 3);
  }

  const Lane* output_side(const Row& row) const {
    const int lane = row.component / T::kPerLane;
    return row.terms->b.data() + (item_.panel * row.terms->rank_lanes + lane) * kPanel + item_.column;
  }

  // Adds a row's product, scaled by b, to its token's sum; the token's last row finishes it:
  // y = g ∘ [sum + low up] + h ∘ bias, rounded once.
  void absorb(const Row& row, const float* product) {
    const Lane* b = row.component >= 0 ? output_side(row) : nullptr;
    const int half = row.component % T::kPerLane;
    const Terms* terms = row.terms;
    Storage* y = done_rows_ + done_ * kPanel;
    for (int c = 0; c < item_.columns; c += kVector) {
      Floats value = load<Floats>(product + c);
      if (b) value *= component(T{}, load<Lanes>(b + c), half);
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
      const Floats bias = load<Floats>(bias_ + c);
      if (terms && terms->gain) {
        const Floats gain = load<Floats>(terms->gain.data() + item_.panel * kPanel + item_.column + c);
        value = terms->gain_bias ? gain * (value + bias) : gain * value + bias;
      } else {
        value += bias;
      }
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
  int done_ = 0;
  int64_t done_tokens_[kDone];
  alignas(64) Storage done_rows_[kDone * kPanel];
};

// Panels, the last few split where they would not divide evenly among the threads.
std::vector<Item> make_items(const Layer& layer, int threads) {
  std::vector<Item> items;
  const int64_t uneven = layer.panels < 16 * threads ? layer.panels % threads : 0;
  const int parts = uneven * 2 % threads == 0 ? 2 : 4;
  int64_t index = 0;
  for (size_t s = 0; s < layer.slices.size(); s++)
    for (int64_t p = 0; p < layer.slices[s].panels; p++, index++) {
      const int split = index + uneven < layer.panels ? 1 : parts;
      for (int part = 0; part < split; part++)
        items.push_back({int64_t(s), p, part * kPanel / split, kPanel / split});
    }
  return items;
}

template <class T>
void run_pass(const Layer& layer, const Output& output, int threads) {
  const Pass& pass = workspace.pass;
  const std::vector<Item> items = make_items(layer, threads);
  const int64_t scales = int64_t(pass.scale.size()), shrinks = int64_t(pass.shrink.size());
  Lane* own = workspace.own.data();
  const int64_t own_lanes = workspace.own_lanes;
#pragma omp parallel num_threads(threads)
  {
    if (scales) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < scales; i++)
        scale_row<T>(pass.scale[i], i + 1 < scales ? pass.scale[i + 1].factor : nullptr, layer.in_features);
    }
    if (shrinks) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < shrinks; i++) shrink_rows<T>(pass.shrink[i], layer.lanes);
    }
    Worker<T> worker(layer, pass, output, own + omp_get_thread_num() * own_lanes);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < int64_t(items.size()); i++) {
      // Whoever takes it, the item `threads` ahead is wanted next.
      const bool more = i + threads < int64_t(items.size());
      worker.run(items[i], more ? Worker<T>::weight_of(layer, items[i + threads]) : nullptr);
    }
  }
}

// Fills the workspace's pass from segments[s] token `t` on; moves both past what it took.
void plan_pass(const Step& step, const std::vector<Segment>& segments, size_t& s, int64_t& t) {
  Workspace& ws = workspace;
  const Layer& layer = step.layer;
  ws.pass.scale.clear();
  ws.pass.shrink.clear();
  ws.pass.slices.resize(layer.slices.size());
  for (SlicePlan& plan : ws.pass.slices) {
    plan.direct.clear();
    plan.modulated.clear();
    plan.segments.clear();
  }
  // Sizes first: jobs keep addresses, so the shared buffer must not move once rows are planned.
  int64_t lanes = 0, rows = 0;
  std::vector<Segment> runs;
  std::vector<const Segment*> owners;
  for (; s < segments.size(); s++, t = s < segments.size() ? segments[s].begin : 0) {
    const TokenCost cost = token_cost(step, segments[s]);
    int64_t room = (kPassRows - rows) / cost.rows;
    if (cost.lanes) room = std::min(room, (kSharedBytes / 4 - lanes) / cost.lanes);
    if (runs.empty()) room = std::max<int64_t>(room, 1);
    const int64_t taken = std::min(room, segments[s].end - t);
    if (taken > 0) {
      runs.push_back({segments[s].slot, t, t + taken});
      owners.push_back(&segments[s]);
      lanes += taken * cost.lanes;
      rows += taken * cost.rows;
      t += taken;
    }
    if (t < segments[s].end) break;
  }
  const int threads = omp_get_max_threads();
  const int64_t sums = layer.lanes > kTileLanes ? rows : kBlockRows;
  ws.reserve(lanes + kMargin, kTileLanes * kPanel + (sums + kBlockRows) * kPanel + kMargin, threads);
  Lane* scratch = ws.shared.data();
  for (size_t i = 0; i < runs.size(); i++) add_run(step, *owners[i], runs[i].begin, runs[i].end, ws.pass, scratch);
}

}  // namespace
}  // namespace flora

using flora::Layer;

extern "C" {

void* flora_layer_new(int bfloat16, int64_t in_features, int64_t slices, const int64_t* sizes, int path,
                      double constant, double slope) try {
  auto layer = std::make_unique<Layer>();
  layer->bfloat16 = bfloat16;
  layer->in_features = in_features;
  layer->lanes = flora::ceil_div(in_features, bfloat16 ? 2 : 1);
  layer->row_lanes = flora::ceil_div(layer->lanes, 16) * 16 + 16;
  layer->path = static_cast<flora::Path>(path);
  layer->constant = constant;
  layer->slope = slope;
  for (int64_t i = 0; i < slices; i++) {
    const int64_t panels = flora::ceil_div(sizes[i], flora::kPanel);
    layer->slices.push_back({layer->out_features, sizes[i], panels, layer->panels});
    layer->out_features += sizes[i];
    layer->panels += panels;
  }
  layer->weight = flora::Buffer<flora::Lane>(layer->panels * layer->lanes * flora::kPanel);
  return layer.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

void flora_layer_free(void* handle) { delete static_cast<Layer*>(handle); }

void flora_layer_pack(void* handle, const void* w, int64_t row_stride) {
  Layer& layer = *static_cast<Layer*>(handle);
  if (layer.bfloat16)
    flora::pack_weight<flora::BFloat16>(layer, static_cast<const uint16_t*>(w), row_stride);
  else
    flora::pack_weight<flora::Float32>(layer, static_cast<const float*>(w), row_stride);
}

void flora_layer_unpack(const void* handle, void* w) {
  const Layer& layer = *static_cast<const Layer*>(handle);
  if (layer.bfloat16)
    flora::unpack_weight<flora::BFloat16>(layer, static_cast<uint16_t*>(w));
  else
    flora::unpack_weight<flora::Float32>(layer, static_cast<float*>(w));
}

// Bytes of W and of all slots' terms.
int64_t flora_layer_bytes(const void* handle) {
  const Layer& layer = *static_cast<const Layer*>(handle);
  int64_t bytes = layer.weight.bytes();
  for (const auto& slot : layer.slots)
    for (const flora::Terms& terms : slot) bytes += terms.bytes();
  return bytes;
}

// terms: one per slice, or null to clear the slot; `present[i]` 0 leaves slice i alone. Returns 0 without memory.
int flora_layer_write(void* handle, int64_t slot, const flora::RawTerms* terms, const int* present) try {
  Layer& layer = *static_cast<Layer*>(handle);
  if (slot >= int64_t(layer.slots.size())) layer.slots.resize(slot + 1);
  std::vector<flora::Terms> packed;
  for (size_t i = 0; terms && i < layer.slices.size(); i++) {
    if (!present[i])
      packed.emplace_back();
    else if (layer.bfloat16)
      packed.push_back(flora::pack_terms<flora::BFloat16>(layer, layer.slices[i], terms[i]));
    else
      packed.push_back(flora::pack_terms<flora::Float32>(layer, layer.slices[i], terms[i]));
  }
  layer.slots[slot] = std::move(packed);
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

// y (T, O) from x (T, I); strides in elements. step: {segments, slots..., starts..., tokens...} or null for "no
// adapter in this step". Returns 0 without memory.
int flora_forward(const void* handle, const void* x, int64_t x_stride, int64_t tokens, const void* bias, void* y,
                  const int64_t* step) try {
  const Layer& layer = *static_cast<const Layer*>(handle);
  static thread_local std::vector<flora::Segment> segments;
  static thread_local std::vector<int64_t> all;
  segments.clear();
  const int64_t* order = nullptr;
  if (step) {
    const int64_t count = step[0], *slots = step + 1, *starts = slots + count;
    for (int64_t i = 0; i < count; i++) segments.push_back({slots[i], starts[i], starts[i + 1]});
    order = starts + count + 1;
  } else {
    for (int64_t t = int64_t(all.size()); t < tokens; t++) all.push_back(t);
    if (tokens) segments.push_back({0, 0, tokens});
    order = all.data();
  }
  const int64_t size = layer.bfloat16 ? 2 : 4;
  const flora::Step request{layer, static_cast<const char*>(x), x_stride * size, order,
                            layer.bfloat16 && layer.in_features % 2 != 0};
  const flora::Output output{y, layer.out_features, bias};
  size_t s = 0;
  int64_t t = segments.empty() ? 0 : segments[0].begin;
  while (s < segments.size()) {
    flora::plan_pass(request, segments, s, t);
    if (layer.bfloat16)
      flora::run_pass<flora::BFloat16>(layer, output, omp_get_max_threads());
    else
      flora::run_pass<flora::Float32>(layer, output, omp_get_max_threads());
  }
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

// The bounds that the scratch of one step keeps: shared by the threads, and each thread's own.
int64_t flora_shared_bound() { return flora::kSharedBytes + flora::kMargin * 4; }
int64_t flora_thread_bound() {
  return (flora::kTileLanes + flora::kPassRows + flora::kBlockRows) * flora::kPanel * 4 + flora::kMargin * 4;
}
// What the calling thread holds now, and its contents overwritten: no result may depend on it.
int64_t flora_scratch_bytes() { return flora::workspace.shared.bytes() + flora::workspace.own.bytes(); }
void flora_scratch_fill(int byte) {
  if (flora::workspace.shared) std::memset(flora::workspace.shared.data(), byte, flora::workspace.shared.bytes());
  if (flora::workspace.own) std::memset(flora::workspace.own.data(), byte, flora::workspace.own.bytes());
}

}  // extern "C"
