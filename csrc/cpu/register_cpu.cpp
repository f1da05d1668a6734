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

// An op of `arguments...` that calls function(kernel, arguments...).
template <auto function, auto kernel>
struct AttentionOp;
template <class Result, class Params, class... Arguments, Result (*function)(void (*)(const Params&), Arguments...),
          void (*kernel)(const Params&)>
struct AttentionOp<function, kernel> {
  static Result run(Arguments... arguments) { return function(kernel, arguments...); }
};

TORCH_LIBRARY_IMPL(SOFTPROMPT_FAST_NAMESPACE, CPU, library) {
  register_ops<Cpu>(library);
  library.impl("attention", AttentionOp<attention, cpu::attention>::run);
  library.impl("attention_backward", AttentionOp<attention_backward, cpu::attention_backward>::run);
}

}  // namespace
}  // namespace softprompt_fast
