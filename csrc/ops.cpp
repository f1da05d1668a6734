#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "arguments.h"

namespace softprompt_fast {
namespace {

// A plan names every slot once, in order. Only a CPU looks: elsewhere the kernels leave out what is wrong.
void check_plan(const AssembleParams& p) {
  int64_t slot = 0;
  for (int64_t i = 0; i < p.segments; ++i) {
    const int64_t* line = p.plan + i * kPlanColumns;
    TORCH_CHECK(line[kPlanSlot] == slot && line[kPlanLength] >= 0 && line[kPlanLength] <= p.width &&
                    line[kPlanLength] <= p.slots - slot && line[kPlanPosition] >= 0,
                "segment ", i, " of the plan must begin at slot ", slot, " and have at most ",
                std::min(p.width, p.slots - slot), " slots, got ", line[kPlanLength], " from slot ", line[kPlanSlot],
                " at position ", line[kPlanPosition], ", which must be 0 or more");
    slot += line[kPlanLength];
  }
  TORCH_CHECK(slot == p.slots, "the plan must have ", p.slots, " slots, got ", slot);
}

}  // namespace

Assembled assemble(const Kernels& kernels, const at::Tensor& input_ids, const at::Tensor& embedding,
                   const at::Tensor& prompts, const at::Tensor& prompt_offsets,
                   const std::optional<at::Tensor>& prompt_ids, const std::optional<at::Tensor>& attention_mask,
                   const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& plan, int64_t slots,
                   int64_t width, int64_t prompt_segments, bool left, int64_t mask_format, bool causal, int64_t window,
                   double scale, const std::optional<at::Tensor>& token_update, bool check) {
  check_matrix(input_ids, "input_ids", input_ids);
  check_matrix(embedding, "embedding", input_ids);
  check_matrix(prompts, "prompts", input_ids);
  TORCH_CHECK(input_ids.scalar_type() == at::kLong || input_ids.scalar_type() == at::kInt,
              "input_ids must be int32 or int64, got ", input_ids.scalar_type());
  TORCH_CHECK(prompts.size(1) == embedding.size(1), "prompts and embedding must have one hidden size");
  TORCH_CHECK(prompt_offsets.numel() > 0, "prompt_offsets must have 1 element or more");
  TORCH_CHECK(slots >= 0 && width >= 0 && window >= 0, "slots, width and window must be 0 or more, got ", slots, ", ",
              width, " and ", window);
  TORCH_CHECK(mask_format >= 0 && mask_format <= static_cast<int64_t>(MaskFormat::four_d_additive),
              "mask_format must be 0 to 3, got ", mask_format);
  TORCH_CHECK(!labels.has_value() || labels->scalar_type() == at::kLong || labels->scalar_type() == at::kInt,
              "labels must be int32 or int64, got ", labels->scalar_type());
  TORCH_CHECK(prompts.scalar_type() == embedding.scalar_type() || prompts.scalar_type() == at::kFloat,
              "prompts must be float32 or have the dtype of embedding, got ", prompts.scalar_type());

  AssembleParams p{};
  p.rows = input_ids.size(0);
  p.tokens = input_ids.size(1);
  p.dim = embedding.size(1);
  p.slots = slots;
  p.width = width;
  p.left = left;
  p.mask_format = static_cast<MaskFormat>(mask_format);
  p.causal = causal;
  p.window = window;
  p.scale = scale;
  p.input_ids = words_of(input_ids);
  p.attention_mask = words_of(attention_mask, "attention_mask", input_ids);
  p.labels = words_of(labels, "labels", input_ids);
  p.embedding = matrix_of(embedding, "embedding");
  p.prompts = matrix_of(prompts, "prompts");
  p.prompt_count = prompt_offsets.numel() - 1;
  p.prompt_offsets = few_or_there(prompt_offsets, "prompt_offsets", p.prompt_count + 1, input_ids);
  if (prompt_ids.has_value()) p.prompt_ids = few_or_there(*prompt_ids, "prompt_ids", p.rows, input_ids);
  if (plan.has_value()) {
    TORCH_CHECK(plan->dim() == 2 && plan->size(1) == kPlanColumns && plan->size(0) - p.rows == prompt_segments &&
                    prompt_segments >= 0,
                "plan must be [prompt_segments + rows, ", static_cast<int64_t>(kPlanColumns), "], got ", plan->sizes(),
                " for ", prompt_segments, " and ", p.rows);
    p.prompt_segments = prompt_segments;
    p.segments = plan->size(0);
    p.plan = integers_of(*plan, "plan", plan->numel(), input_ids);
    TORCH_CHECK(mask_format == 0, "the packed layout has no attention mask");
    if (plan->is_cpu()) check_plan(p);
  } else {
    p.segments = p.rows;
    TORCH_CHECK(p.rows == 0 ? slots == 0 : slots % p.rows == 0 && slots / p.rows == width,
                "slots must be rows * width in the padded layout");
  }

  if (token_update.has_value()) {
    const at::ScalarType wide = embedding.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(token_update->dim() == 3 && token_update->size(0) == p.prompt_count && token_update->size(2) == p.dim &&
                    token_update->is_contiguous() && token_update->scalar_type() == wide &&
                    token_update->device() == input_ids.device(),
                "token_update must be [", p.prompt_count, ", U, ", p.dim, "] adjacent ", wide, " on ",
                input_ids.device(), ", got ", token_update->sizes(), " ", token_update->scalar_type(), " on ",
                token_update->device());
    p.update_length = token_update->size(1);
    if (token_update->numel() > 0) p.token_update = matrix_of(token_update->flatten(0, 1), "token_update");
  }

  const auto long_options = input_ids.options().dtype(at::kLong);
  const std::vector<int64_t> lead =
      plan.has_value() ? std::vector<int64_t>{1, slots} : std::vector<int64_t>{p.rows, width};
  at::Tensor inputs_embeds = at::empty({lead[0], lead[1], p.dim}, embedding.options());
  at::Tensor position_ids = at::empty(lead, long_options);
  at::Tensor mask_out, labels_out;
  const auto mask_type = attention_mask.has_value() ? attention_mask->scalar_type() : at::kLong;
  std::tie(p.mask_one, p.mask_sign) = mask_patterns(mask_type);
  switch (p.mask_format) {
    case MaskFormat::none:
      mask_out = at::empty({0}, long_options);
      break;
    case MaskFormat::two_d:
      mask_out = at::empty(lead, input_ids.options().dtype(mask_type));
      break;
    case MaskFormat::four_d_bool:
      mask_out = at::empty({p.rows, 1, width, width}, input_ids.options().dtype(at::kBool));
      break;
    case MaskFormat::four_d_additive:
      mask_out = at::empty({p.rows, 1, width, width}, embedding.options());
      break;
  }
  labels_out = labels.has_value() ? at::empty(lead, labels->options()) : at::empty({0}, long_options);
  at::Tensor token_slots = at::empty({p.rows, p.tokens}, long_options);
  at::Tensor row_ids = at::empty({plan.has_value() ? slots : 0}, long_options);
  at::Tensor prompt_slots = at::empty({plan.has_value() ? prompt_segments : p.rows}, long_options);
  at::Tensor status = check ? at::full({kStatusSize}, kNoError, long_options) : at::empty({0}, long_options);
  p.inputs_embeds = inputs_embeds.mutable_data_ptr();
  p.mask_out = mask_out.mutable_data_ptr();
  p.position_ids = position_ids.mutable_data_ptr<int64_t>();
  p.labels_out = labels.has_value() ? labels_out.mutable_data_ptr() : nullptr;
  p.token_slots = token_slots.mutable_data_ptr<int64_t>();
  p.row_ids = plan.has_value() ? row_ids.mutable_data_ptr<int64_t>() : nullptr;
  p.prompt_slots = prompt_slots.mutable_data_ptr<int64_t>();
  p.status = check ? status.mutable_data_ptr<int64_t>() : nullptr;
  if (p.segments > 0) kernels.assemble(p);
  return {inputs_embeds, mask_out, position_ids, labels_out, token_slots, prompt_slots, row_ids, status};
}

at::Tensor prompt_backward(const Kernels& kernels, const at::Tensor& grad, const at::Tensor& prompt_slots,
                           const std::optional<at::Tensor>& use_ids, const at::Tensor& prompt_offsets,
                           int64_t prompt_rows, at::ScalarType dtype) {
  TORCH_CHECK(dtype == grad.scalar_type() || dtype == at::kFloat, "dtype must be float32 or that of grad, got ", dtype);
  const at::Tensor flat = flat_gradient(grad);
  TORCH_CHECK(prompt_offsets.numel() > 0, "prompt_offsets must have 1 element or more");
  at::Tensor result = at::empty({prompt_rows, flat.size(1)}, flat.options().dtype(dtype));
  PromptBackwardParams p{};
  p.dim = flat.size(1);
  p.uses = prompt_slots.numel();
  p.prompt_count = prompt_offsets.numel() - 1;
  p.grad = matrix_of(flat, "grad");
  p.grad_prompts = output_matrix(result);
  p.slots = integers_of(prompt_slots, "prompt_slots", p.uses, grad);
  p.prompt_offsets = few_or_there(prompt_offsets, "prompt_offsets", p.prompt_count + 1, grad);
  at::Tensor sorted_ids, order;
  if (use_ids.has_value()) {
    few_or_there(*use_ids, "use_ids", p.uses, grad);
    std::tie(sorted_ids, order) = at::sort(use_ids->flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    p.sorted_ids = few_or_there(sorted_ids, "sorted_ids", p.uses, grad);
    p.order = few_or_there(order, "order", p.uses, grad);
  }
  if (result.numel() > 0) kernels.prompt_backward(p);
  return result;
}

at::Tensor embedding_backward(const Kernels& kernels, const at::Tensor& grad, const at::Tensor& input_ids,
                              const at::Tensor& token_slots, int64_t vocabulary, int64_t padding_idx, double scale,
                              at::ScalarType dtype) {
  TORCH_CHECK(dtype == grad.scalar_type() || dtype == at::kFloat, "dtype must be float32 or that of grad, got ", dtype);
  const at::Tensor flat = flat_gradient(grad);
  TORCH_CHECK(token_slots.sizes() == input_ids.sizes() && at::isIntegralType(input_ids.scalar_type(), false),
              "token_slots must have the shape of input_ids, which are integers, got ", token_slots.sizes(), " and ",
              input_ids.sizes(), " ", input_ids.scalar_type());
  at::Tensor result = at::zeros({vocabulary, flat.size(1)}, flat.options().dtype(dtype));
  const at::Tensor slots = token_slots.reshape({-1});
  at::Tensor ids = input_ids.reshape({-1}).to(at::kLong);
  ids = at::where(slots.lt(0).logical_or(ids.eq(padding_idx)), vocabulary, ids);  // sorted last, then skipped
  const auto [sorted_ids, order] = at::sort(ids, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor sorted_slots = slots.index_select(0, order);
  EmbeddingBackwardParams p{};
  p.dim = flat.size(1);
  p.tokens = ids.numel();
  p.scale = scale;
  p.grad = matrix_of(flat, "grad");
  p.grad_embedding = output_matrix(result);
  p.sorted_ids = integers_of(sorted_ids, "sorted_ids", p.tokens, grad);
  p.sorted_slots = integers_of(sorted_slots, "sorted_slots", p.tokens, grad);
  if (p.tokens > 0 && p.dim > 0) kernels.embedding_backward(p);
  return result;
}

}  // namespace softprompt_fast
