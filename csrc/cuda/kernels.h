// Launchers of the CUDA kernels: device pointers in, an error text out (null: launched).
#pragma once

#include "../params.h"

namespace softprompt_fast::cuda {

const char* assemble(const AssembleParams& params, void* stream);
const char* prompt_backward(const PromptBackwardParams& params, void* stream);
const char* embedding_backward(const EmbeddingBackwardParams& params, void* stream);
const char* unpack(const UnpackParams& params, void* stream);
const char* pack(const PackParams& params, void* stream);

}  // namespace softprompt_fast::cuda
