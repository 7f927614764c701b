// One layer's W and its slots' terms, in the layouts the tiles are read in.
//
// W:    per slice, per panel of kPanel output features: [lanes][kPanel]. A panel never crosses a slice; what is
//       missing in the last panel or lane is zero.
// b:    per panel [rank lanes][kPanel], a pair of components per bfloat16 lane. a: twice, as rows [rank][lanes] to
//       scale tokens by and as [in features][rank lanes] to modulate by.
// down: rows [low][row lanes], zero behind the last lane; up: like b. plain, offset: float32 per panel [kPanel].
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tile.h"

namespace flora {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

using Memory = std::shared_ptr<char>;

constexpr size_t kPage = 2 << 20;  // a huge page

// Zeroed memory on cache-line borders, on huge pages where it is large: a cold W is read at the memory's full speed.
inline Memory allocate(size_t bytes) {
  const size_t border = bytes >= 2 * kPage ? kPage : 64, whole = ceil_div(bytes, border) * border;
  Memory memory(static_cast<char*>(std::aligned_alloc(border, whole)), std::free);
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  if (border == kPage) madvise(memory.get(), whole, MADV_HUGEPAGE);
#endif
  std::memset(memory.get(), 0, whole);
  return memory;
}

// The same for what stays as long as the model does: those too small for huge pages follow each other in a chunk that
// has them. A chunk goes with the last of them.
inline Memory allocate_in_chunk(size_t bytes) {
  constexpr size_t kChunk = 8 * kPage;
  if (bytes > kChunk / 2) return allocate(bytes);
  static std::mutex mutex;
  static std::weak_ptr<char> latest;
  static size_t used;
  const std::lock_guard lock(mutex);
  Memory chunk = latest.lock();
  if (!chunk || used + bytes > kChunk) {
    latest = chunk = allocate(kChunk);
    used = 0;
  }
  char* memory = chunk.get() + used;
  used += ceil_div(bytes, 64) * 64;
  return {std::move(chunk), memory};
}

template <class V>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count, Memory (*from)(size_t) = allocate) : count_(count) {
    if (count) memory_ = from(size_t(count) * sizeof(V));
  }
  V* data() const { return reinterpret_cast<V*>(memory_.get()); }
  int64_t bytes() const { return count_ * int64_t(sizeof(V)); }
  explicit operator bool() const { return count_ > 0; }

 private:
  Memory memory_;
  int64_t count_ = 0;
};

// One slot's terms for one slice; see SliceTerms in terms.py for their meaning.
struct Terms {
  bool present = false, has_plain = false;
  int rank = 0, rank_lanes = 0, low = 0, low_lanes = 0;
  int64_t modulate_from = 0;  // tokens from which a segment takes the modulated path
  Buffer<Lane> rows, a, b, down, up;
  float even_plain = 0;         // the weight of W x where all outputs have the same: nearly always 1, or 0 for none
  Buffer<float> plain, offset;  // plain: where they differ

  // Base products per token on the stacked path: at least 1, for a row must be started by something.
  int products() const { return std::max(rank + has_plain, 1); }
  bool modulates(int64_t tokens) const { return rank && tokens >= modulate_from; }
  int64_t bytes() const {
    return rows.bytes() + a.bytes() + b.bytes() + down.bytes() + up.bytes() + plain.bytes() + offset.bytes();
  }
};

// What a caller hands over for one slice, contiguous, in the layer's dtype; null pointers for absent terms.
struct RawTerms {
  const void *a, *b, *down, *up;
  const float *plain, *offset;
  int64_t modulate_from;
  int rank, low, plain_size;  // plain_size: 1 or the slice's size
};

struct Slice {
  int64_t start, size, panels, first_panel;
};

struct Layer {
  bool bfloat16;
  int64_t in_features, out_features, lanes, panels;
  int64_t row_lanes;  // from one scratch row to the next: an odd number of cache lines, so that rows do not evict rows
  std::vector<Slice> slices;
  Buffer<Lane> weight;
  std::vector<std::vector<Terms>> slots;  // [slot][slice]; an empty slot leaves the layer alone

  const Terms* terms(int64_t slot, size_t slice) const {
    if (slot <= 0 || slot >= int64_t(slots.size()) || slots[slot].empty()) return nullptr;
    return slots[slot][slice].present ? &slots[slot][slice] : nullptr;
  }
};

template <class T>
void pack_weight(Layer& layer, const typename T::Storage* w, int64_t row_stride) {
  using Storage = typename T::Storage;
  for (const Slice& slice : layer.slices) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < slice.panels; p++) {
      auto* panel = reinterpret_cast<Storage*>(layer.weight.data() + (slice.first_panel + p) * layer.lanes * kPanel);
      const int64_t columns = std::min<int64_t>(kPanel, slice.size - p * kPanel);
      for (int64_t c = 0; c < columns; c++) {
        const Storage* row = w + (slice.start + p * kPanel + c) * row_stride;
        for (int64_t k = 0; k < layer.in_features; k++)
          panel[((k / T::kPerLane) * kPanel + c) * T::kPerLane + k % T::kPerLane] = row[k];
      }
    }
  }
}

// (size,) -> per panel, zero behind the last.
inline Buffer<float> pack_vector(const float* from, const Slice& slice) {
  Buffer<float> packed(slice.panels * kPanel);
  std::memcpy(packed.data(), from, slice.size * sizeof(float));
  return packed;
}

// (components, size) -> per panel of `width` columns [lanes of components][width]: b and up, and down the other way.
template <class T>
Buffer<Lane> pack_panels(const typename T::Storage* from, int64_t components, int64_t size) {
  const int64_t lanes = ceil_div(components, T::kPerLane);
  Buffer<Lane> packed(ceil_div(size, kPanel) * lanes * kPanel);
  auto* to = reinterpret_cast<typename T::Storage*>(packed.data());
  for (int64_t j = 0; j < components; j++)
    for (int64_t o = 0; o < size; o++) {
      const int64_t lane = ((o / kPanel) * lanes + j / T::kPerLane) * kPanel + o % kPanel;
      to[lane * T::kPerLane + j % T::kPerLane] = from[j * size + o];
    }
  return packed;
}

template <class T>
Terms pack_terms(const Layer& layer, const Slice& slice, const RawTerms& raw) {
  using Storage = typename T::Storage;
  const int64_t in = layer.in_features, lanes = layer.lanes;
  Terms terms;
  terms.present = true;
  terms.modulate_from = raw.modulate_from;
  terms.rank = raw.a ? raw.rank : 0;
  terms.rank_lanes = int(ceil_div(terms.rank, T::kPerLane));
  terms.low = raw.down ? raw.low : 0;
  terms.low_lanes = int(ceil_div(terms.low, T::kPerLane));
  if (terms.rank) {
    terms.rows = Buffer<Lane>(terms.rank * lanes);
    terms.a = Buffer<Lane>(lanes * T::kPerLane * terms.rank_lanes);
    auto* rows = reinterpret_cast<Storage*>(terms.rows.data());
    auto* a = reinterpret_cast<Storage*>(terms.a.data());
    const auto* from = static_cast<const Storage*>(raw.a);
    for (int64_t j = 0; j < terms.rank; j++)
      for (int64_t k = 0; k < in; k++) {
        rows[j * lanes * T::kPerLane + k] = from[j * in + k];
        a[k * terms.rank_lanes * T::kPerLane + j] = from[j * in + k];
      }
    terms.b = pack_panels<T>(static_cast<const Storage*>(raw.b), terms.rank, slice.size);
  }
  if (terms.low) {
    terms.down = Buffer<Lane>(terms.low * layer.row_lanes);
    auto* down = reinterpret_cast<Storage*>(terms.down.data());
    const auto* from = static_cast<const Storage*>(raw.down);
    for (int64_t l = 0; l < terms.low; l++)
      std::memcpy(down + l * layer.row_lanes * T::kPerLane, from + l * in, in * sizeof(Storage));
    terms.up = pack_panels<T>(static_cast<const Storage*>(raw.up), terms.low, slice.size);
  }
  terms.has_plain = raw.plain;
  if (raw.plain) {
    terms.even_plain = raw.plain[0];
    const bool is_even = std::all_of(raw.plain, raw.plain + raw.plain_size, [&](float w) { return w == raw.plain[0]; });
    if (!is_even) terms.plain = pack_vector(raw.plain, slice);
  }
  if (raw.offset) terms.offset = pack_vector(raw.offset, slice);
  return terms;
}

}  // namespace flora
