#include "../ops.h"
#include "kernels.h"

namespace softprompt_fast {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const at::Tensor&) {}
  };
  static Kernels kernels() {
    return {cpu::assemble, cpu::prompt_backward, cpu::embedding_backward, cpu::unpack, cpu::pack};
  }
};

TORCH_LIBRARY_IMPL(SOFTPROMPT_FAST_NAMESPACE, CPU, library) {
  register_ops<Cpu>(library);
  library.impl(
      "attention", [](const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& table,
                      const std::optional<at::Tensor>& queries, const std::optional<at::Tensor>& prefix_key,
                      const std::optional<at::Tensor>& prefix_value, double scale, int64_t window) {
        return attention(cpu::attention, query, key, value, table, queries, prefix_key, prefix_value, scale, window);
      });
  library.impl("attention_backward",
               [](const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const at::Tensor& table, const std::optional<at::Tensor>& prefix_key,
                  const std::optional<at::Tensor>& prefix_value, const at::Tensor& out, const at::Tensor& log_sums,
                  double scale, int64_t window) {
                 return attention_backward(cpu::attention_backward, grad, query, key, value, table, prefix_key,
                                           prefix_value, out, log_sums, scale, window);
               });
}

}  // namespace
}  // namespace softprompt_fast
