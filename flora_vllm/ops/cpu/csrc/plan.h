// Which rows a pass multiplies, slice by slice, and the products that must be ready before: x scaled, and down x.
//
// A pass covers as many of the step's tokens as fit in bounded scratch; nearly every step is one pass.
#pragma once
#include "layer.h"

namespace flora {

constexpr int64_t kSharedBytes = 16 << 20;  // scaled rows and low-rank products of one pass
constexpr int64_t kPassRows = 4096;         // rows of one slice in one pass: 1 MiB of sums a thread where W has K blocks

// What a row's product counts as in its token's sum: itself, itself by plain, nothing; from 0 on: times b's component.
enum : int { kAsItIs = -1, kByPlain = -2, kAsNothing = -3 };

// A row of the product: x or a scaled copy of it.
struct Row {
  const Lane* x;
  const Terms* terms;  // null: plain W x
  const Lane* low;     // the token's down x
  int64_t token;
  int component;
  bool first, last;  // of the token's rows
};

struct Segment {
  int64_t slot, begin, end;  // tokens[begin..end)
};

struct ModulatedSegment {
  const Terms* terms;
  int64_t begin, end;  // modulated[begin..end)
};

struct SlicePlan {
  std::vector<Row> direct;     // through W itself
  std::vector<Row> modulated;  // through a segment's own W
  std::vector<ModulatedSegment> segments;
};

struct ScaleJob {
  const void* x;
  const Lane* factor;  // null: copy
  Lane* out;
};

// out = down x of one token.
struct ShrinkJob {
  const Terms* terms;
  const Lane* x;
  Lane* out;
};

struct Pass {
  std::vector<SlicePlan> slices;
  std::vector<ScaleJob> scale;
  std::vector<ShrinkJob> shrink;
  std::vector<const Lane*> x;  // of the tokens of the run in hand
};

// Scratch lanes that one token of `slot` needs, and the most rows it has in a slice.
struct TokenCost {
  int64_t lanes = 0, rows = 1;
};

struct Step {
  const Layer& layer;
  const char* x;
  int64_t x_stride_bytes;
  const int64_t* tokens;
  bool pads;  // x rows do not end on a lane: they are copied
};

inline TokenCost token_cost(const Step& step, const Segment& segment) {
  TokenCost cost;
  if (step.pads) cost.lanes += step.layer.row_lanes;
  for (size_t i = 0; i < step.layer.slices.size(); i++) {
    const Terms* terms = step.layer.terms(segment.slot, i);
    if (!terms) continue;
    cost.lanes += terms->low_lanes;
    if (!terms->rank || terms->modulates(segment.end - segment.begin)) continue;
    cost.lanes += terms->rank * step.layer.row_lanes;
    cost.rows = std::max<int64_t>(cost.rows, terms->products());
  }
  return cost;
}

// How W x itself counts on the stacked path.
inline int plain_component(const Terms& terms) {
  if (!terms.has_plain) return kAsNothing;
  return terms.plain || terms.even_plain != 1.0f ? kByPlain : kAsItIs;
}

// Adds tokens [begin, end) of a segment to the pass; `scratch` points at the free shared lanes and moves on.
inline void add_run(const Step& step, const Segment& segment, int64_t begin, int64_t end, Pass& pass, Lane*& scratch) {
  const Layer& layer = step.layer;
  pass.x.clear();
  for (int64_t t = begin; t < end; t++) {
    const char* x = step.x + step.tokens[t] * step.x_stride_bytes;
    if (step.pads) {
      pass.scale.push_back({x, nullptr, scratch});
      x = reinterpret_cast<const char*>(scratch);
      scratch += layer.row_lanes;
    }
    pass.x.push_back(reinterpret_cast<const Lane*>(x));
  }
  for (size_t i = 0; i < layer.slices.size(); i++) {
    SlicePlan& plan = pass.slices[i];
    const Terms* terms = layer.terms(segment.slot, i);
    const bool modulate = terms && terms->modulates(segment.end - segment.begin);
    const int plain = modulate || !terms ? kAsItIs : plain_component(*terms);
    std::vector<Row>& rows = modulate ? plan.modulated : plan.direct;
    const int64_t before = int64_t(rows.size());
    for (int64_t t = begin; t < end; t++) {
      const Lane* x = pass.x[t - begin];
      const Lane* low = nullptr;
      if (terms && terms->low) {
        pass.shrink.push_back({terms, x, scratch});
        low = scratch;
        scratch += terms->low_lanes;
      }
      if (!terms || !terms->rank || modulate) {
        rows.push_back({x, terms, low, step.tokens[t], plain, true, true});
        continue;
      }
      if (terms->has_plain) rows.push_back({x, terms, low, step.tokens[t], plain, true, false});
      for (int j = 0; j < terms->rank; j++) {
        pass.scale.push_back({step.x + step.tokens[t] * step.x_stride_bytes, terms->rows.data() + j * layer.lanes,
                              scratch});
        const bool first = j == 0 && !terms->has_plain;
        rows.push_back({scratch, terms, low, step.tokens[t], j, first, j + 1 == terms->rank});
        scratch += layer.row_lanes;
      }
    }
    if (modulate) plan.segments.push_back({terms, before, int64_t(rows.size())});
  }
}

}  // namespace flora
