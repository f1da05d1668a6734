// The ops for CPU tensors, computed by the CUDA kernels' thread code.
#include "cuda_on_cpu.h"

#include "cuda/kernels.cuh"
#include "ops.h"

static int64_t steps;

// Called at every branch of the kernels (-fsanitize-coverage=trace-pc): a measure of their work.
extern "C" __attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc() { ++steps; }

namespace softprompt_fast {
namespace {

struct Player {
  static constexpr int max_threads() { return 64; }  // two warps; fewer threads than a GPU: small cases take turns

  template <class Kernel, class... Arguments>
  void run(Kernel kernel, const cuda::Launch& launch, const Arguments&... arguments) const {
    cuda_on_cpu::play(kernel, static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.threads),
                      arguments...);
  }
};

struct Emulated {
  struct Guard {
    explicit Guard(const at::Tensor&) {}
  };
  static Kernels kernels() {
    return {[](const AssembleParams& p) { cuda::run_assemble(p, Player{}); },
            [](const PromptBackwardParams& p) { cuda::run_prompt_backward(p, Player{}); },
            [](const EmbeddingBackwardParams& p) { cuda::run_embedding_backward(p, Player{}); },
            [](const UnpackParams& p) { cuda::run_unpack(p, Player{}); },
            [](const PackParams& p) { cuda::run_pack(p, Player{}); }};
  }
};

// Kernels for the tests of the emulation itself.
void reverse(int64_t* out) {
  __shared__ int64_t values[32];
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[31 - threadIdx.x];
}

void leave_early() {
  if (threadIdx.x % 2 == 0) return;
  __syncthreads();
}

TORCH_LIBRARY_IMPL(SOFTPROMPT_FAST_NAMESPACE, CPU, library) { register_ops<Emulated>(library); }

TORCH_LIBRARY_FRAGMENT(SOFTPROMPT_FAST_NAMESPACE, library) {
  library.def("reverse(Tensor(a!) out) -> ()",
              [](const at::Tensor& out) { cuda_on_cpu::play(reverse, 1, 32, out.mutable_data_ptr<int64_t>()); });
  library.def("steps() -> int", [] { return steps; });
  library.def("diverge() -> ()", [] { cuda_on_cpu::play(leave_early, 1, 32); });
}

}  // namespace
}  // namespace softprompt_fast
