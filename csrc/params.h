// The kernels' parameters: plain structs without a torch or CUDA type, shared by CPU and CUDA code.
// Symbols as in docs/architecture.md: B rows, T tokens, D hidden size, V vocabulary, N prompts, R prompt rows, U tokens
// that a prompt's update reaches.
#pragma once

#include <cstdint>

namespace softprompt_fast {

enum class Scalar : int32_t { f32, bf16, f16, f64 };
// The orders of MaskFormat, Status, PlanColumn and TableColumn are repeated in
// softprompt_fast/ops/extension/contract.py; module.cpp reports them and a test compares.
enum class MaskFormat : int32_t { none = 0, two_d = 1, four_d_bool = 2, four_d_additive = 3 };

// A matrix of 1-, 2-, 4- or 8-byte words, read without knowing more of its type. Strides in words.
struct Words {
  const void* data;  // null: absent
  int32_t bytes;
  int64_t row_stride;
  int64_t column_stride;
};

// A matrix of floating-point rows whose elements are adjacent. Stride in elements. `Data` is
// const void if the matrix is only read.
template <class Data>
struct MatrixRef {
  Data* data;  // null: absent
  Scalar type;
  int64_t count;
  int64_t stride;
};

// Slots of `status`: the smallest index at which a rule was broken, or kNoError.
enum Status : int32_t {
  kBadTokenId = 0,    // row * T + column of input_ids
  kBadPromptId = 1,   // row of prompt_ids
  kBadMaskValue = 2,  // row * T + column of attention_mask
  kBadLength = 3,     // row that does not fit its place in the output
  kBadOffset = 4,     // prompt whose offsets are not ascending or leave the bank
  kStatusSize = 5,
};
constexpr int64_t kNoError = INT64_MAX;

// Integers that a kernel reads: on its device, or here if the host knows them and they are few. Those need no copy.
constexpr int32_t kFewIntegers = 64;
struct Integers {
  const int64_t* data;  // null: the first `count` of few
  int64_t count;
  int64_t few[kFewIntegers];
};

// One line of the packed layout's plan, [segments, kPlanColumns] int64.
enum PlanColumn : int32_t { kPlanSlot = 0, kPlanLength = 1, kPlanPrompt = 2, kPlanPosition = 3, kPlanColumns = 4 };

struct AssembleParams {
  int64_t rows, tokens, dim;
  int64_t slots;            // output rows: B * S padded, K packed
  int64_t width;            // S padded; the longest segment packed
  int64_t segments;         // B padded; distinct prompts + B packed
  int64_t prompt_segments;  // 0 padded; distinct prompts packed
  int64_t prompt_count;
  bool left;  // padded layout: padding in front
  MaskFormat mask_format;
  bool causal;
  int64_t window;                // 0: none
  double scale;                  // of token embeddings
  uint64_t mask_one, mask_sign;  // bit patterns of 1 and -0 in the mask's dtype

  Words input_ids, attention_mask, labels;
  MatrixRef<const void> embedding, prompts;
  Integers prompt_offsets;  // [N + 1]
  Integers prompt_ids;      // [B]; none: prompt 0 everywhere
  const int64_t* plan;      // null: padded layout

  MatrixRef<const void> token_update;  // [N * U, D], float64 if the embedding is, else float32; null: none
  int64_t update_length;               // U

  void* inputs_embeds;    // [slots, D], dtype of embedding
  void* mask_out;         // [slots] or [slots, S]
  int64_t* position_ids;  // [slots]
  void* labels_out;       // [slots], null: none
  int64_t* token_slots;   // [B, T]: slot of each token, -1 for padding
  int64_t* row_ids;       // [slots] packed: row of each token, -1 for prompts; null: padded
  int64_t* prompt_slots;  // [B] padded, [distinct prompts] packed: slot of a prompt's first vector
  int64_t* status;        // [kStatusSize], null: nobody reads it
};

struct PromptBackwardParams {
  int64_t dim, uses, prompt_count;
  MatrixRef<const void> grad;    // [slots, D]
  MatrixRef<void> grad_prompts;  // [R, D]
  Integers sorted_ids;           // [uses] ascending: the prompt of each use; none: prompt 0 everywhere
  Integers order;        // [uses]: the uses in the order of sorted_ids, ascending within a prompt; none: as they are
  const int64_t* slots;  // [uses]: slot of a use's first vector, -1: none
  Integers prompt_offsets;
};

// Gradient of a table of which each slot holds one row: the embedding, or a token update's vectors.
struct EmbeddingBackwardParams {
  int64_t dim, tokens;  // tokens: entries of order
  double scale;
  MatrixRef<const void> grad;      // [slots, D]
  MatrixRef<void> grad_embedding;  // [V, D], zero on entry; dtype of grad, or float32
  const int64_t* sorted_ids;       // [tokens] ascending; ids >= V are skipped
  const int64_t* sorted_slots;     // [tokens]
};

// One line of a rows table, [rows, kTableColumns] int64: a row's own slots and the slots of its prefix.
enum TableColumn : int32_t { kOwnSlot = 0, kOwnLength = 1, kPrefixSlot = 2, kPrefixLength = 3, kTableColumns = 4 };

// A tensor of vectors per slot or per place of a row, and head. Strides in elements; elements are adjacent. `Data`
// as above.
template <class Data>
struct HeadsRef {
  Data* data;
  Scalar type;
  int64_t row_stride;   // of rows; 0 in packed tensors
  int64_t slot_stride;  // of slots or places
  int64_t head_stride;
  int64_t heads, size;
};

constexpr int32_t kMaxTensors = 4;

// Packed [slots, heads, size] <-> rows [rows, width, heads, size], for several tensors at once. `unpack` reads packed
// tensors and writes rows, `pack` the other way.
struct PackingParams {
  int64_t rows, width, slots;
  int32_t tensors;
  HeadsRef<const void> from[kMaxTensors];
  HeadsRef<void> to[kMaxTensors];  // contiguous
};

struct UnpackParams : PackingParams {
  const int64_t* table;
};

struct PackParams : PackingParams {
  int64_t held;           // entries of places
  const int64_t* places;  // [held], row * width + place, by the slot that is there, then ascending: the order of sums
  const int64_t* starts;  // [slots + 1]: where each slot's places begin
};

// Causal attention of segments over packed vectors: row r of the table holds a segment's own slots, which are its
// queries and the last of its keys, and the slots of the prefix in front of them. E key size, E' value size.
struct AttentionParams {
  int64_t segments, slots, prefix_slots;
  const int64_t* table;
  const int64_t* queries;  // [segments, 2]: first slot and number of a segment's queries, which end where its keys end;
                           // null: a query for each of its own slots
  double scale;
  int64_t window;  // 0: none
  HeadsRef<const void> query, key, value;
  HeadsRef<const void> prefix_key, prefix_value;  // where prefix slots are: in the packed vectors, or in other ones
};

struct AttentionForwardParams : AttentionParams {
  HeadsRef<void> out;  // [slots, H, E'], contiguous
  float* log_sums;     // [slots, H]: logarithm of each query's sum of exponentials
};

struct AttentionBackwardParams : AttentionParams {
  HeadsRef<const void> out, grad_out;  // [slots, H, E']
  const float* log_sums;
  // [slots, H, E], [slots, H', E], [slots, H', E'] and the same of prefix slots; zero on entry.
  float *grad_query, *grad_key, *grad_value, *grad_prefix_key, *grad_prefix_value;
};

}  // namespace softprompt_fast
