// Fills the kernels' params from tensors; the same for every device. A Device says how to run a kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "params.h"

namespace softprompt_fast {

struct Kernels {
  void (*assemble)(const AssembleParams&);
  void (*prompt_backward)(const PromptBackwardParams&);
  void (*embedding_backward)(const EmbeddingBackwardParams&);
  void (*unpack)(const UnpackParams&);
  void (*pack)(const PackParams&);
};

using Assembled =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Assembled assemble(const Kernels& kernels, const at::Tensor& input_ids, const at::Tensor& embedding,
                   const at::Tensor& prompts, const at::Tensor& prompt_offsets,
                   const std::optional<at::Tensor>& prompt_ids, const std::optional<at::Tensor>& attention_mask,
                   const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& plan, int64_t slots,
                   int64_t width, int64_t prompt_segments, bool left, int64_t mask_format, bool causal, int64_t window,
                   double scale, const std::optional<at::Tensor>& token_update, bool check);

at::Tensor prompt_backward(const Kernels& kernels, const at::Tensor& grad, const at::Tensor& prompt_slots,
                           const std::optional<at::Tensor>& use_ids, const at::Tensor& prompt_offsets,
                           int64_t prompt_rows, at::ScalarType dtype);

at::Tensor embedding_backward(const Kernels& kernels, const at::Tensor& grad, const at::Tensor& input_ids,
                              const at::Tensor& token_slots, int64_t vocabulary, int64_t padding_idx, double scale,
                              at::ScalarType dtype);

std::vector<at::Tensor> unpack(const Kernels& kernels, at::TensorList packed, const at::Tensor& table, int64_t width,
                               at::ScalarType dtype);

std::vector<at::Tensor> pack(const Kernels& kernels, at::TensorList rows, const at::Tensor& places,
                             const at::Tensor& starts, at::ScalarType dtype);

// The kernel alone differs between devices; one that has none does not register the op.
std::tuple<at::Tensor, at::Tensor> attention(void (*kernel)(const AttentionForwardParams&), const at::Tensor& query,
                                             const at::Tensor& key, const at::Tensor& value, const at::Tensor& table,
                                             const std::optional<at::Tensor>& queries,
                                             const std::optional<at::Tensor>& prefix_key,
                                             const std::optional<at::Tensor>& prefix_value, double scale,
                                             int64_t window);

std::vector<at::Tensor> attention_backward(void (*kernel)(const AttentionBackwardParams&), const at::Tensor& grad,
                                           const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           const at::Tensor& table, const std::optional<at::Tensor>& prefix_key,
                                           const std::optional<at::Tensor>& prefix_value, const at::Tensor& out,
                                           const at::Tensor& log_sums, double scale, int64_t window);

// The tensor whose device an op runs on.
template <class... Rest>
const at::Tensor& device_tensor(const at::Tensor& first, const Rest&...) {
  return first;
}
template <class... Rest>
const at::Tensor& device_tensor(at::TensorList, const at::Tensor& table, const Rest&...) {
  return table;
}

// An op of `arguments...` that calls function(Device::kernels(), arguments...) on the tensors' device.
template <class Device, auto function>
struct Op;
template <class Device, class Result, class... Arguments, Result (*function)(const Kernels&, Arguments...)>
struct Op<Device, function> {
  static Result run(Arguments... arguments) {
    const typename Device::Guard guard(device_tensor(arguments...));
    return function(Device::kernels(), arguments...);
  }
};

// Defines the ops' implementations for one dispatch key: `Device::kernels()` runs on the tensors' device.
template <class Device>
void register_ops(torch::Library& library) {
  library.impl("assemble", Op<Device, assemble>::run);
  library.impl("prompt_backward", Op<Device, prompt_backward>::run);
  library.impl("embedding_backward", Op<Device, embedding_backward>::run);
  library.impl("unpack", Op<Device, unpack>::run);
  library.impl("pack", Op<Device, pack>::run);
}

}  // namespace softprompt_fast
