#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

namespace softprompt_fast {
namespace {

// The Python wrapper explains bad input to people. These checks only make a direct call safe.
Scalar scalar_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Scalar::f32;
    case at::kBFloat16:
      return Scalar::bf16;
    case at::kHalf:
      return Scalar::f16;
    case at::kDouble:
      return Scalar::f64;
    default:
      TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ", tensor.scalar_type());
  }
}

void check_matrix(const at::Tensor& tensor, const char* name, const at::Tensor& like) {
  TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
  TORCH_CHECK(tensor.device() == like.device(), name, " must be on ", like.device(), ", got ", tensor.device());
}

Words words_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), static_cast<int32_t>(tensor.element_size()), tensor.stride(0), tensor.stride(1)};
}

Words words_of(const std::optional<at::Tensor>& tensor, const char* name, const at::Tensor& input_ids) {
  if (!tensor.has_value()) return {nullptr, 8, 0, 0};
  TORCH_CHECK(tensor->sizes() == input_ids.sizes() && tensor->device() == input_ids.device(), name,
              " must have the shape and device of input_ids, got ", tensor->sizes(), " on ", tensor->device());
  return words_of(*tensor);
}

MatrixRef<const void> matrix_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, name,
              " must have adjacent elements in a row");
  return {tensor.const_data_ptr(), scalar_of(tensor, name), tensor.size(0), tensor.stride(0)};
}

// A fresh, contiguous result.
MatrixRef<void> output_matrix(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), scalar_of(tensor, "result"), tensor.size(0), tensor.stride(0)};
}

const int64_t* integers_of(const at::Tensor& tensor, const char* name, int64_t size, const at::Tensor& like) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.is_contiguous() && tensor.numel() == size &&
                  tensor.device() == like.device(),
              name, " must be ", size, " adjacent int64 on ", like.device(), ", got ", tensor.sizes(), " ",
              tensor.scalar_type(), " on ", tensor.device());
  return tensor.const_data_ptr<int64_t>();
}

// Bit patterns of 1 and of -0.
std::pair<uint64_t, uint64_t> mask_patterns(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return {0x3c00, 0x8000};
    case at::kBFloat16:
      return {0x3f80, 0x8000};
    case at::kFloat:
      return {0x3f800000, 0x80000000};
    case at::kDouble:
      return {0x3ff0000000000000, 0x8000000000000000};
    default:
      TORCH_CHECK(at::isIntegralType(type, true), "attention_mask must be bool, integer or float, got ", type);
      return {1, 0};
  }
}

}  // namespace

Assembled assemble(const Kernels& kernels, const at::Tensor& input_ids, const at::Tensor& embedding,
                   const at::Tensor& prompts, const at::Tensor& prompt_offsets,
                   const std::optional<at::Tensor>& prompt_ids, const std::optional<at::Tensor>& attention_mask,
                   const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& plan, int64_t slots,
                   int64_t width, int64_t prompt_segments, bool left, int64_t mask_format, bool causal, int64_t window,
                   double scale, const std::optional<at::Tensor>& token_update) {
  check_matrix(input_ids, "input_ids", input_ids);
  check_matrix(embedding, "embedding", input_ids);
  check_matrix(prompts, "prompts", input_ids);
  TORCH_CHECK(input_ids.scalar_type() == at::kLong || input_ids.scalar_type() == at::kInt,
              "input_ids must be int32 or int64, got ", input_ids.scalar_type());
  TORCH_CHECK(prompts.size(1) == embedding.size(1), "prompts and embedding must have one hidden size");
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
  p.prompt_offsets = integers_of(prompt_offsets, "prompt_offsets", p.prompt_count + 1, input_ids);
  if (prompt_ids.has_value()) p.prompt_ids = integers_of(*prompt_ids, "prompt_ids", p.rows, input_ids);
  if (plan.has_value()) {
    p.prompt_segments = prompt_segments;
    p.segments = prompt_segments + p.rows;
    p.plan = integers_of(*plan, "plan", p.segments * kPlanColumns, input_ids);
    TORCH_CHECK(mask_format == 0, "the packed layout has no attention mask");
  } else {
    p.segments = p.rows;
    TORCH_CHECK(slots == p.rows * width, "slots must be rows * width in the padded layout");
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
    default:
      TORCH_CHECK(false, "mask_format must be 0 to 3, got ", mask_format);
  }
  labels_out = labels.has_value() ? at::empty(lead, labels->options()) : at::empty({0}, long_options);
  at::Tensor token_slots = at::empty({p.rows, p.tokens}, long_options);
  at::Tensor row_ids = at::empty({plan.has_value() ? slots : 0}, long_options);
  at::Tensor prompt_slots = at::empty({plan.has_value() ? prompt_segments : p.rows}, long_options);
  at::Tensor status = at::full({kStatusSize}, kNoError, long_options);
  p.inputs_embeds = inputs_embeds.mutable_data_ptr();
  p.mask_out = mask_out.mutable_data_ptr();
  p.position_ids = position_ids.mutable_data_ptr<int64_t>();
  p.labels_out = labels.has_value() ? labels_out.mutable_data_ptr() : nullptr;
  p.token_slots = token_slots.mutable_data_ptr<int64_t>();
  p.row_ids = plan.has_value() ? row_ids.mutable_data_ptr<int64_t>() : nullptr;
  p.prompt_slots = prompt_slots.mutable_data_ptr<int64_t>();
  p.status = status.mutable_data_ptr<int64_t>();
  if (p.segments > 0) kernels.assemble(p);
  return {inputs_embeds, mask_out, position_ids, labels_out, token_slots, prompt_slots, row_ids, status};
}

at::Tensor prompt_backward(const Kernels& kernels, const at::Tensor& grad, const at::Tensor& prompt_slots,
                           const std::optional<at::Tensor>& use_ids, const at::Tensor& prompt_offsets,
                           int64_t prompt_rows, at::ScalarType dtype) {
  TORCH_CHECK(dtype == grad.scalar_type() || dtype == at::kFloat, "dtype must be float32 or that of grad, got ", dtype);
  const at::Tensor flat = grad.reshape({-1, grad.size(-1)}).contiguous();
  at::Tensor result = at::empty({prompt_rows, flat.size(1)}, flat.options().dtype(dtype));
  PromptBackwardParams p{};
  p.dim = flat.size(1);
  p.uses = prompt_slots.numel();
  p.prompt_count = prompt_offsets.numel() - 1;
  p.grad = matrix_of(flat, "grad");
  p.grad_prompts = output_matrix(result);
  p.slots = integers_of(prompt_slots, "prompt_slots", p.uses, grad);
  if (use_ids.has_value()) p.use_ids = integers_of(*use_ids, "use_ids", p.uses, grad);
  p.prompt_offsets = integers_of(prompt_offsets, "prompt_offsets", p.prompt_count + 1, grad);
  if (result.numel() > 0) kernels.prompt_backward(p);
  return result;
}

at::Tensor embedding_backward(const Kernels& kernels, const at::Tensor& grad, const at::Tensor& input_ids,
                              const at::Tensor& token_slots, int64_t vocabulary, int64_t padding_idx, double scale,
                              at::ScalarType dtype) {
  TORCH_CHECK(dtype == grad.scalar_type() || dtype == at::kFloat, "dtype must be float32 or that of grad, got ", dtype);
  const at::Tensor flat = grad.reshape({-1, grad.size(-1)}).contiguous();
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

namespace {

// `tensors` are [rows, width, heads, size], or [slots, heads, size] with one dimension less.
PackingParams packing_params(at::TensorList tensors, const at::Tensor& table, int64_t dimensions) {
  TORCH_CHECK(!tensors.empty() && tensors.size() <= kMaxTensors, "1 to ", kMaxTensors, " tensors can be packed, got ",
              tensors.size());
  PackingParams p{};
  TORCH_CHECK(table.dim() == 2 && table.size(1) == kTableColumns, "table must be [rows, 4], got ", table.sizes());
  p.rows = table.size(0);
  p.tensors = static_cast<int32_t>(tensors.size());
  p.table = integers_of(table, "table", table.numel(), table);
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.dim() == dimensions && tensor.device() == table.device() &&
                    tensor.scalar_type() == tensors[0].scalar_type() && tensor.size(0) == tensors[0].size(0) &&
                    tensor.size(1) == tensors[0].size(1),
                "tensors must share rows, dtype and device, got ", tensor.sizes(), " ", tensor.scalar_type(), " on ",
                tensor.device());
  }
  return p;
}

void check_types(const at::Tensor& from, at::ScalarType to) {
  TORCH_CHECK(from.scalar_type() == to || from.scalar_type() == at::kFloat || to == at::kFloat,
              "dtype must be that of the tensors, or one of them float32, got ", from.scalar_type(), " and ", to);
}

template <class Data>
HeadsRef<Data> heads_at(Data* data, const at::Tensor& tensor, const char* name) {
  const bool rows = tensor.dim() == 4;
  const int64_t slot = rows ? 1 : 0;
  return {data,
          scalar_of(tensor, name),
          rows ? tensor.stride(0) : 0,
          tensor.stride(slot),
          tensor.stride(slot + 1),
          tensor.size(slot + 1),
          tensor.size(slot + 2)};
}

HeadsRef<const void> heads_of(const at::Tensor& tensor, const char* name) {
  return heads_at(tensor.const_data_ptr(), tensor, name);
}

// A fresh, contiguous result.
HeadsRef<void> output_heads(const at::Tensor& tensor) { return heads_at(tensor.mutable_data_ptr(), tensor, "result"); }

at::Tensor adjacent(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

}  // namespace

std::vector<at::Tensor> unpack(const Kernels& kernels, at::TensorList packed, const at::Tensor& table, int64_t width,
                               at::ScalarType dtype) {
  PackingParams p = packing_params(packed, table, 3);
  check_types(packed[0], dtype);
  p.width = width;
  p.slots = packed[0].size(0);
  std::vector<at::Tensor> inputs, results;
  for (int32_t i = 0; i < p.tensors; ++i) {
    const at::Tensor& input = inputs.emplace_back(adjacent(packed[i]));
    results.push_back(at::empty({p.rows, width, input.size(1), input.size(2)}, input.options().dtype(dtype)));
    p.from[i] = heads_of(input, "packed");
    p.to[i] = output_heads(results[i]);
  }
  if (p.rows * width > 0) kernels.unpack(p);
  return results;
}

std::vector<at::Tensor> pack(const Kernels& kernels, at::TensorList rows, const at::Tensor& table, int64_t slots,
                             at::ScalarType dtype) {
  PackingParams p = packing_params(rows, table, 4);
  check_types(rows[0], dtype);
  TORCH_CHECK(rows[0].size(0) == p.rows, "rows must be as many as the table's lines, got ", rows[0].sizes());
  p.width = rows[0].size(1);
  p.slots = slots;
  std::vector<at::Tensor> inputs, results;
  for (int32_t i = 0; i < p.tensors; ++i) {
    const at::Tensor& input = inputs.emplace_back(adjacent(rows[i]));
    results.push_back(at::empty({slots, input.size(2), input.size(3)}, input.options().dtype(dtype)));
    p.from[i] = heads_of(input, "rows");
    p.to[i] = output_heads(results[i]);
  }
  if (slots > 0) kernels.pack(p);
  return results;
}

namespace {

// prefix_key, prefix_value: the keys and values that prefixes are in; null: the packed ones themselves.
AttentionParams attention_params(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const at::Tensor& table, const std::optional<at::Tensor>& queries,
                                 const std::optional<at::Tensor>& prefix_key,
                                 const std::optional<at::Tensor>& prefix_value, double scale, int64_t window) {
  AttentionParams p{};
  TORCH_CHECK(table.dim() == 2 && table.size(1) == kTableColumns, "table must be [segments, 4], got ", table.sizes());
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3 &&
                  (queries.has_value() || query.size(0) == key.size(0)) && key.size(0) == value.size(0) &&
                  key.size(1) == value.size(1) && query.size(2) == key.size(2) && key.size(1) > 0 &&
                  query.size(1) % key.size(1) == 0,
              "query must be [K, H, E], key [K, H', E], value [K, H', E'], got ", query.sizes(), ", ", key.sizes(),
              " and ", value.sizes());
  TORCH_CHECK(prefix_key.has_value() == prefix_value.has_value(), "prefix_key and prefix_value must come together");
  p.segments = table.size(0);
  p.slots = key.size(0);
  p.table = integers_of(table, "table", table.numel(), table);
  if (queries.has_value()) p.queries = integers_of(*queries, "queries", 2 * p.segments, table);
  p.scale = scale;
  p.window = window;
  p.query = heads_of(query, "query");
  p.key = heads_of(key, "key");
  p.value = heads_of(value, "value");
  p.prefix_key = prefix_key.has_value() ? heads_of(*prefix_key, "prefix_key") : p.key;
  p.prefix_value = prefix_value.has_value() ? heads_of(*prefix_value, "prefix_value") : p.value;
  p.prefix_slots = prefix_key.has_value() ? prefix_key->size(0) : p.slots;
  TORCH_CHECK(p.prefix_key.heads == p.key.heads && p.prefix_key.size == p.key.size &&
                  p.prefix_value.heads == p.value.heads && p.prefix_value.size == p.value.size &&
                  (!prefix_key.has_value() || prefix_value->size(0) == p.prefix_slots),
              "prefix_key and prefix_value must have the heads and sizes of key and value");
  for (const Scalar type : {p.key.type, p.value.type, p.prefix_key.type, p.prefix_value.type})
    TORCH_CHECK(type == p.query.type && type != Scalar::f64, "attention takes one of float32, bfloat16, float16");
  for (int64_t i = 0; i < p.segments; ++i) {
    const int64_t* line = p.table + i * kTableColumns;
    TORCH_CHECK(line[kOwnSlot] >= 0 && line[kOwnLength] >= 0 && line[kOwnSlot] <= p.slots - line[kOwnLength] &&
                    line[kPrefixSlot] >= 0 && line[kPrefixLength] >= 0 &&
                    line[kPrefixSlot] <= p.prefix_slots - line[kPrefixLength],
                "line ", i, " of the table leaves the tensors");
    if (p.queries == nullptr) continue;
    const int64_t first = p.queries[2 * i], count = p.queries[2 * i + 1];
    TORCH_CHECK(first >= 0 && count >= 0 && first <= query.size(0) - count && count <= line[kOwnLength], "queries ", i,
                " leave the query tensor, or are more than the segment's own keys");
  }
  return p;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention(void (*kernel)(const AttentionForwardParams&), const at::Tensor& query,
                                             const at::Tensor& key, const at::Tensor& value, const at::Tensor& table,
                                             const std::optional<at::Tensor>& queries,
                                             const std::optional<at::Tensor>& prefix_key,
                                             const std::optional<at::Tensor>& prefix_value, double scale,
                                             int64_t window) {
  const at::Tensor q = adjacent(query), k = adjacent(key), v = adjacent(value);
  AttentionForwardParams p{attention_params(q, k, v, table, queries, prefix_key, prefix_value, scale, window)};
  at::Tensor out = at::zeros({q.size(0), p.query.heads, p.value.size}, query.options());
  at::Tensor log_sums = at::zeros({q.size(0), p.query.heads}, query.options().dtype(at::kFloat));
  p.out = output_heads(out);
  p.log_sums = log_sums.mutable_data_ptr<float>();
  kernel(p);
  return {out, log_sums};
}

std::vector<at::Tensor> attention_backward(void (*kernel)(const AttentionBackwardParams&), const at::Tensor& grad,
                                           const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           const at::Tensor& table, const std::optional<at::Tensor>& prefix_key,
                                           const std::optional<at::Tensor>& prefix_value, const at::Tensor& out,
                                           const at::Tensor& log_sums, double scale, int64_t window) {
  const at::Tensor q = adjacent(query), k = adjacent(key), v = adjacent(value), g = adjacent(grad);
  AttentionBackwardParams p{attention_params(q, k, v, table, {}, prefix_key, prefix_value, scale, window)};
  TORCH_CHECK(g.sizes() == out.sizes() && g.scalar_type() == query.scalar_type(), "grad must be as out");
  p.out = heads_of(out, "out");
  p.log_sums = log_sums.const_data_ptr<float>();
  p.grad_out = heads_of(g, "grad");
  const auto wide = query.options().dtype(at::kFloat);
  std::vector<at::Tensor> grads = {at::zeros(q.sizes(), wide), at::zeros(k.sizes(), wide), at::zeros(v.sizes(), wide)};
  if (prefix_key.has_value()) {
    grads.push_back(at::zeros(prefix_key->sizes(), wide));
    grads.push_back(at::zeros(prefix_value->sizes(), wide));
  }
  p.grad_query = grads[0].mutable_data_ptr<float>();
  p.grad_key = grads[1].mutable_data_ptr<float>();
  p.grad_value = grads[2].mutable_data_ptr<float>();
  p.grad_prefix_key = grads[prefix_key.has_value() ? 3 : 1].mutable_data_ptr<float>();
  p.grad_prefix_value = grads[prefix_key.has_value() ? 4 : 2].mutable_data_ptr<float>();
  kernel(p);
  for (at::Tensor& result : grads) result = result.to(query.scalar_type());
  return grads;
}

}  // namespace softprompt_fast
