#include "kernels.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#include "memory.h"
#include "parallel.h"

namespace softprompt_fast::cpu {
namespace {

constexpr size_t kAhead = 2;  // tokens between asking for a vector and copying it

template <class Out, class In>
void convert_row(Out* out, const In* in, int64_t dim, wide_t<Out> scale) {
  for (int64_t d = 0; d < dim; ++d) out[d] = Narrow<Out>::from(static_cast<wide_t<Out>>(widen(in[d])) * scale);
}

// out = in * scale + update, rounded to W in between: as two loops, so that no compiler fuses them into one rounding.
template <class Out, class In, class W>
void convert_updated_row(Out* out, const In* in, const W* update, W* scaled, int64_t dim, W scale) {
  if (scale == W(1)) {
    for (int64_t d = 0; d < dim; ++d) out[d] = Narrow<Out>::from(static_cast<W>(widen(in[d])) + update[d]);
    return;
  }
  convert_row(scaled, in, dim, scale);
  for (int64_t d = 0; d < dim; ++d) out[d] = Narrow<Out>::from(scaled[d] + update[d]);
}

template <class Out, class In>
void copy_row(Out* out, const In* in, int64_t dim, bool streaming) {
  if constexpr (std::is_same_v<Out, In>) {
    copy_bytes(out, in, dim * static_cast<int64_t>(sizeof(Out)), streaming);
  } else {
    convert_row(out, in, dim, wide_t<Out>(1));
  }
}

template <class T>
void fill_visibility(T* out, int64_t width, Range keys, T hidden, T seen) {
  std::fill(out, out + keys.first, hidden);
  std::fill(out + keys.first, out + keys.last, seen);
  std::fill(out + keys.last, out + width, hidden);
}

// The segment that slot `slot` belongs to, or, past the last slot, the number of segments.
int64_t segment_of(const AssembleParams& p, int64_t slot) {
  if (p.plan == nullptr) return p.width > 0 ? slot / p.width : 0;
  int64_t low = 0, high = p.segments;
  while (low < high) {  // the first segment that starts at or after the slot
    const int64_t middle = (low + high) / 2;
    if (p.plan[middle * kPlanColumns + kPlanSlot] < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const bool starts_here = low < p.segments && p.plan[low * kPlanColumns + kPlanSlot] == slot;
  return starts_here || low == 0 ? low : low - 1;
}

template <class E, class P>
class Writer {
 public:
  Writer(const AssembleParams& params)
      : p(params),
        streaming(prefer_streaming(p.slots * p.dim * static_cast<int64_t>(sizeof(E)))),
        four_d(p.mask_format == MaskFormat::four_d_bool || p.mask_format == MaskFormat::four_d_additive) {}

  int64_t slot_bytes() const { return p.dim * static_cast<int64_t>(sizeof(E)) + (four_d ? p.width : 0); }

  // Slots [first, last) of the output; segments without a slot go with `closing`, the last call.
  void write(int64_t first, int64_t last, bool closing) const {
    std::vector<int64_t> columns, sources;  // of the row's real tokens; of their vectors
    columns.reserve(static_cast<size_t>(p.tokens));
    sources.reserve(static_cast<size_t>(p.tokens));
    std::vector<W> scaled(p.token_update.data != nullptr ? static_cast<size_t>(p.dim) : 0);
    Finished finished;
    for (int64_t index = segment_of(p, first); index < p.segments; ++index) {
      Segment segment = segment_at(p, index);
      if (segment.slot > last || (segment.slot == last && !closing)) break;
      columns.clear();
      if (segment.text_row >= 0) {
        for (int64_t t = 0; t < p.tokens; ++t)
          if (is_real(p, segment.text_row, t)) columns.push_back(t);
      }
      const Layout layout = fit_segment(p, segment, static_cast<int64_t>(columns.size()));
      if (segment.slot >= first) finish_row(segment, layout);
      const int64_t begin = std::max<int64_t>(first - segment.slot, 0);
      const int64_t end = std::min(last - segment.slot, segment.length);
      sources.clear();
      for (int64_t s = begin; s < end; ++s) {
        const int64_t rank = text_rank(segment, layout, s);
        const int64_t source = fill_slot(p, segment, layout, s, rank < 0 ? -1 : columns[static_cast<size_t>(rank)]);
        if (rank >= 0) sources.push_back(source);
        if (four_d) write_visibility(segment.slot + s, visible_keys(p, layout, s));
      }
      // The vectors in runs, which copy faster than one slot after the other: padding, prompt, text, padding.
      const int64_t text_begin = layout.begin + segment.prompt_length;
      write_zeros(segment.slot + begin, segment.slot + std::min(end, layout.begin));
      write_prompt(segment, layout, std::max(begin, layout.begin), std::min(end, text_begin), finished);
      const int64_t first_text = std::max(begin, text_begin);
      write_text(segment.slot + first_text, sources, first_update(p, index), first_text - text_begin, scaled.data());
      write_zeros(segment.slot + std::max(begin, layout.end), segment.slot + end);
    }
    if (streaming) finish_streaming();
  }

 private:
  using W = wide_t<E>;

  // A prompt that this call has written whole, in the output's dtype.
  struct Finished {
    int64_t prompt_row = -1, prompt_length = 0, slot = 0;
  };

  // Writes what belongs to a segment as a whole: its prompt's slot, and -1 at its row's padding.
  void finish_row(const Segment& segment, const Layout& layout) const {
    fill_prompt_slot(p, segment, layout);
    if (segment.text_row < 0 || (layout.text == p.tokens)) return;
    int64_t rank = 0;
    for (int64_t t = 0; t < p.tokens; ++t) {
      const bool real = is_real(p, segment.text_row, t);
      if (!real || rank >= layout.text) p.token_slots[segment.text_row * p.tokens + t] = -1;
      rank += real ? 1 : 0;
    }
  }

  E* output_at(int64_t slot) const { return static_cast<E*>(p.inputs_embeds) + slot * p.dim; }
  const E* token_at(int64_t id) const { return row_at<E>(p.embedding, id); }

  void write_zeros(int64_t first, int64_t last) const {
    if (first < last) std::fill(output_at(first), output_at(last), E{});
  }

  // Slots [begin, end) of the segment, all of them in its prompt.
  void write_prompt(const Segment& segment, const Layout& layout, int64_t begin, int64_t end,
                    Finished& finished) const {
    if (begin >= end) return;
    E* to = output_at(segment.slot + begin);
    if (!std::is_same_v<E, P> && finished.prompt_row == segment.prompt_row &&
        finished.prompt_length == segment.prompt_length) {  // no need to convert it once more
      return copy_row(to, output_at(finished.slot + begin - layout.begin), (end - begin) * p.dim, streaming);
    }
    const P* from = row_at<P>(p.prompts, segment.prompt_row + begin - layout.begin);
    const int64_t adjacent = p.prompts.stride == p.dim ? end - begin : 1;
    for (int64_t s = begin; s < end; s += adjacent, to += adjacent * p.dim, from += adjacent * p.prompts.stride)
      copy_row(to, from, adjacent * p.dim, streaming);
    // A streamed prompt has left the cache and would have to be read back from memory.
    if (!streaming && end - begin == segment.prompt_length)
      finished = {segment.prompt_row, segment.prompt_length, segment.slot + begin};
  }

  // Writes a segment's tokens from rank `first` on. Row `first_row` of the update belongs to rank 0 (-1: no update);
  // `scaled` is scratch for one vector.
  void write_text(int64_t slot, const std::vector<int64_t>& sources, int64_t first_row, int64_t first,
                  W* scaled) const {
    const size_t count = sources.size();
    const W* update = nullptr;  // of rank `first`
    if (first_row >= 0) update = row_at<W>(p.token_update, first_row + first);
    const int64_t updated = update == nullptr ? 0 : p.update_length - first;  // tokens from `first` that have one
    for (size_t i = 0; i < count; ++i, ++slot) {
      if (i + kAhead < count && sources[i + kAhead] >= 0)
        prefetch(token_at(sources[i + kAhead]), p.dim * static_cast<int64_t>(sizeof(E)));
      if (sources[i] < 0) {
        write_zeros(slot, slot + 1);
      } else if (static_cast<int64_t>(i) < updated) {
        convert_updated_row(output_at(slot), token_at(sources[i]),
                            update + static_cast<int64_t>(i) * p.token_update.stride, scaled, p.dim,
                            static_cast<W>(p.scale));
      } else if (p.scale == 1.0) {
        copy_row(output_at(slot), token_at(sources[i]), p.dim, streaming);
      } else {
        convert_row(output_at(slot), token_at(sources[i]), p.dim, static_cast<wide_t<E>>(p.scale));
      }
    }
  }

  void write_visibility(int64_t slot, Range keys) const {
    if (p.mask_format == MaskFormat::four_d_bool) {
      fill_visibility(static_cast<uint8_t*>(p.mask_out) + slot * p.width, p.width, keys, uint8_t{0}, uint8_t{1});
    } else {
      fill_visibility(static_cast<E*>(p.mask_out) + slot * p.width, p.width, keys, lowest<E>(), E{});
    }
  }

  const AssembleParams& p;
  const bool streaming, four_d;
};

template <class E, class P>
void assemble_as(const AssembleParams& p) {
  const Writer<E, P> writer(p);
  prepare_output(p.inputs_embeds, p.slots * p.dim * static_cast<int64_t>(sizeof(E)));
  if (p.slots == 0) return writer.write(0, 0, true);
  at::parallel_for(0, p.slots, grain(writer.slot_bytes()),
                   [&](int64_t first, int64_t last) { writer.write(first, last, last == p.slots); });
}

// Adds rows one after the other, in one pass over the sum, so that the loads of all rows overlap.
template <class W, class... G>
void add_rows(W* sum, int64_t dim, const G*... rows) {
  for (int64_t d = 0; d < dim; ++d) sum[d] = (sum[d] + ... + static_cast<W>(widen(rows[d])));
}

}  // namespace

void assemble(const AssembleParams& p) {
  dispatch(p.embedding.type, [&](auto embedding) {
    using E = typename decltype(embedding)::type;
    if (p.prompts.type == p.embedding.type) {
      assemble_as<E, E>(p);
    } else {
      assemble_as<E, float>(p);
    }
  });
}

void prompt_backward(const PromptBackwardParams& p) {
  dispatch(p.grad.type, [&](auto grad_type) {
    dispatch(p.grad_prompts.type, [&](auto prompt_type) {
      using G = typename decltype(grad_type)::type;
      using P = typename decltype(prompt_type)::type;
      using W = wide_t<P>;
      // A row's share of the uses, if they were spread evenly.
      const int64_t share = p.uses / std::max<int64_t>(1, p.prompt_count) + 1;
      const int64_t bytes = p.dim * static_cast<int64_t>(sizeof(G)) * share;
      at::parallel_for(0, p.grad_prompts.count, grain(bytes), [&](int64_t first, int64_t last) {
        std::vector<W> sum(static_cast<size_t>(p.dim));
        for (int64_t row = first; row < last; ++row) {
          const int64_t id = prompt_holding(p, row), begin = id < 0 ? 0 : integer_at(p.prompt_offsets, id);
          const Range uses = uses_of(p, id);
          std::fill(sum.begin(), sum.end(), W(0));
          const G* terms[4];
          int held = 0;
          for (int64_t use = uses.first; use < uses.last; ++use) {
            const int64_t from = gradient_row(p, use, row - begin);
            if (from < 0) continue;
            terms[held++] = row_at<G>(p.grad, from);
            if (held < 4) continue;
            add_rows(sum.data(), p.dim, terms[0], terms[1], terms[2], terms[3]);
            held = 0;
          }
          for (int i = 0; i < held; ++i) add_rows(sum.data(), p.dim, terms[i]);
          P* out = row_at<P>(p.grad_prompts, row);
          for (int64_t d = 0; d < p.dim; ++d) out[d] = Narrow<P>::from(sum[static_cast<size_t>(d)]);
        }
      });
    });
  });
}

void embedding_backward(const EmbeddingBackwardParams& p) {
  dispatch_pair(p.grad.type, p.grad_embedding.type, [&](auto grad_type, auto type) {
    using G = typename decltype(grad_type)::type;
    using E = typename decltype(type)::type;
    using W = wide_t<E>;
    const int64_t bytes = p.dim * static_cast<int64_t>(sizeof(G));
    at::parallel_for(0, p.tokens, grain(bytes), [&](int64_t first, int64_t last) {
      std::vector<W> sum(static_cast<size_t>(p.dim));
      for (int64_t i = first; i < last; ++i) {
        const int64_t id = p.sorted_ids[i];
        // A run of equal ids belongs to the thread that meets its first one.
        if (id < 0 || id >= p.grad_embedding.count || (i > 0 && p.sorted_ids[i - 1] == id)) continue;
        std::fill(sum.begin(), sum.end(), W(0));
        for (int64_t j = i; j < p.tokens && p.sorted_ids[j] == id; ++j) {
          const int64_t slot = p.sorted_slots[j];
          if (slot < 0 || slot >= p.grad.count) continue;
          const G* grad = row_at<G>(p.grad, slot);
          for (int64_t d = 0; d < p.dim; ++d) sum[static_cast<size_t>(d)] += static_cast<W>(widen(grad[d]));
        }
        E* out = row_at<E>(p.grad_embedding, id);
        for (int64_t d = 0; d < p.dim; ++d)
          out[d] = Narrow<E>::from(sum[static_cast<size_t>(d)] * static_cast<W>(p.scale));
      }
    });
  });
}

}  // namespace softprompt_fast::cpu
