// The CPU kernels. Same contract as csrc/cuda/kernels.h.
#pragma once

#include "../params.h"

namespace softprompt_fast::cpu {

void assemble(const AssembleParams& params);
void prompt_backward(const PromptBackwardParams& params);
void embedding_backward(const EmbeddingBackwardParams& params);
void unpack(const UnpackParams& params);
void pack(const PackParams& params);
void attention(const AttentionForwardParams& params);  // only on a CPU
void attention_backward(const AttentionBackwardParams& params);

}  // namespace softprompt_fast::cpu
