#include "kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#include "memory.h"

namespace softprompt_fast::cpu {
namespace {

// Work below this many bytes is not worth waking a second thread for.
constexpr int64_t kBytesPerTask = 64 * 1024;

int64_t grain(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_item));
}

template <class Out, class In>
void convert_row(Out* out, const In* in, int64_t dim, wide_t<Out> scale) {
  for (int64_t d = 0; d < dim; ++d) out[d] = Narrow<Out>::from(static_cast<wide_t<Out>>(widen(in[d])) * scale);
}

template <class Out, class In>
void copy_row(Out* out, const In* in, int64_t dim, bool streaming) {
  if constexpr (std::is_same_v<Out, In>) {
    copy_bytes(out, in, dim * static_cast<int64_t>(sizeof(Out)), streaming);
  } else {
    convert_row(out, in, dim, wide_t<Out>(1));
  }
}

// Fills everything but vectors and 4-D masks for one segment, and `sources` for the vectors.
void resolve_segment(const AssembleParams& p, int64_t index, std::vector<int64_t>& columns, int64_t* sources,
                     Layout* layouts) {
  Segment segment = segment_at(p, index);
  columns.clear();
  if (segment.text_row >= 0) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      if (is_real(p, segment.text_row, t)) {
        columns.push_back(t);
      } else {
        p.token_slots[segment.text_row * p.tokens + t] = -1;
      }
    }
  }
  const Layout layout = layout_of(p, segment, static_cast<int64_t>(columns.size()));
  for (size_t rank = static_cast<size_t>(layout.text); rank < columns.size(); ++rank)
    p.token_slots[segment.text_row * p.tokens + columns[rank]] = -1;
  fill_prompt_slot(p, segment, layout);
  for (int64_t s = 0; s < segment.length; ++s) {
    const int64_t rank = text_rank(segment, layout, s);
    sources[segment.slot + s] = fill_slot(p, segment, layout, s, rank < 0 ? -1 : columns[static_cast<size_t>(rank)]);
  }
  if (layouts != nullptr) layouts[index] = layout;
}

template <class T>
void fill_visibility(T* out, int64_t width, Range keys, T hidden, T seen) {
  std::fill(out, out + keys.first, hidden);
  std::fill(out + keys.first, out + keys.last, seen);
  std::fill(out + keys.last, out + width, hidden);
}

template <class E, class P>
void write_slots(const AssembleParams& p, const int64_t* sources, const Layout* layouts) {
  E* out = static_cast<E*>(p.inputs_embeds);
  const E* embedding = static_cast<const E*>(p.embedding.data);
  const P* prompts = static_cast<const P*>(p.prompts.data);
  const bool streaming = prefer_streaming(p.slots * p.dim * static_cast<int64_t>(sizeof(E)));
  const wide_t<E> scale = static_cast<wide_t<E>>(p.scale);
  const bool four_d = p.mask_format == MaskFormat::four_d_bool || p.mask_format == MaskFormat::four_d_additive;
  const int64_t bytes = p.dim * static_cast<int64_t>(sizeof(E)) + (four_d ? p.width : 0);
  at::parallel_for(0, p.slots, grain(bytes), [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) {
      E* to = out + slot * p.dim;
      const int64_t source = sources[slot];
      if (source >= 0) {
        const E* from = embedding + source * p.embedding.stride;
        if (p.scale == 1.0) {
          copy_row(to, from, p.dim, streaming);
        } else {
          convert_row(to, from, p.dim, scale);
        }
      } else if (source == kPadding) {
        std::fill(to, to + p.dim, E{});
      } else {
        copy_row(to, prompts + decode_prompt_row(source) * p.prompts.stride, p.dim, streaming);
      }
      if (four_d) {
        const Range keys = visible_keys(p, layouts[slot / p.width], slot % p.width);
        if (p.mask_format == MaskFormat::four_d_bool) {
          fill_visibility(static_cast<uint8_t*>(p.mask_out) + slot * p.width, p.width, keys, uint8_t{0}, uint8_t{1});
        } else {
          fill_visibility(static_cast<E*>(p.mask_out) + slot * p.width, p.width, keys, lowest<E>(), E{});
        }
      }
    }
    if (streaming) finish_streaming();
  });
}

}  // namespace

void assemble(const AssembleParams& p) {
  const std::unique_ptr<int64_t[]> sources(new int64_t[static_cast<size_t>(p.slots)]);
  std::vector<Layout> layouts;
  if (p.mask_format == MaskFormat::four_d_bool || p.mask_format == MaskFormat::four_d_additive)
    layouts.resize(static_cast<size_t>(p.segments));
  at::parallel_for(0, p.segments, grain(32 * (p.tokens + p.width)), [&](int64_t first, int64_t last) {
    std::vector<int64_t> columns;
    columns.reserve(static_cast<size_t>(p.tokens));
    for (int64_t index = first; index < last; ++index)
      resolve_segment(p, index, columns, sources.get(), layouts.empty() ? nullptr : layouts.data());
  });
  prepare_output(p.inputs_embeds, p.slots * p.dim * size_of(p.embedding.type));
  dispatch(p.embedding.type, [&](auto embedding) {
    using E = typename decltype(embedding)::type;
    if (p.prompts.type == p.embedding.type) {
      write_slots<E, E>(p, sources.get(), layouts.data());
    } else {
      write_slots<E, float>(p, sources.get(), layouts.data());
    }
  });
}

void prompt_backward(const PromptBackwardParams& p) {
  // Uses of each prompt in ascending rows: the order in which gradients are summed, whatever the threads.
  std::vector<std::vector<int64_t>> slots(static_cast<size_t>(p.prompt_count));
  for (int64_t use = 0; use < p.uses; ++use) {
    const int64_t id = p.use_ids == nullptr ? 0 : p.use_ids[use];
    if (p.slots[use] >= 0 && id >= 0 && id < p.prompt_count) slots[static_cast<size_t>(id)].push_back(p.slots[use]);
  }
  dispatch(p.grad.type, [&](auto grad_type) {
    dispatch(p.grad_prompts.type, [&](auto prompt_type) {
      using G = typename decltype(grad_type)::type;
      using P = typename decltype(prompt_type)::type;
      using W = wide_t<P>;
      const int64_t bytes = p.dim * static_cast<int64_t>(sizeof(G)) * std::max<int64_t>(1, p.uses);
      at::parallel_for(0, p.grad_prompts.count, grain(bytes), [&](int64_t first, int64_t last) {
        std::vector<W> sum(static_cast<size_t>(p.dim));
        for (int64_t row = first; row < last; ++row) {
          const int64_t* end = p.prompt_offsets + p.prompt_count + 1;
          const int64_t id = std::upper_bound(p.prompt_offsets, end, row) - p.prompt_offsets - 1;
          std::fill(sum.begin(), sum.end(), W(0));
          if (id >= 0 && id < p.prompt_count) {
            for (const int64_t slot : slots[static_cast<size_t>(id)]) {
              const G* grad = static_cast<const G*>(p.grad.data) + (slot + row - p.prompt_offsets[id]) * p.grad.stride;
              for (int64_t d = 0; d < p.dim; ++d) sum[static_cast<size_t>(d)] += static_cast<W>(widen(grad[d]));
            }
          }
          P* out = const_cast<P*>(static_cast<const P*>(p.grad_prompts.data)) + row * p.grad_prompts.stride;
          for (int64_t d = 0; d < p.dim; ++d) out[d] = Narrow<P>::from(sum[static_cast<size_t>(d)]);
        }
      });
    });
  });
}

void embedding_backward(const EmbeddingBackwardParams& p) {
  dispatch(p.grad.type, [&](auto type) {
    using E = typename decltype(type)::type;
    using W = wide_t<E>;
    const int64_t bytes = p.dim * static_cast<int64_t>(sizeof(E));
    at::parallel_for(0, p.tokens, grain(bytes), [&](int64_t first, int64_t last) {
      std::vector<W> sum(static_cast<size_t>(p.dim));
      for (int64_t i = first; i < last; ++i) {
        const int64_t id = p.sorted_ids[i];
        // A run of equal ids belongs to the thread that meets its first one.
        if (id < 0 || id >= p.grad_embedding.count || (i > 0 && p.sorted_ids[i - 1] == id)) continue;
        std::fill(sum.begin(), sum.end(), W(0));
        for (int64_t j = i; j < p.tokens && p.sorted_ids[j] == id; ++j) {
          const E* grad = static_cast<const E*>(p.grad.data) + p.sorted_slots[j] * p.grad.stride;
          for (int64_t d = 0; d < p.dim; ++d) sum[static_cast<size_t>(d)] += static_cast<W>(widen(grad[d]));
        }
        E* out = const_cast<E*>(static_cast<const E*>(p.grad_embedding.data)) + id * p.grad_embedding.stride;
        for (int64_t d = 0; d < p.dim; ++d)
          out[d] = Narrow<E>::from(sum[static_cast<size_t>(d)] * static_cast<W>(p.scale));
      }
    });
  });
}

}  // namespace softprompt_fast::cpu
