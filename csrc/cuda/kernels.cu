#include "kernels.h"

#include "kernels.cuh"

namespace softprompt_fast::cuda {
namespace {

struct Launcher {
  cudaStream_t stream;
  cudaError_t* error;

  static constexpr int max_threads() { return kMaxThreads; }

  template <class Kernel, class... Arguments>
  void run(Kernel kernel, const Launch& launch, const Arguments&... arguments) const {
    if (launch.blocks > INT32_MAX) {  // the grid's limit
      *error = cudaErrorInvalidConfiguration;
      return;
    }
    kernel<<<static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.threads), 0, stream>>>(arguments...);
    *error = cudaGetLastError();
  }
};

template <class Run, class Params>
Outcome launch(const Run& run, const Params& params, void* stream) {
  // The error that other code left would pass for this kernel's.
  if (const cudaError_t earlier = cudaGetLastError(); earlier != cudaSuccess)
    return {cudaGetErrorString(earlier), true};
  cudaError_t error = cudaSuccess;
  run(params, Launcher{static_cast<cudaStream_t>(stream), &error});
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error), false};
}

}  // namespace

Outcome assemble(const AssembleParams& params, void* stream) {
  return launch([](const auto& p, const auto& go) { run_assemble(p, go); }, params, stream);
}

Outcome prompt_backward(const PromptBackwardParams& params, void* stream) {
  return launch([](const auto& p, const auto& go) { run_prompt_backward(p, go); }, params, stream);
}

Outcome embedding_backward(const EmbeddingBackwardParams& params, void* stream) {
  return launch([](const auto& p, const auto& go) { run_embedding_backward(p, go); }, params, stream);
}

Outcome unpack(const UnpackParams& params, void* stream) {
  return launch([](const auto& p, const auto& go) { run_unpack(p, go); }, params, stream);
}

Outcome pack(const PackParams& params, void* stream) {
  return launch([](const auto& p, const auto& go) { run_pack(p, go); }, params, stream);
}

}  // namespace softprompt_fast::cuda
