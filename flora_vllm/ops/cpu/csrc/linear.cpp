// The adapted linear on a CPU: one pass over W; each tile, while in cache, serves the base rows, the stacked rows and
// every modulated segment. Plain C interface, no torch headers: the library outlives torch releases.
#include <omp.h>

#include "rows.h"
#include "worker.h"

namespace flora {
namespace {

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
      for (int64_t i = 0; i < shrinks; i++) shrink_row<T>(pass.shrink[i], layer);
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

void* flora_layer_new(int bfloat16, int64_t in_features, int64_t slices, const int64_t* sizes) try {
  auto layer = std::make_unique<Layer>();
  layer->bfloat16 = bfloat16;
  layer->in_features = in_features;
  layer->lanes = flora::ceil_div(in_features, bfloat16 ? 2 : 1);
  layer->row_lanes = flora::ceil_div(layer->lanes, 16) * 16 + 16;
  for (int64_t i = 0; i < slices; i++) {
    const int64_t panels = flora::ceil_div(sizes[i], flora::kPanel);
    layer->slices.push_back({layer->out_features, sizes[i], panels, layer->panels});
    layer->out_features += sizes[i];
    layer->panels += panels;
  }
  layer->weight = flora::Buffer<flora::Lane>(layer->panels * layer->lanes * flora::kPanel, flora::allocate_in_chunk);
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

// See rows.h. `data`, and `added` with rows side by side, have the layer's dtype; the factors are float32, one pointer a
// run (null, but for a swap: none).
void flora_swap_runs(int bfloat16, void* data, const flora::Runs* runs, const float* const* first,
                     const float* const* second, int64_t group) {
  if (bfloat16)
    flora::swap_runs(static_cast<uint16_t*>(data), *runs, first, second, group);
  else
    flora::swap_runs(static_cast<float*>(data), *runs, first, second, group);
}
void flora_scale_runs(int bfloat16, void* data, const flora::Runs* runs, const float* const* factor) {
  if (bfloat16)
    flora::scale_runs(static_cast<uint16_t*>(data), *runs, factor);
  else
    flora::scale_runs(static_cast<float*>(data), *runs, factor);
}
void flora_add_runs(int bfloat16, void* data, const flora::Runs* runs, const void* added, const float* const* factor) {
  if (bfloat16)
    flora::add_runs(static_cast<uint16_t*>(data), *runs, static_cast<const uint16_t*>(added), factor);
  else
    flora::add_runs(static_cast<float*>(data), *runs, static_cast<const float*>(added), factor);
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
