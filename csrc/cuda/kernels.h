// Launchers of the CUDA kernels.
#pragma once

#include "../params.h"

namespace softprompt_fast::cuda {

struct Outcome {
  const char* error;  // null: launched
  bool earlier;       // other code left the error: nothing was launched
};

// Parameters with device pointers in.
Outcome assemble(const AssembleParams& params, void* stream);
Outcome prompt_backward(const PromptBackwardParams& params, void* stream);
Outcome embedding_backward(const EmbeddingBackwardParams& params, void* stream);
Outcome unpack(const UnpackParams& params, void* stream);
Outcome pack(const PackParams& params, void* stream);

}  // namespace softprompt_fast::cuda
