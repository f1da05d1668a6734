// The CUDA kernel of `assemble`.
#pragma once

#include "access.cuh"

namespace softprompt_fast::cuda {

constexpr int kMinBlocks = 3;                  // per multiprocessor: enough accesses under way to keep the memory busy
constexpr int kMinTile = 16, kMaxTile = 1024;  // output slots per block
constexpr int kGroups = 16;                    // of threads, in the running sum of tokens

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
    store<T, static_cast<int>(kPack)>(out + at, pack);
  }
  for (int64_t i = threadIdx.x; i < head + (total - tail); i += blockDim.x) {
    const int64_t at = i < head ? i : tail + i - head;
    const Range keys = visible_keys(p, layout, first + at / p.width);
    out[at] = at % p.width >= keys.first && at % p.width < keys.last ? seen : hidden;
  }
}

// The part of a vector that one thread of a warp copies.
template <class T, int N>
__device__ void copy_vector(T* out, const T* in, int packs, int lane) {
  for (int first = lane; first < packs; first += kLanes * kFlight) {
    Pack<T, N> held[kFlight];
#pragma unroll
    for (int k = 0; k < kFlight; ++k)
      if (first + k * kLanes < packs) held[k] = load<T, N>(in + (first + k * kLanes) * N);
#pragma unroll
    for (int k = 0; k < kFlight; ++k)
      if (first + k * kLanes < packs) store<T, N>(out + (first + k * kLanes) * N, held[k]);
  }
}

// One block writes `tile` output slots of one segment: vectors, positions, labels, masks.
template <class E, class P, int N>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) assemble_kernel(AssembleParams p, int tile) {
  __shared__ int64_t counts[kMaxThreads];
  __shared__ int64_t group_counts[kGroups];
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
  if (p.attention_mask.data == nullptr) {
    count = to - from;
  } else {
    for (int64_t t = from; t < to; ++t) count += is_real(p, segment.text_row, t) ? 1 : 0;
  }
  counts[thread] = count;
  if (thread == 0 && p.token_update.data != nullptr) update = first_update(p, index);
  __syncthreads();
  // The running sum, of each group of threads by a thread of its own and then of the groups.
  const int group = (threads + kGroups - 1) / kGroups;
  if (thread < kGroups) {
    int64_t sum = 0;
    for (int i = thread * group; i < (thread + 1) * group && i < threads; ++i) {
      const int64_t mine = counts[i];
      counts[i] = sum;
      sum += mine;
    }
    group_counts[thread] = sum;
  }
  __syncthreads();
  int64_t before = 0, all = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (g < thread / group) before += group_counts[g];
    all += group_counts[g];
  }
  const Layout layout = fit_segment(p, segment, all);
  const int64_t slots = segment.length - first < tile ? segment.length - first : tile;

  // Tokens whose slot is in this tile leave their column there.
  const int64_t first_rank = first - layout.begin - segment.prompt_length;
  int64_t rank = before + counts[thread];
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
  const int packs = static_cast<int>(p.dim / N), lane = thread % kLanes, warps = threads / kLanes;
  const wide_t<E> scale = static_cast<wide_t<E>>(p.scale);
  for (int64_t s = thread / kLanes; s < slots; s += warps) {  // a warp per slot: its lanes take the same branch
    const int64_t source = sources[s], rank = first_rank + s;
    E* write = out + s * p.dim;
    if (source == kPadding) {
      for (int d = lane; d < packs; d += kLanes) store<E, N>(write + d * N, Pack<E, N>{});
    } else if (source < kPadding) {
      const P* read = row_at<P>(p.prompts, decode_prompt_row(source));
      for (int d = lane; d < packs; d += kLanes) move<E, P, N>(write + d * N, read + d * N, wide_t<E>(1));
    } else if (p.token_update.data != nullptr && update >= 0 && rank < p.update_length) {
      const E* read = row_at<E>(p.embedding, source);
      const wide_t<E>* added = row_at<wide_t<E>>(p.token_update, update + rank);
      for (int d = lane; d < packs; d += kLanes) move_updated<E, N>(write + d * N, read + d * N, added + d * N, scale);
    } else if (p.scale != 1.0) {
      const E* read = row_at<E>(p.embedding, source);
      for (int d = lane; d < packs; d += kLanes) move<E, E, N>(write + d * N, read + d * N, scale);
    } else {
      copy_vector<E, N>(write, row_at<E>(p.embedding, source), packs, lane);
    }
  }

  if (p.mask_format == MaskFormat::four_d_bool)
    fill_visibility<uint8_t>(p, layout, segment.slot, first, slots, uint8_t{0}, uint8_t{1});
  if (p.mask_format == MaskFormat::four_d_additive)
    fill_visibility<E>(p, layout, segment.slot, first, slots, lowest<E>(), E{});
}

}  // namespace softprompt_fast::cuda
