// One variant of the kernels. Compiled with SPF_VARIANT, its name, with numbers of csrc/cuda/tuning.h in place of the
// defaults, and with a namespace of its own.
#include "cases.h"
#include "cuda/kernels.cuh"

#define TEXT(name) #name
#define QUOTED(name) TEXT(name)

namespace softprompt_fast {
namespace {

// Only what the cases need: bfloat16, eight elements in an access.
template <class Kernel, class... Arguments>
void run(Kernel kernel, const cuda::Launch& launch, const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.threads)>>>(arguments...);
}

Scalar prompt_type(bool wide) { return wide ? Scalar::f32 : Scalar::bf16; }

void set_offsets(Integers& offsets, int prompt_length) {
  offsets.count = 2;
  offsets.few[1] = prompt_length;
}

void assemble(const AssembleCase& c) {
  AssembleParams p{};
  p.rows = p.segments = c.rows;
  p.tokens = c.tokens;
  p.dim = c.dim;
  p.slots = c.slots();
  p.width = c.width();
  p.prompt_count = 1;
  p.mask_format = MaskFormat::two_d;
  p.scale = 1.0;
  p.mask_one = 1;
  p.input_ids = {c.input_ids, 8, c.tokens, 1};
  p.attention_mask = {c.mask, 8, c.tokens, 1};
  p.labels = {c.labels, 8, c.tokens, 1};
  p.embedding = {c.embedding, Scalar::bf16, c.vocabulary, c.dim};
  p.prompts = {c.prompts, prompt_type(c.wide_prompts), c.prompt_length, c.dim};
  set_offsets(p.prompt_offsets, c.prompt_length);
  p.inputs_embeds = c.vectors;
  p.mask_out = c.mask_out;
  p.position_ids = c.positions;
  p.labels_out = c.labels_out;
  p.token_slots = c.token_slots;
  p.prompt_slots = c.prompt_slots;
  p.status = c.status;
  const cuda::Launch launch = cuda::plan_assemble(p);
  const cuda::Tiling tiling = cuda::tiling_of(p, launch);
  if (c.wide_prompts) {
    run(cuda::assemble_kernel<bf16, float, 8>, launch, p, tiling);
  } else {
    run(cuda::assemble_kernel<bf16, bf16, 8>, launch, p, tiling);
  }
}

void prompt_backward(const BackwardCase& c) {
  PromptBackwardParams p{};
  p.dim = c.dim;
  p.uses = c.rows;
  p.prompt_count = 1;
  p.grad = {c.grad, Scalar::bf16, int64_t{1} * c.rows * (c.prompt_length + c.tokens), c.dim};
  p.grad_prompts = {c.result, Scalar::f32, c.prompt_length, c.dim};
  p.slots = c.slots;
  set_offsets(p.prompt_offsets, c.prompt_length);
  run(cuda::prompt_backward_kernel<bf16, float, 8>, cuda::plan_prompt_backward(p), p);
}

void fill(PackingParams& p, const PackingCase& c, bool rows_to_slots) {
  p.rows = c.rows;
  p.width = c.width;
  p.slots = c.slots;
  p.tensors = 1;
  const int64_t head = c.size, slot = head * c.heads, row = slot * c.width;
  p.from[0] = {c.from, Scalar::bf16, rows_to_slots ? row : 0, slot, head, c.heads, c.size};
  p.to[0] = {c.to, Scalar::bf16, rows_to_slots ? 0 : row, slot, head, c.heads, c.size};
}

void unpack(const PackingCase& c) {
  UnpackParams p{};
  fill(p, c, false);
  p.table = c.table;
  run(cuda::unpack_kernel<bf16, bf16, 8>, cuda::plan_packing(p, p.rows * p.width), p);
}

void pack(const PackingCase& c) {
  PackParams p{};
  fill(p, c, true);
  p.held = c.held;
  p.places = c.places;
  p.starts = c.starts;
  run(cuda::pack_kernel<bf16, bf16, 8>, cuda::plan_packing(p, p.slots), p);
}

}  // namespace
}  // namespace softprompt_fast

extern const Variant SPF_VARIANT;
const Variant SPF_VARIANT{QUOTED(SPF_VARIANT), softprompt_fast::assemble, softprompt_fast::prompt_backward,
                          softprompt_fast::unpack, softprompt_fast::pack};
