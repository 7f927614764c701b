// The CPU kernel of flora::linear for layers on the native op: no Python between torch's dispatcher and the op.
//
// It needs torch's headers, so it is a library of its own, built for the torch that is installed. It serves the plain
// case only; whatever else a call may be (padding, another dtype, a step nobody announced) goes to the Python op,
// which knows all cases and raises where there is something to say.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <mutex>
#include <shared_mutex>
#include <vector>

namespace {

using Forward = int (*)(const void*, const void*, int64_t, int64_t, const void*, void*, const int64_t*);

// StepWords of step.py.
struct StepWords {
  int64_t known, served, tokens, segments;
};

struct Entry {
  Forward forward = nullptr;
  const void* layer = nullptr;
  StepWords* step = nullptr;
  int64_t in_features = 0, out_features = 0;
  at::ScalarType dtype = at::ScalarType::Undefined;
  const int64_t* has_rare = nullptr;  // nonzero: some slot needs more than the op, so steps with adapters are Python's
};

std::shared_mutex entries_mutex;
std::vector<Entry> entries;  // by the number in a layer's handle

Entry entry_of(const at::Tensor& handle) {
  const int64_t number = *handle.const_data_ptr<int64_t>();
  const std::shared_lock lock(entries_mutex);
  return number < int64_t(entries.size()) ? entries[number] : Entry{};
}

at::Tensor in_python(const at::Tensor& x, const std::optional<at::Tensor>& bias, const at::Tensor& handle,
                     int64_t out_features) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("flora::linear_in_python", "")
          .typed<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&, int64_t)>();
  return op.call(x, bias, handle, out_features);
}

at::Tensor linear(const at::Tensor& x, const std::optional<at::Tensor>& bias, const at::Tensor& handle,
                  int64_t out_features) {
  const Entry entry = entry_of(handle);
  const bool is_plain = entry.forward && x.dim() == 2 && x.size(1) == entry.in_features && x.stride(1) == 1 &&
                        x.scalar_type() == entry.dtype &&
                        (!bias || (bias->scalar_type() == entry.dtype && bias->is_contiguous() &&
                                   bias->numel() == entry.out_features && bias->is_cpu()));
  if (!is_plain) return in_python(x, bias, handle, out_features);
  const int64_t tokens = x.size(0);
  const auto* segments = reinterpret_cast<const int64_t*>(entry.step->segments);
  const bool is_this_step = entry.step->known && (!segments || (entry.step->tokens == tokens && !*entry.has_rare));
  if (!is_this_step) return in_python(x, bias, handle, out_features);
  entry.step->served = 1;
  at::Tensor y = at::empty({tokens, entry.out_features}, x.options());
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  if (entry.forward(entry.layer, x.const_data_ptr(), x.stride(0), tokens, bias_data, y.mutable_data_ptr(), segments))
    return y;
  return in_python(x, bias, handle, out_features);
}

}  // namespace

TORCH_LIBRARY_IMPL(flora, CPU, m) { m.impl("linear", TORCH_FN(linear)); }

extern "C" {

// Calls with handle `number` run `forward` on `layer` from now on; `step` and `has_rare` must live until
// flora_disconnect.
void flora_connect(int64_t number, Forward forward, const void* layer, StepWords* step, const int64_t* has_rare,
                   int64_t in_features, int64_t out_features, int bfloat16) {
  const std::unique_lock lock(entries_mutex);
  if (number >= int64_t(entries.size())) entries.resize(number + 1);
  const auto dtype = bfloat16 ? at::ScalarType::BFloat16 : at::ScalarType::Float;
  entries[number] = {forward, layer, step, in_features, out_features, dtype, has_rare};
}

void flora_disconnect(int64_t number) {
  const std::unique_lock lock(entries_mutex);
  entries[number] = {};
}

}  // extern "C"
