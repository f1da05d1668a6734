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

TORCH_LIBRARY_IMPL(SOFTPROMPT_FAST_NAMESPACE, CPU, library) { register_ops<Cpu>(library); }

}  // namespace
}  // namespace softprompt_fast
