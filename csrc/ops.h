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
  void (*unpack)(const PackingParams&);
  void (*pack)(const PackingParams&);
};

using Assembled =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Assembled assemble(const Kernels& kernels, const at::Tensor& input_ids, const at::Tensor& embedding,
                   const at::Tensor& prompts, const at::Tensor& prompt_offsets,
                   const std::optional<at::Tensor>& prompt_ids, const std::optional<at::Tensor>& attention_mask,
                   const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& plan, int64_t slots,
                   int64_t width, int64_t prompt_segments, bool left, int64_t mask_format, bool causal, int64_t window,
                   double scale, const std::optional<at::Tensor>& token_update);

at::Tensor prompt_backward(const Kernels& kernels, const at::Tensor& grad, const at::Tensor& prompt_slots,
                           const std::optional<at::Tensor>& use_ids, const at::Tensor& prompt_offsets,
                           int64_t prompt_rows, at::ScalarType dtype);

at::Tensor embedding_backward(const Kernels& kernels, const at::Tensor& grad, const at::Tensor& input_ids,
                              const at::Tensor& token_slots, int64_t vocabulary, int64_t padding_idx, double scale,
                              at::ScalarType dtype);

std::vector<at::Tensor> unpack(const Kernels& kernels, at::TensorList packed, const at::Tensor& table, int64_t width,
                               at::ScalarType dtype);

std::vector<at::Tensor> pack(const Kernels& kernels, at::TensorList rows, const at::Tensor& table, int64_t slots,
                             at::ScalarType dtype);

// The kernel alone differs between devices; one that has none does not register the op.
std::tuple<at::Tensor, at::Tensor> attention(void (*kernel)(const AttentionParams&), const at::Tensor& query,
                                             const at::Tensor& key, const at::Tensor& value, const at::Tensor& table,
                                             const std::optional<at::Tensor>& queries,
                                             const std::optional<at::Tensor>& prefix_key,
                                             const std::optional<at::Tensor>& prefix_value, double scale,
                                             int64_t window);

std::vector<at::Tensor> attention_backward(void (*kernel)(const AttentionParams&), const at::Tensor& grad,
                                           const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           const at::Tensor& table, const std::optional<at::Tensor>& prefix_key,
                                           const std::optional<at::Tensor>& prefix_value, const at::Tensor& out,
                                           const at::Tensor& log_sums, double scale, int64_t window);

// Defines the ops' implementations for one dispatch key: `Device::kernels()` runs on the tensors' device.
template <class Device>
void register_ops(torch::Library& library) {
  library.impl("assemble", [](const at::Tensor& input_ids, const at::Tensor& embedding, const at::Tensor& prompts,
                              const at::Tensor& prompt_offsets, const std::optional<at::Tensor>& prompt_ids,
                              const std::optional<at::Tensor>& attention_mask, const std::optional<at::Tensor>& labels,
                              const std::optional<at::Tensor>& plan, int64_t slots, int64_t width,
                              int64_t prompt_segments, bool left, int64_t mask_format, bool causal, int64_t window,
                              double scale, const std::optional<at::Tensor>& token_update) {
    const typename Device::Guard guard(input_ids);
    return assemble(Device::kernels(), input_ids, embedding, prompts, prompt_offsets, prompt_ids, attention_mask,
                    labels, plan, slots, width, prompt_segments, left, mask_format, causal, window, scale,
                    token_update);
  });
  library.impl("prompt_backward", [](const at::Tensor& grad, const at::Tensor& prompt_slots,
                                     const std::optional<at::Tensor>& use_ids, const at::Tensor& prompt_offsets,
                                     int64_t prompt_rows, at::ScalarType dtype) {
    const typename Device::Guard guard(grad);
    return prompt_backward(Device::kernels(), grad, prompt_slots, use_ids, prompt_offsets, prompt_rows, dtype);
  });
  library.impl("embedding_backward", [](const at::Tensor& grad, const at::Tensor& input_ids,
                                        const at::Tensor& token_slots, int64_t vocabulary, int64_t padding_idx,
                                        double scale, at::ScalarType dtype) {
    const typename Device::Guard guard(grad);
    return embedding_backward(Device::kernels(), grad, input_ids, token_slots, vocabulary, padding_idx, scale, dtype);
  });
  library.impl("unpack", [](at::TensorList packed, const at::Tensor& table, int64_t width, at::ScalarType dtype) {
    const typename Device::Guard guard(table);
    return unpack(Device::kernels(), packed, table, width, dtype);
  });
  library.impl("pack", [](at::TensorList rows, const at::Tensor& table, int64_t slots, at::ScalarType dtype) {
    const typename Device::Guard guard(table);
    return pack(Device::kernels(), rows, table, slots, dtype);
  });
}

}  // namespace softprompt_fast
