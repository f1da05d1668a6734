// unpack, pack and attention: ops of the segments of a packed batch.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "arguments.h"
#include "ops.h"

namespace softprompt_fast {
namespace {

// `tensors` are [rows, width, heads, size], or [slots, heads, size] with one dimension less.
void check_tensors(at::TensorList tensors, const at::Tensor& table, int64_t dimensions) {
  TORCH_CHECK(!tensors.empty() && tensors.size() <= kMaxTensors, "1 to ", kMaxTensors, " tensors can be packed, got ",
              tensors.size());
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.dim() == dimensions && tensor.device() == table.device() &&
                    tensor.scalar_type() == tensors[0].scalar_type() && tensor.size(0) == tensors[0].size(0) &&
                    tensor.size(1) == tensors[0].size(1),
                "tensors must share rows, dtype and device, got ", tensor.sizes(), " ", tensor.scalar_type(), " on ",
                tensor.device());
  }
}

const int64_t* table_of(const at::Tensor& table) {
  TORCH_CHECK(table.dim() == 2 && table.size(1) == kTableColumns, "table must be [rows, 4], got ", table.sizes());
  return integers_of(table, "table", table.numel(), table);
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
  return tensor.dim() == 0 || tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

std::optional<at::Tensor> adjacent(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(adjacent(*tensor)) : std::nullopt;
}

}  // namespace

std::vector<at::Tensor> unpack(const Kernels& kernels, at::TensorList packed, const at::Tensor& table, int64_t width,
                               at::ScalarType dtype) {
  check_tensors(packed, table, 3);
  check_types(packed[0], dtype);
  UnpackParams p{};
  p.table = table_of(table);
  p.rows = table.size(0);
  p.width = width;
  p.slots = packed[0].size(0);
  std::vector<at::Tensor> inputs, results;
  bool empty = true;
  for (const at::Tensor& x : packed) {
    const at::Tensor& input = inputs.emplace_back(adjacent(x));
    const at::Tensor& result =
        results.emplace_back(at::empty({p.rows, width, input.size(1), input.size(2)}, input.options().dtype(dtype)));
    p.from[p.tensors] = heads_of(input, "packed");
    p.to[p.tensors++] = output_heads(result);
    empty = empty && result.numel() == 0;
  }
  if (!empty) kernels.unpack(p);
  return results;
}

std::vector<at::Tensor> pack(const Kernels& kernels, at::TensorList rows, const at::Tensor& places,
                             const at::Tensor& starts, at::ScalarType dtype) {
  check_tensors(rows, places, 4);
  check_types(rows[0], dtype);
  TORCH_CHECK(starts.numel() > 0, "starts must have 1 element or more");
  PackParams p{};
  p.held = places.numel();
  p.places = integers_of(places, "places", p.held, places);
  p.starts = integers_of(starts, "starts", starts.numel(), places);
  p.rows = rows[0].size(0);
  p.width = rows[0].size(1);
  p.slots = starts.numel() - 1;
  std::vector<at::Tensor> inputs, results;
  bool empty = true;
  for (const at::Tensor& x : rows) {
    const at::Tensor& input = inputs.emplace_back(adjacent(x));
    const at::Tensor& result =
        results.emplace_back(at::empty({p.slots, input.size(2), input.size(3)}, input.options().dtype(dtype)));
    p.from[p.tensors] = heads_of(input, "rows");
    p.to[p.tensors++] = output_heads(result);
    empty = empty && result.numel() == 0;
  }
  if (!empty) kernels.pack(p);
  return results;
}

namespace {

// Whether [first, first + count) of the lines overlap. They mostly ascend; then one look at each suffices.
bool overlap(const int64_t* lines, int64_t columns, int64_t segments) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t i = 0; i < segments; ++i)
    if (lines[i * columns + 1] > 0) ranges.emplace_back(lines[i * columns], lines[i * columns + 1]);
  if (!std::is_sorted(ranges.begin(), ranges.end())) std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].first + ranges[i - 1].second) return true;
  return false;
}

// prefix_key, prefix_value: the keys and values that prefixes are in; null: the packed ones themselves.
AttentionParams attention_params(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const at::Tensor& table, const std::optional<at::Tensor>& queries,
                                 const std::optional<at::Tensor>& prefix_key,
                                 const std::optional<at::Tensor>& prefix_value, double scale, int64_t window) {
  AttentionParams p{};
  p.table = table_of(table);
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3 &&
                  (queries.has_value() || query.size(0) == key.size(0)) && key.size(0) == value.size(0) &&
                  key.size(1) == value.size(1) && query.size(2) == key.size(2) && key.size(1) > 0 &&
                  query.size(1) > 0 && query.size(1) % key.size(1) == 0,
              "query must be [K, H, E], key [K, H', E], value [K, H', E'], got ", query.sizes(), ", ", key.sizes(),
              " and ", value.sizes());
  TORCH_CHECK(prefix_key.has_value() == prefix_value.has_value(), "prefix_key and prefix_value must come together");
  TORCH_CHECK(!prefix_key.has_value() || (prefix_key->dim() == 3 && prefix_value->dim() == 3),
              "prefix_key and prefix_value must have 3 dimensions");
  for (const at::Tensor& tensor : {key, value, table, prefix_key.value_or(key), prefix_value.value_or(key)})
    TORCH_CHECK(tensor.device() == query.device(), "the tensors must be on ", query.device(), ", got ",
                tensor.device());
  TORCH_CHECK(window >= 0, "window must be 0 or more, got ", window);
  p.segments = table.size(0);
  p.slots = key.size(0);
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
  const bool own = p.queries == nullptr;
  TORCH_CHECK(!overlap(own ? p.table : p.queries, own ? int64_t{kTableColumns} : 2, p.segments),
              "queries of two segments must not overlap");
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
  const auto before_k = adjacent(prefix_key), before_v = adjacent(prefix_value);
  AttentionForwardParams p{attention_params(q, k, v, table, queries, before_k, before_v, scale, window)};
  at::Tensor out = at::zeros({q.size(0), p.query.heads, p.value.size}, query.options());
  at::Tensor log_sums = at::zeros({q.size(0), p.query.heads}, query.options().dtype(at::kFloat));
  p.out = output_heads(out);
  p.log_sums = log_sums.mutable_data_ptr<float>();
  if (out.numel() > 0) kernel(p);
  return {out, log_sums};
}

std::vector<at::Tensor> attention_backward(void (*kernel)(const AttentionBackwardParams&), const at::Tensor& grad,
                                           const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           const at::Tensor& table, const std::optional<at::Tensor>& prefix_key,
                                           const std::optional<at::Tensor>& prefix_value, const at::Tensor& out,
                                           const at::Tensor& log_sums, double scale, int64_t window) {
  const at::Tensor q = adjacent(query), k = adjacent(key), v = adjacent(value), g = adjacent(grad), o = adjacent(out);
  const auto before_k = adjacent(prefix_key), before_v = adjacent(prefix_value);
  AttentionBackwardParams p{attention_params(q, k, v, table, {}, before_k, before_v, scale, window)};
  const std::vector<int64_t> shape{q.size(0), q.size(1), v.size(2)};
  for (const at::Tensor& tensor : {g, o})
    TORCH_CHECK(
        tensor.sizes() == shape && tensor.scalar_type() == query.scalar_type() && tensor.device() == query.device(),
        "grad and out must be ", shape, " ", query.scalar_type(), ", got ", tensor.sizes(), " ", tensor.scalar_type());
  TORCH_CHECK(log_sums.scalar_type() == at::kFloat && log_sums.is_contiguous() &&
                  log_sums.numel() == q.size(0) * q.size(1) && log_sums.device() == query.device(),
              "log_sums must be ", q.size(0) * q.size(1), " adjacent float32, got ", log_sums.sizes(), " ",
              log_sums.scalar_type());
  p.out = heads_of(o, "out");
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
  if (g.numel() > 0) kernel(p);
  for (at::Tensor& result : grads) result = result.to(query.scalar_type());
  return grads;
}

}  // namespace softprompt_fast
