// What the benchmark of the kernels runs. Each variant of the kernels is an object of its own that fills its parameters
// from these.
#pragma once

#include <cstdint>

struct AssembleCase {
  int prompt_length, rows, tokens, dim;
  bool wide_prompts;  // float32, else as the embedding: bfloat16
  int64_t vocabulary;
  const void *embedding, *prompts;
  const int64_t *input_ids, *mask, *labels;  // mask: null if all tokens are real
  void* vectors;
  int64_t *mask_out, *positions, *labels_out, *token_slots, *prompt_slots, *status;

  int64_t width() const { return prompt_length + tokens; }
  int64_t slots() const { return rows * width(); }
};

// The gradient of `prompt_length` vectors that each row uses once; its sum is float32.
struct BackwardCase {
  int prompt_length, rows, tokens, dim;
  const void* grad;
  const int64_t* slots;
  void* result;
};

struct PackingCase {
  int rows, width, prefix, heads, size;
  int64_t slots, held;
  const int64_t *table, *places, *starts;
  const void* from;
  void* to;
};

// A variant of the kernels, on the default stream.
struct Variant {
  const char* name;
  void (*assemble)(const AssembleCase&);
  void (*prompt_backward)(const BackwardCase&);
  void (*unpack)(const PackingCase&);
  void (*pack)(const PackingCase&);
};
