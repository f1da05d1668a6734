// The CUDA kernels and how they are launched. No torch header and no CUDA runtime call: nvcc compiles this file on
// any machine, and the tests run the same thread code on a CPU with `tests/csrc/cuda_on_cpu.h` in place of a GPU.
#pragma once

#include <type_traits>

#include "../dtypes.h"

namespace softprompt_fast::cuda {

constexpr int kMaxThreads = 256;
constexpr int kMinBlocks = 3;                  // per multiprocessor: enough accesses under way to keep the memory busy
constexpr int kMinTile = 16, kMaxTile = 1024;  // output slots per block
constexpr int64_t kAccessBytes = 16;

struct Launch {
  int64_t blocks;
  int threads;
  int tile;
  int elements;  // of a vector row, moved by a thread in one access
};

// How many elements of size `bytes` a thread may move in one aligned access, in every row of these matrices.
template <class... Matrices>
int aligned_elements(int64_t bytes, int64_t dim, const Matrices&... matrices) {
  int64_t elements = kAccessBytes / bytes;
  const auto fits = [&](const auto& matrix) {
    const int64_t size = size_of(matrix.type);
    const int64_t access = elements * size < kAccessBytes ? elements * size : kAccessBytes;
    return matrix.data == nullptr || matrix.count == 0 ||
           (reinterpret_cast<uintptr_t>(matrix.data) % static_cast<uintptr_t>(access) == 0 &&
            matrix.stride * size % access == 0);
  };
  while (elements > 1 && !(dim % elements == 0 && (fits(matrices) && ...))) elements /= 2;
  return static_cast<int>(elements);
}

inline Launch plan_assemble(const AssembleParams& p, int max_threads = kMaxThreads) {
  const int64_t size = size_of(p.embedding.type);
  const MatrixRef<void> out{p.inputs_embeds, p.embedding.type, p.slots, p.dim};
  Launch launch;
  launch.elements = aligned_elements(size, p.dim, out, p.embedding, p.prompts, p.token_update);
  launch.threads = max_threads;
  // Every block counts its row's real tokens: a tile writes several times what its block reads for that.
  const int64_t scan = p.attention_mask.data == nullptr ? 0 : 4 * p.tokens * p.attention_mask.bytes;
  const int64_t slot_bytes = p.dim * size > 0 ? p.dim * size : 1;
  int64_t tile = kMinTile;
  while (tile < kMaxTile && tile * slot_bytes < scan) tile *= 2;
  launch.tile = static_cast<int>(tile);
  const int64_t tiles = p.width > 0 ? (p.width + tile - 1) / tile : 1;
  launch.blocks = p.segments * tiles;
  return launch;
}

template <class T, int N>
struct alignas(sizeof(T) * N < kAccessBytes ? sizeof(T) * N : kAccessBytes) Pack {
  T at[N];
};

template <class Out, class In, int N>
SPF_HOST_DEVICE void move(Out* out, const In* in, wide_t<Out> scale) {
  const Pack<In, N> from = *reinterpret_cast<const Pack<In, N>*>(in);
  Pack<Out, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.at[i] = Narrow<Out>::from(static_cast<wide_t<Out>>(widen(from.at[i])) * scale);
  *reinterpret_cast<Pack<Out, N>*>(out) = to;
}

// a * b, rounded: never fused with the sum that follows, because the twin rounds twice.
SPF_HOST_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}
SPF_HOST_DEVICE double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  volatile double product = a * b;
  return product;
#endif
}

template <class T, int N>
SPF_HOST_DEVICE void move_updated(T* out, const T* in, const wide_t<T>* update, wide_t<T> scale) {
  const Pack<T, N> from = *reinterpret_cast<const Pack<T, N>*>(in);
  const Pack<wide_t<T>, N> added = *reinterpret_cast<const Pack<wide_t<T>, N>*>(update);
  Pack<T, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.at[i] = Narrow<T>::from(rounded_product(widen(from.at[i]), scale) + added.at[i]);
  *reinterpret_cast<Pack<T, N>*>(out) = to;
}

template <class T, int N>
SPF_HOST_DEVICE void move(T* out, const T* in) {
  *reinterpret_cast<Pack<T, N>*>(out) = *reinterpret_cast<const Pack<T, N>*>(in);
}

// Rows [first, first + count) of a row's 4-D mask: one run of adjacent elements, written 16 bytes at a time.
template <class T>
__device__ void fill_visibility(const AssembleParams& p, const Layout& layout, int64_t first_slot, int64_t first,
                                int64_t count, T hidden, T seen) {
  constexpr int64_t kPack = kAccessBytes / static_cast<int64_t>(sizeof(T));
  T* out = static_cast<T*>(p.mask_out) + (first_slot + first) * p.width;
  const int64_t total = count * p.width;
  int64_t head = static_cast<int64_t>((0 - reinterpret_cast<uintptr_t>(out)) % kAccessBytes / sizeof(T));
  if (head > total || p.width < kPack) head = total;
  const int64_t packs = (total - head) / kPack, tail = head + packs * kPack;
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    const int64_t at = head + i * kPack, q = first + at / p.width;
    const int key = static_cast<int>(at % p.width), left = static_cast<int>(p.width) - key;  // in this row of the mask
    const Range these = visible_keys(p, layout, q), next = visible_keys(p, layout, q + 1);
    const int shown = static_cast<int>(these.first) - key, ends = static_cast<int>(these.last) - key;
    const int next_shown = static_cast<int>(next.first) + left, next_ends = static_cast<int>(next.last) + left;
    Pack<T, kPack> pack;
#pragma unroll
    for (int j = 0; j < static_cast<int>(kPack); ++j)
      pack.at[j] = (j < left ? j >= shown && j < ends : j >= next_shown && j < next_ends) ? seen : hidden;
    *reinterpret_cast<Pack<T, kPack>*>(out + at) = pack;
  }
  for (int64_t i = threadIdx.x; i < head + (total - tail); i += blockDim.x) {
    const int64_t at = i < head ? i : tail + i - head;
    const Range keys = visible_keys(p, layout, first + at / p.width);
    out[at] = at % p.width >= keys.first && at % p.width < keys.last ? seen : hidden;
  }
}

// One block writes `tile` output slots of one segment: vectors, positions, labels, masks.
template <class E, class P, int N>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) assemble_kernel(AssembleParams p, int tile) {
  __shared__ int64_t counts[kMaxThreads + 1];
  __shared__ int64_t columns[kMaxTile];
  __shared__ int64_t sources[kMaxTile];
  __shared__ int64_t update;  // row of token_update for the text's first token, -1: none

  const int64_t tiles = p.width > 0 ? (p.width + tile - 1) / tile : 1;
  const int64_t index = static_cast<int64_t>(blockIdx.x) / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x) % tiles * tile;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  Segment segment = segment_at(p, index);
  if (first > 0 && first >= segment.length) return;

  // Each thread counts the real tokens of one stretch of the row; their running sum ranks them.
  const int64_t tokens = segment.text_row < 0 ? 0 : p.tokens;
  const int64_t stretch = (tokens + threads - 1) / threads;
  const int64_t from = thread * stretch < tokens ? thread * stretch : tokens;
  const int64_t to = from + stretch < tokens ? from + stretch : tokens;
  int64_t count = 0;
  for (int64_t t = from; t < to; ++t) count += is_real(p, segment.text_row, t) ? 1 : 0;
  counts[thread] = count;
  if (thread == 0 && p.token_update.data != nullptr) update = first_update(p, index);
  __syncthreads();
  if (thread == 0) {
    int64_t sum = 0;
    for (int i = 0; i < threads; ++i) {
      const int64_t mine = counts[i];
      counts[i] = sum;
      sum += mine;
    }
    counts[threads] = sum;
  }
  __syncthreads();
  const Layout layout = fit_segment(p, segment, counts[threads]);
  const int64_t slots = segment.length - first < tile ? segment.length - first : tile;

  // Tokens whose slot is in this tile leave their column there.
  const int64_t first_rank = first - layout.begin - segment.prompt_length;
  int64_t rank = counts[thread];
  for (int64_t t = from; t < to; ++t) {
    const bool real = is_real(p, segment.text_row, t) && rank < layout.text;
    if (real && rank >= first_rank && rank < first_rank + slots) columns[rank - first_rank] = t;
    if (!real && first == 0) p.token_slots[segment.text_row * p.tokens + t] = -1;
    if (is_real(p, segment.text_row, t)) ++rank;
  }
  if (thread == 0 && first == 0) fill_prompt_slot(p, segment, layout);
  __syncthreads();
  for (int64_t i = thread; i < slots; i += threads)
    sources[i] = fill_slot(p, segment, layout, first + i, text_rank(segment, layout, first + i) < 0 ? -1 : columns[i]);
  __syncthreads();

  E* out = static_cast<E*>(p.inputs_embeds) + (segment.slot + first) * p.dim;
  const uint32_t packs = static_cast<uint32_t>(p.dim / N);
  const wide_t<E> scale = static_cast<wide_t<E>>(p.scale);
  const bool scaled = p.scale != 1.0;
  for (uint32_t i = static_cast<uint32_t>(thread); i < static_cast<uint32_t>(slots) * packs;
       i += static_cast<uint32_t>(threads)) {
    const uint32_t s = i / packs;
    const int64_t d = static_cast<int64_t>(i - s * packs) * N, source = sources[s];
    E* write = out + s * p.dim + d;
    if (source >= 0) {
      const E* read = row_at<E>(p.embedding, source) + d;
      const int64_t rank = first_rank + s;
      if (p.token_update.data != nullptr && update >= 0 && rank < p.update_length) {
        const wide_t<E>* add = static_cast<const wide_t<E>*>(p.token_update.data) + (update + rank) * p.dim + d;
        move_updated<E, N>(write, read, add, scale);
      } else if (scaled) {
        move<E, E, N>(write, read, scale);
      } else {
        move<E, N>(write, read);
      }
    } else if (source == kPadding) {
      *reinterpret_cast<Pack<E, N>*>(write) = Pack<E, N>{};
    } else {
      const P* read = row_at<P>(p.prompts, decode_prompt_row(source)) + d;
      move<E, P, N>(write, read, wide_t<E>(1));
    }
  }

  if (p.mask_format == MaskFormat::four_d_bool)
    fill_visibility<uint8_t>(p, layout, segment.slot, first, slots, uint8_t{0}, uint8_t{1});
  if (p.mask_format == MaskFormat::four_d_additive)
    fill_visibility<E>(p, layout, segment.slot, first, slots, lowest<E>(), E{});
}

inline Launch plan_prompt_backward(const PromptBackwardParams& p, int max_threads = kMaxThreads) {
  Launch launch;
  launch.elements = aligned_elements(size_of(p.grad.type), p.dim, p.grad, p.grad_prompts);
  launch.threads = max_threads;
  launch.tile = 1;
  launch.blocks = p.grad_prompts.count * ((p.dim / launch.elements + launch.threads - 1) / launch.threads);
  return launch;
}

// One thread sums a few elements of one prompt row over the rows that used it, in ascending order: no atomics, so
// the same bits on every run.
template <class G, class P, int N>
__global__ void __launch_bounds__(kMaxThreads) prompt_backward_kernel(PromptBackwardParams p) {
  const int64_t packs = p.dim / N, chunks = (packs + blockDim.x - 1) / blockDim.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) / chunks;
  const int64_t d = (static_cast<int64_t>(blockIdx.x) % chunks * blockDim.x + threadIdx.x) * N;
  if (d >= p.dim) return;
  int64_t id = 0, high = p.prompt_count;  // the last prompt that starts at or before this row
  while (id < high) {
    const int64_t middle = (id + high) / 2;
    if (p.prompt_offsets[middle + 1] <= row) {
      id = middle + 1;
    } else {
      high = middle;
    }
  }
  using W = wide_t<P>;
  W sum[N] = {};
  for (int64_t use = 0; use < p.uses; ++use) {
    if ((p.use_ids == nullptr ? 0 : p.use_ids[use]) != id || p.slots[use] < 0 || id >= p.prompt_count) continue;
    const int64_t slot = p.slots[use] + row - p.prompt_offsets[id];
    const Pack<G, N> grad = *reinterpret_cast<const Pack<G, N>*>(row_at<G>(p.grad, slot) + d);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += static_cast<W>(widen(grad.at[i]));
  }
  Pack<P, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.at[i] = Narrow<P>::from(sum[i]);
  P* out = row_at<P>(p.grad_prompts, row) + d;
  *reinterpret_cast<Pack<P, N>*>(out) = result;
}

inline Launch plan_embedding_backward(const EmbeddingBackwardParams& p, int max_threads = kMaxThreads) {
  return {p.tokens, max_threads, 1, 1};
}

// One block per run of equal ids, found by its first entry.
template <class G, class E>
__global__ void __launch_bounds__(kMaxThreads) embedding_backward_kernel(EmbeddingBackwardParams p) {
  const int64_t first = blockIdx.x, id = p.sorted_ids[first];
  if (id < 0 || id >= p.grad_embedding.count || (first > 0 && p.sorted_ids[first - 1] == id)) return;
  using W = wide_t<E>;
  E* out = row_at<E>(p.grad_embedding, id);
  for (int64_t d = threadIdx.x; d < p.dim; d += blockDim.x) {
    W sum = 0;
    for (int64_t i = first; i < p.tokens && p.sorted_ids[i] == id; ++i)
      sum += static_cast<W>(widen(row_at<G>(p.grad, p.sorted_slots[i])[d]));
    out[d] = Narrow<E>::from(sum * static_cast<W>(p.scale));
  }
}

// How many elements a thread may move in one aligned access, in every vector of these tensors.
inline int aligned_elements(const PackingParams& p) {
  int elements = 8;
  const auto fits = [&](const auto& x) {
    const int64_t access = elements * size_of(x.type) < kAccessBytes ? elements * size_of(x.type) : kAccessBytes;
    const int64_t strides = x.row_stride | x.slot_stride | x.head_stride;  // powers of two divide all or none
    return x.size % elements == 0 && reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(access) == 0 &&
           strides * size_of(x.type) % access == 0;
  };
  for (int i = 0; i < p.tensors; ++i)
    while (elements > 1 && !(fits(p.from[i]) && fits(p.to[i]))) elements /= 2;
  return elements;
}

inline Launch plan_packing(const PackingParams& p, int64_t vectors, int max_threads = kMaxThreads) {
  return {vectors * p.tensors, max_threads < 128 ? max_threads : 128, 1, aligned_elements(p)};
}

// One block writes all heads of one place of one row of one tensor.
template <class In, class Out, int N>
__global__ void __launch_bounds__(kMaxThreads) unpack_kernel(PackingParams p) {
  const int64_t block = blockIdx.x, places = p.rows * p.width;
  const int64_t row = block % places / p.width, place = block % places % p.width;
  const HeadsRef<const void> from = p.from[block / places];
  const HeadsRef<void> to = p.to[block / places];
  const int64_t slot = slot_at(p.table + row * kTableColumns, place);
  const bool held = slot >= 0 && slot < p.slots;
  const int64_t packs = from.size / N;
  for (int64_t i = threadIdx.x; i < from.heads * packs; i += blockDim.x) {
    const int64_t head = i / packs, e = i % packs * N;
    Out* out = vector_at<Out>(to, row, place, head) + e;
    if (held) {
      move<Out, In, N>(out, vector_at<In>(from, 0, slot, head) + e, wide_t<Out>(1));
    } else {
      *reinterpret_cast<Pack<Out, N>*>(out) = Pack<Out, N>{};
    }
  }
}

// One block writes all heads of one slot of one tensor: the sum over the rows that hold it, in ascending order.
template <class In, class Out, int N>
__global__ void __launch_bounds__(kMaxThreads) pack_kernel(PackingParams p) {
  const int64_t block = blockIdx.x, slot = block % p.slots;
  const HeadsRef<const void> from = p.from[block / p.slots];
  const HeadsRef<void> to = p.to[block / p.slots];
  const int64_t packs = from.size / N;
  for (int64_t i = threadIdx.x; i < from.heads * packs; i += blockDim.x) {
    const int64_t head = i / packs, e = i % packs * N;
    wide_t<Out> sum[N] = {};
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t place = place_of(p.table + row * kTableColumns, slot);
      if (place < 0 || place >= p.width) continue;
      const Pack<In, N> term = *reinterpret_cast<const Pack<In, N>*>(vector_at<In>(from, row, place, head) + e);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += static_cast<wide_t<Out>>(widen(term.at[j]));
    }
    Pack<Out, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.at[j] = Narrow<Out>::from(sum[j]);
    *reinterpret_cast<Pack<Out, N>*>(vector_at<Out>(to, 0, slot, head) + e) = result;
  }
}

// --- Choosing an instantiation. `Go::run(kernel, launch, arguments...)` launches it or, in the tests, plays it. ---

template <class F>
void with_elements(int elements, F&& f) {
  switch (elements) {
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    default:
      return f(std::integral_constant<int, 1>{});
  }
}

template <class E>
constexpr bool too_wide(int elements) {
  return elements * static_cast<int64_t>(sizeof(E)) > kAccessBytes;
}

template <class Go>
void run_assemble(const AssembleParams& p, const Go& go) {
  const Launch launch = plan_assemble(p, go.max_threads());
  if (launch.blocks == 0) return;
  dispatch(p.embedding.type, [&](auto embedding) {
    using E = typename decltype(embedding)::type;
    with_elements(launch.elements, [&](auto elements) {
      constexpr int N = decltype(elements)::value;
      if constexpr (!too_wide<E>(N)) {
        if (p.prompts.type == p.embedding.type) {
          go.run(assemble_kernel<E, E, N>, launch, p, launch.tile);
        } else {
          go.run(assemble_kernel<E, float, N>, launch, p, launch.tile);
        }
      }
    });
  });
}

template <class Go>
void run_prompt_backward(const PromptBackwardParams& p, const Go& go) {
  const Launch launch = plan_prompt_backward(p, go.max_threads());
  if (launch.blocks == 0) return;
  dispatch(p.grad.type, [&](auto grad) {
    using G = typename decltype(grad)::type;
    with_elements(launch.elements, [&](auto elements) {
      constexpr int N = decltype(elements)::value;
      if constexpr (!too_wide<G>(N)) {
        if (p.grad_prompts.type == p.grad.type) {
          go.run(prompt_backward_kernel<G, G, N>, launch, p);
        } else {
          go.run(prompt_backward_kernel<G, float, N>, launch, p);
        }
      }
    });
  });
}

template <class Go>
void run_unpack(const PackingParams& p, const Go& go) {
  const Launch launch = plan_packing(p, p.rows * p.width, go.max_threads());
  if (launch.blocks == 0) return;
  dispatch_pair(p.from[0].type, p.to[0].type, [&](auto in, auto out) {
    with_elements(launch.elements, [&](auto elements) {
      go.run(unpack_kernel<typename decltype(in)::type, typename decltype(out)::type, decltype(elements)::value>,
             launch, p);
    });
  });
}

template <class Go>
void run_pack(const PackingParams& p, const Go& go) {
  const Launch launch = plan_packing(p, p.slots, go.max_threads());
  if (launch.blocks == 0) return;
  dispatch_pair(p.from[0].type, p.to[0].type, [&](auto in, auto out) {
    with_elements(launch.elements, [&](auto elements) {
      go.run(pack_kernel<typename decltype(in)::type, typename decltype(out)::type, decltype(elements)::value>, launch,
             p);
    });
  });
}

template <class Go>
void run_embedding_backward(const EmbeddingBackwardParams& p, const Go& go) {
  const Launch launch = plan_embedding_backward(p, go.max_threads());
  if (launch.blocks == 0) return;
  dispatch_pair(p.grad.type, p.grad_embedding.type, [&](auto grad, auto type) {
    go.run(embedding_backward_kernel<typename decltype(grad)::type, typename decltype(type)::type>, launch, p);
  });
}

}  // namespace softprompt_fast::cuda
