// The one index rule: what slot s of the output holds. CPU loops and CUDA kernels both call it.
//
//   padded, right   [prompt][text][pad]        packed   [prompt a][prompt b]..[text of row 0][text of row 1]..
//   padded, left    [pad][prompt][text]
//
// Text is a row's real tokens only (attention_mask == 1) in their order, so a row's content, positions and
// visibility never depend on its neighbours or on where its padding stood.
#pragma once

#include <type_traits>

#include "params.h"

#ifdef __CUDACC__
#define SPF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPF_HOST_DEVICE inline
#endif

namespace softprompt_fast {

// Elements of type T, const where the matrix or tensor is only read.
template <class T, class Data>
using element_t = std::conditional_t<std::is_const_v<Data>, const T, T>;

template <class T, class Data>
SPF_HOST_DEVICE element_t<T, Data>* row_at(const MatrixRef<Data>& matrix, int64_t row) {
  return static_cast<element_t<T, Data>*>(matrix.data) + row * matrix.stride;
}

template <class T, class Data>
SPF_HOST_DEVICE element_t<T, Data>* vector_at(const HeadsRef<Data>& tensor, int64_t row, int64_t slot, int64_t head) {
  return static_cast<element_t<T, Data>*>(tensor.data) + row * tensor.row_stride + slot * tensor.slot_stride +
         head * tensor.head_stride;
}

// A run of output slots with one padding, one prompt and one row's text in it, each possibly empty.
struct Segment {
  int64_t slot;    // first output slot
  int64_t length;  // output slots
  int64_t prompt_row, prompt_length;
  int64_t text_row;  // -1: no text
  int64_t position;  // of the first real slot
  int64_t use;       // its place in prompt_slots, -1: none
};

// Source of a slot's vector: >= 0 a row of the embedding, kPadding zeros, below it a row of the prompts.
constexpr int64_t kPadding = -1;
SPF_HOST_DEVICE int64_t encode_prompt_row(int64_t row) { return -2 - row; }
SPF_HOST_DEVICE int64_t decode_prompt_row(int64_t source) { return -2 - source; }

SPF_HOST_DEVICE int64_t integer_at(const Integers& integers, int64_t index) {
  return integers.data != nullptr ? integers.data[index] : integers.few[index];
}

SPF_HOST_DEVICE void report(int64_t* status, Status rule, int64_t index) {
  if (status == nullptr) return;
#ifdef __CUDA_ARCH__
  atomicMin(reinterpret_cast<long long*>(status + rule), static_cast<long long>(index));
#else
  int64_t seen = __atomic_load_n(status + rule, __ATOMIC_RELAXED);
  while (index < seen &&
         !__atomic_compare_exchange_n(status + rule, &seen, index, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
#endif
}

SPF_HOST_DEVICE uint64_t read_bits(const Words& words, int64_t row, int64_t column) {
  const int64_t at = row * words.row_stride + column * words.column_stride;
  switch (words.bytes) {
    case 1:
      return static_cast<const uint8_t*>(words.data)[at];
    case 2:
      return static_cast<const uint16_t*>(words.data)[at];
    case 4:
      return static_cast<const uint32_t*>(words.data)[at];
    default:
      return static_cast<const uint64_t*>(words.data)[at];
  }
}

SPF_HOST_DEVICE int64_t read_integer(const Words& words, int64_t row, int64_t column) {
  const uint64_t bits = read_bits(words, row, column);
  return words.bytes == 4 ? static_cast<int32_t>(static_cast<uint32_t>(bits)) : static_cast<int64_t>(bits);
}

SPF_HOST_DEVICE void write_bits(void* data, int32_t bytes, int64_t at, uint64_t bits) {
  switch (bytes) {
    case 1:
      static_cast<uint8_t*>(data)[at] = static_cast<uint8_t>(bits);
      break;
    case 2:
      static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(bits);
      break;
    case 4:
      static_cast<uint32_t*>(data)[at] = static_cast<uint32_t>(bits);
      break;
    default:
      static_cast<uint64_t*>(data)[at] = bits;
  }
}

// Bits of a mask value that count: -0 is padding too.
SPF_HOST_DEVICE uint64_t mask_bits(const AssembleParams& p, int64_t row, int64_t column) {
  const uint64_t bits = read_bits(p.attention_mask, row, column);
  return bits == p.mask_sign ? 0 : bits;
}

SPF_HOST_DEVICE bool is_real(const AssembleParams& p, int64_t row, int64_t column) {
  return p.attention_mask.data == nullptr || mask_bits(p, row, column) != 0;
}

// Sets the segment's rows of prompt `id`, none for -1. An unknown prompt is reported and treated as none.
SPF_HOST_DEVICE void find_prompt(const AssembleParams& p, int64_t id, int64_t row, Segment& segment) {
  segment.prompt_row = segment.prompt_length = 0;
  if (id == -1) return;
  if (id < 0 || id >= p.prompt_count) {
    report(p.status, kBadPromptId, row);
    return;
  }
  const int64_t first = integer_at(p.prompt_offsets, id), last = integer_at(p.prompt_offsets, id + 1);
  if (first < 0 || last < first || last > p.prompts.count) {
    report(p.status, kBadOffset, id);
    return;
  }
  segment.prompt_row = first;
  segment.prompt_length = last - first;
}

// The prompt that row `row` of the padded layout asks for.
SPF_HOST_DEVICE int64_t prompt_of(const AssembleParams& p, int64_t row) {
  return p.prompt_ids.count > 0 ? integer_at(p.prompt_ids, row) : (p.prompt_count > 0 ? 0 : -1);
}

SPF_HOST_DEVICE Segment segment_at(const AssembleParams& p, int64_t index) {
  Segment segment;
  if (p.plan == nullptr) {
    segment.slot = index * p.width;
    segment.length = p.width;
    segment.text_row = index;
    segment.position = 0;
    segment.use = index;
    find_prompt(p, prompt_of(p, index), index, segment);
    return segment;
  }
  const int64_t* line = p.plan + index * kPlanColumns;
  segment.slot = line[kPlanSlot];
  segment.length = line[kPlanLength];
  segment.position = line[kPlanPosition];
  segment.text_row = index < p.prompt_segments ? -1 : index - p.prompt_segments;
  segment.use = index < p.prompt_segments ? index : -1;
  // The host does not see a plan on a GPU: here a segment that leaves the output loses its slots.
  if (segment.slot < 0 || segment.length < 0 || segment.length > p.slots - segment.slot || segment.position < 0 ||
      segment.position > INT64_MAX - segment.length) {
    report(p.status, kBadLength, segment.text_row < 0 ? 0 : segment.text_row);
    segment.slot = segment.length = segment.position = 0;
  }
  // A text segment names its prompt for `first_update`; the prompt's vectors have a segment of their own.
  find_prompt(p, segment.text_row < 0 ? line[kPlanPrompt] : -1, index, segment);
  return segment;
}

// Row of token_update that is added to the first token of a segment's text, -1: none.
SPF_HOST_DEVICE int64_t first_update(const AssembleParams& p, int64_t index) {
  if (p.token_update.data == nullptr) return -1;
  const int64_t id = p.plan == nullptr ? prompt_of(p, index) : p.plan[index * kPlanColumns + kPlanPrompt];
  return id < 0 || id >= p.prompt_count ? -1 : id * p.update_length;
}

// Where a segment's slots are real once its row's real tokens are counted: [begin, end), the prompt and `text` tokens.
struct Layout {
  int64_t begin, text, end;
};

// Fits prompt and text into the segment. Drops the segment's prompt, or the last tokens, if there is no room for them,
// and reports that in `status`.
SPF_HOST_DEVICE Layout fit_segment(const AssembleParams& p, Segment& segment, int64_t real_tokens) {
  if (segment.prompt_length > segment.length) {  // max_prompt_length given too small
    report(p.status, kBadLength, segment.text_row < 0 ? 0 : segment.text_row);
    segment.prompt_length = 0;
  }
  const int64_t room = segment.length - segment.prompt_length;
  const bool exact = p.plan != nullptr;
  if (real_tokens > room || (exact && real_tokens != room)) {
    report(p.status, kBadLength, segment.text_row < 0 ? 0 : segment.text_row);
    if (real_tokens > room) real_tokens = room;
  }
  Layout layout;
  layout.text = real_tokens;
  layout.begin = (!exact && p.left) ? room - real_tokens : 0;
  layout.end = layout.begin + segment.prompt_length + real_tokens;
  return layout;
}

// Index of the text token in slot s of the segment, among the row's real tokens; -1 if there is none.
SPF_HOST_DEVICE int64_t text_rank(const Segment& segment, const Layout& layout, int64_t s) {
  const int64_t rank = s - layout.begin - segment.prompt_length;
  return rank >= 0 && rank < layout.text ? rank : -1;
}

// Writes the slot of the segment's prompt, for the backward pass; -1 if there is none.
SPF_HOST_DEVICE void fill_prompt_slot(const AssembleParams& p, const Segment& segment, const Layout& layout) {
  if (segment.use >= 0) p.prompt_slots[segment.use] = segment.prompt_length > 0 ? segment.slot + layout.begin : -1;
}

// Writes all of slot s but its vector and its 4-D mask, and returns the vector's source.
// `column` is the token's place in input_ids, -1 if no token is there.
SPF_HOST_DEVICE int64_t fill_slot(const AssembleParams& p, const Segment& segment, const Layout& layout, int64_t s,
                                  int64_t column) {
  const int64_t slot = segment.slot + s, row = segment.text_row;
  const bool real = s >= layout.begin && s < layout.end;
  // Everything is read before anything is written: a GPU then waits for all of it at once.
  uint64_t label = static_cast<uint64_t>(int64_t{-100}), mask = p.mask_one;
  int64_t id = -1;
  if (column >= 0) {
    id = read_integer(p.input_ids, row, column);
    if (p.labels_out != nullptr) label = read_bits(p.labels, row, column);
    if (p.attention_mask.data != nullptr) mask = mask_bits(p, row, column);
  }
  p.position_ids[slot] = real ? segment.position + s - layout.begin : 0;
  if (p.mask_format == MaskFormat::two_d) write_bits(p.mask_out, p.attention_mask.bytes, slot, real ? p.mask_one : 0);
  if (p.row_ids != nullptr) p.row_ids[slot] = row;
  if (p.labels_out != nullptr) write_bits(p.labels_out, p.labels.bytes, slot, label);
  if (column < 0) return real ? encode_prompt_row(segment.prompt_row + s - layout.begin) : kPadding;
  p.token_slots[row * p.tokens + column] = slot;
  if (mask != p.mask_one) report(p.status, kBadMaskValue, row * p.tokens + column);
  if (id < 0 || id >= p.embedding.count) {
    report(p.status, kBadTokenId, row * p.tokens + column);
    return kPadding;
  }
  return id;
}

// Keys that the query in slot q of a row sees: [first, last). Same windows as transformers: causal counts the
// query itself, bidirectional reaches `window` to either side. Padding sees itself only, so no softmax is empty.
struct Range {
  int64_t first, last;
};

SPF_HOST_DEVICE Range visible_keys(const AssembleParams& p, const Layout& layout, int64_t q) {
  if (q < layout.begin || q >= layout.end) return {q, q + 1};
  Range range{layout.begin, p.causal ? q + 1 : layout.end};
  if (p.window > 0) {
    const int64_t first = p.causal ? q - p.window + 1 : q - p.window;
    if (first > range.first) range.first = first;
    if (!p.causal && p.window < range.last - q - 1) range.last = q + p.window + 1;
  }
  return range;
}

// The prompt of row `row` of the prompts, -1 if the offsets give it to none.
SPF_HOST_DEVICE int64_t prompt_holding(const PromptBackwardParams& p, int64_t row) {
  int64_t low = 0, high = p.prompt_count;  // the first prompt that ends after the row
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (integer_at(p.prompt_offsets, middle + 1) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == p.prompt_count) return -1;
  const int64_t first = integer_at(p.prompt_offsets, low);
  return first >= 0 && first <= row ? low : -1;
}

// The uses of a prompt, in the order of their ids: [first, last).
SPF_HOST_DEVICE Range uses_of(const PromptBackwardParams& p, int64_t prompt) {
  if (prompt < 0) return {0, 0};
  if (p.sorted_ids.count == 0) return {0, prompt == 0 ? p.uses : 0};
  Range range{0, 0};
  for (int end = 0; end < 2; ++end) {
    int64_t low = range.first, high = p.uses;  // the first use of this prompt, then of a later one
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (integer_at(p.sorted_ids, middle) < prompt + end) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    (end == 0 ? range.first : range.last) = low;
  }
  return range;
}

// Row of the gradient for place `place` of the prompt in the use at `use` of that order, -1 if the prompt is not there.
SPF_HOST_DEVICE int64_t gradient_row(const PromptBackwardParams& p, int64_t use, int64_t place) {
  const int64_t slot = p.slots[p.order.count > 0 ? integer_at(p.order, use) : use];
  return slot >= 0 && slot < p.grad.count - place ? slot + place : -1;
}

// first + offset if that is a slot, -1 if not; offset >= 0.
SPF_HOST_DEVICE int64_t slot_after(int64_t first, int64_t offset, int64_t slots) {
  return first >= -offset && first < slots - offset ? first + offset : -1;
}

// The slot at place `place` of a row that a line of a rows table describes, -1 if there is none.
SPF_HOST_DEVICE int64_t slot_at(const int64_t* line, int64_t place, int64_t slots) {
  const int64_t prefix = line[kPrefixLength] > 0 ? line[kPrefixLength] : 0;
  if (place < prefix) return slot_after(line[kPrefixSlot], place, slots);
  return place - prefix < line[kOwnLength] ? slot_after(line[kOwnSlot], place - prefix, slots) : -1;
}

// The places that hold slot `slot`: [first, last) of p.places.
SPF_HOST_DEVICE Range holders_of(const PackParams& p, int64_t slot) {
  const auto within = [&](int64_t holder) { return holder < 0 ? 0 : (holder < p.held ? holder : p.held); };
  const int64_t first = within(p.starts[slot]), last = within(p.starts[slot + 1]);
  return {first, last < first ? first : last};
}

// A holder's row and place in the row, -1 if there is no such place.
struct Place {
  int64_t row, place;
};

SPF_HOST_DEVICE Place place_at(const PackParams& p, int64_t holder) {
  const int64_t at = p.places[holder];
  if (at < 0 || at >= p.rows * p.width) return {-1, -1};
  return {at / p.width, at % p.width};
}

}  // namespace softprompt_fast
