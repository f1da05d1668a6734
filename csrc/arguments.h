// Reads the ops' arguments from tensors. The Python wrapper explains bad input to people. These checks only make a
// direct call safe: whatever the arguments, an op raises, or writes and reads nothing outside its tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "params.h"

namespace softprompt_fast {

inline Scalar scalar_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Scalar::f32;
    case at::kBFloat16:
      return Scalar::bf16;
    case at::kHalf:
      return Scalar::f16;
    case at::kDouble:
      return Scalar::f64;
    default:
      TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ", tensor.scalar_type());
  }
}

inline void check_matrix(const at::Tensor& tensor, const char* name, const at::Tensor& like) {
  TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
  TORCH_CHECK(tensor.device() == like.device(), name, " must be on ", like.device(), ", got ", tensor.device());
}

inline Words words_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), static_cast<int32_t>(tensor.element_size()), tensor.stride(0), tensor.stride(1)};
}

inline Words words_of(const std::optional<at::Tensor>& tensor, const char* name, const at::Tensor& input_ids) {
  if (!tensor.has_value()) return {nullptr, 8, 0, 0};
  TORCH_CHECK(tensor->sizes() == input_ids.sizes() && tensor->device() == input_ids.device(), name,
              " must have the shape and device of input_ids, got ", tensor->sizes(), " on ", tensor->device());
  return words_of(*tensor);
}

inline MatrixRef<const void> matrix_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, name,
              " must have adjacent elements in a row");
  return {tensor.const_data_ptr(), scalar_of(tensor, name), tensor.size(0), tensor.stride(0)};
}

// A fresh, contiguous result.
inline MatrixRef<void> output_matrix(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), scalar_of(tensor, "result"), tensor.size(0), tensor.stride(0)};
}

inline const int64_t* integers_of(const at::Tensor& tensor, const char* name, int64_t size, const at::Tensor& like) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.is_contiguous() && tensor.numel() == size &&
                  tensor.device() == like.device(),
              name, " must be ", size, " adjacent int64 on ", like.device(), ", got ", tensor.sizes(), " ",
              tensor.scalar_type(), " on ", tensor.device());
  return tensor.const_data_ptr<int64_t>();
}

// Integers for a kernel: on its device, or on the host if they are few. What the host holds needs no copy of its own.
inline Integers few_or_there(const at::Tensor& tensor, const char* name, int64_t size, const at::Tensor& like) {
  Integers integers{};
  integers.count = size;
  if (!tensor.is_cpu() || size > kFewIntegers) {
    integers.data = integers_of(tensor, name, size, like);
  } else {
    const int64_t* values = integers_of(tensor, name, size, tensor);
    std::copy_n(values, size, integers.few);
  }
  return integers;
}

// [slots, D] of [.., D], adjacent.
inline at::Tensor flat_gradient(const at::Tensor& grad) {
  TORCH_CHECK(grad.dim() >= 2, "grad must have 2 dimensions or more, got ", grad.dim());
  return grad.flatten(0, -2).contiguous();
}

// Bit patterns of 1 and of -0.
inline std::pair<uint64_t, uint64_t> mask_patterns(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return {0x3c00, 0x8000};
    case at::kBFloat16:
      return {0x3f80, 0x8000};
    case at::kFloat:
      return {0x3f800000, 0x80000000};
    case at::kDouble:
      return {0x3ff0000000000000, 0x8000000000000000};
    default:
      TORCH_CHECK(at::isIntegralType(type, true), "attention_mask must be bool, integer or float, got ", type);
      return {1, 0};
  }
}

}  // namespace softprompt_fast
