// The ops' schemas, one argument a line.
#include <torch/library.h>

namespace softprompt_fast {

// Schemas. Private: the public functions are in softprompt_fast/ops/. AssembleCall in ops/extension/contract.py repeats
// the argument names of `assemble`.
TORCH_LIBRARY(SOFTPROMPT_FAST_NAMESPACE, library) {
  library.def(R"(assemble(
    Tensor input_ids,
    Tensor embedding,
    Tensor prompts,
    Tensor prompt_offsets,
    Tensor? prompt_ids,
    Tensor? attention_mask,
    Tensor? labels,
    Tensor? plan,
    SymInt slots,
    SymInt width,
    SymInt prompt_segments,
    bool left,
    int mask_format,
    bool causal,
    int window,
    float scale,
    Tensor? token_update=None,
    bool check=True
  ) -> (
    Tensor inputs_embeds,
    Tensor attention_mask,
    Tensor position_ids,
    Tensor labels,
    Tensor token_slots,
    Tensor prompt_slots,
    Tensor row_ids,
    Tensor status
  ))");
  library.def(R"(prompt_backward(
    Tensor grad,
    Tensor prompt_slots,
    Tensor? use_ids,
    Tensor prompt_offsets,
    SymInt prompt_rows,
    ScalarType dtype
  ) -> Tensor)");
  library.def(R"(embedding_backward(
    Tensor grad,
    Tensor input_ids,
    Tensor token_slots,
    SymInt vocabulary,
    int padding_idx,
    float scale,
    ScalarType dtype
  ) -> Tensor)");
  library.def("unpack(Tensor[] packed, Tensor table, SymInt width, ScalarType dtype) -> Tensor[]");
  library.def("pack(Tensor[] rows, Tensor places, Tensor starts, ScalarType dtype) -> Tensor[]");
  library.def(R"(attention(
    Tensor query,
    Tensor key,
    Tensor value,
    Tensor table,
    Tensor? queries,
    Tensor? prefix_key,
    Tensor? prefix_value,
    float scale,
    int window
  ) -> (Tensor out, Tensor log_sums))");
  library.def(R"(attention_backward(
    Tensor grad,
    Tensor query,
    Tensor key,
    Tensor value,
    Tensor table,
    Tensor? prefix_key,
    Tensor? prefix_value,
    Tensor out,
    Tensor log_sums,
    float scale,
    int window
  ) -> Tensor[])");
}

}  // namespace softprompt_fast
