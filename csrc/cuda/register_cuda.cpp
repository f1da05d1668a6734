// The only file that needs both torch's CUDA headers and the launchers; compiled by the host compiler.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../ops.h"
#include "kernels.h"

namespace softprompt_fast {
namespace {

template <class Params, cuda::Outcome (*Launch)(const Params&, void*)>
void launch(const Params& params) {
  const auto [error, earlier] = Launch(params, c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == nullptr, "softprompt_fast: ",
              earlier ? "an earlier CUDA call had failed: " : "a CUDA kernel could not be launched: ", error);
}

struct Cuda {
  struct Guard {
    explicit Guard(const at::Tensor& tensor) : guard(tensor.device()) {}
    c10::cuda::CUDAGuard guard;
  };
  static Kernels kernels() {
    return {launch<AssembleParams, cuda::assemble>, launch<PromptBackwardParams, cuda::prompt_backward>,
            launch<EmbeddingBackwardParams, cuda::embedding_backward>, launch<UnpackParams, cuda::unpack>,
            launch<PackParams, cuda::pack>};
  }
};

TORCH_LIBRARY_IMPL(SOFTPROMPT_FAST_NAMESPACE, CUDA, library) { register_ops<Cuda>(library); }

}  // namespace
}  // namespace softprompt_fast
