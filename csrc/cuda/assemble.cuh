// The CUDA kernel of `assemble`.
#pragma once

#include "access.cuh"

namespace softprompt_fast::cuda {

constexpr int kMaxTile = 1024;  // output slots per block
constexpr int kMaskBits = 64;   // mask values that a thread remembers

// How the slots of a segment and the tokens of a row are shared out: divisions that no thread need repeat.
struct Tiling {
  int tile;         // output slots of a block
  uint32_t tiles;   // blocks of a segment
  int64_t stretch;  // tokens whose mask a thread reads
};

inline Tiling tiling_of(const AssembleParams& p, const Launch& launch) {
  const int64_t tiles = p.width > 0 ? (p.width + launch.tile - 1) / launch.tile : 1;  // a launch has fewer than 2^31
  return {launch.tile, static_cast<uint32_t>(tiles), (p.tokens + launch.threads - 1) / launch.threads};
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
#pragma unroll 1
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
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < head + (total - tail); i += blockDim.x) {
    const int64_t at = i < head ? i : tail + i - head;
    const Range keys = visible_keys(p, layout, first + at / p.width);
    out[at] = at % p.width >= keys.first && at % p.width < keys.last ? seen : hidden;
  }
}

// The part of a vector that one thread of a warp copies, with `convert` from packs to packs.
template <class Out, class In, int N, class Convert>
__device__ void copy_vector(Out* out, const In* in, int packs, int lane, const Convert& convert) {
  constexpr int kHeld =
      sizeof(Pack<In, N>) > kAccessBytes && kFlight > 1 ? kFlight / 2 : kFlight;  // else registers lack
#pragma unroll 1
  for (int first = lane; first < packs; first += kLanes * kHeld) {
    Pack<In, N> held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (first + k * kLanes < packs) held[k] = load<In, N>(in + (first + k * kLanes) * N);
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (first + k * kLanes < packs) store<Out, N>(out + (first + k * kLanes) * N, convert(held[k]));
  }
}

// Mask values of tokens [from, to) of a row, at most kFlight of them, as loads that nothing waits for yet.
__device__ inline void read_mask(const AssembleParams& p, int64_t row, int64_t from, int64_t to,
                                 uint64_t (&values)[kFlight]) {
#pragma unroll
  for (int k = 0; k < kFlight; ++k) values[k] = from + k < to ? read_bits(p.attention_mask, row, from + k) : 0;
}

// The sum of `count` over the threads before this one, and over all.
struct RunningSum {
  int64_t before, all;
};

__device__ inline RunningSum running_sum(int64_t count, int64_t (&warp_counts)[kMaxThreads / kLanes]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  int64_t sum = count;  // of this warp's lanes up to this one
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int64_t lower = __shfl_up_sync(0xffffffffu, sum, static_cast<unsigned>(distance));
    if (lane >= distance) sum += lower;
  }
  if (lane == kLanes - 1) warp_counts[warp] = sum;
  __syncthreads();
  RunningSum result{sum - count, 0};
#pragma unroll
  for (int w = 0; w < kMaxThreads / kLanes; ++w) {
    const int64_t counted = w < warps ? warp_counts[w] : 0;
    if (w < warp) result.before += counted;
    result.all += counted;
  }
  return result;
}

// One block writes `tile` output slots of one segment: vectors, positions, labels, masks.
template <class E, class P, int N>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) assemble_kernel(AssembleParams p, Tiling tiling) {
  __shared__ int64_t warp_counts[kMaxThreads / kLanes];
  __shared__ int64_t columns[kMaxTile];
  __shared__ int64_t sources[kMaxTile];
  __shared__ int64_t update;  // row of token_update for the text's first token, -1: none

  const int tile = tiling.tile;
  const int64_t index = blockIdx.x / tiling.tiles, first = int64_t{tile} * (blockIdx.x % tiling.tiles);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  // Each thread looks at one stretch of the row's mask. Its first values are under way while the segment is found.
  const bool masked = p.attention_mask.data != nullptr;
  const int64_t row = index - p.prompt_segments, tokens = row < 0 ? 0 : p.tokens;
  const int64_t from = thread * tiling.stretch < tokens ? thread * tiling.stretch : tokens;
  const int64_t to = from + tiling.stretch < tokens ? from + tiling.stretch : tokens;
  uint64_t values[kFlight];
  if (masked) read_mask(p, row, from, to, values);
  Segment segment = segment_at(p, index);
  if (first > 0 && first >= segment.length) return;
  if (thread == 0 && p.token_update.data != nullptr) update = first_update(p, index);

  RunningSum sum{0, tokens};
  uint64_t marks = 0;  // which of the stretch's first tokens are real
  int64_t count = 0;
  if (masked) {
#pragma unroll 1
    for (int64_t t = from; t < to; t += kFlight) {
      if (t > from) read_mask(p, row, t, to, values);
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const bool real = values[k] != 0 && values[k] != p.mask_sign;  // 0 behind the stretch
        count += real ? 1 : 0;
        if (real && t + k - from < kMaskBits) marks |= uint64_t{1} << (t + k - from);
      }
    }
    sum = running_sum(count, warp_counts);
  }
  const Layout layout = fit_segment(p, segment, sum.all);
  const int64_t slots = segment.length - first < tile ? segment.length - first : tile;
  const int64_t first_rank = first - layout.begin - segment.prompt_length;

  // Tokens whose slot is in this tile leave their column there. The first tile also marks what has no slot.
  if (masked && (first == 0 || (sum.before < first_rank + slots && sum.before + count > first_rank))) {
    int64_t rank = sum.before;
#pragma unroll 1
    for (int64_t t = from; t < to; ++t) {
      const bool real = t - from < kMaskBits ? (marks >> (t - from) & 1) != 0 : is_real(p, row, t);
      const bool placed = real && rank < layout.text;
      if (placed && rank >= first_rank && rank < first_rank + slots) columns[rank - first_rank] = t;
      if (!placed && first == 0) p.token_slots[row * p.tokens + t] = -1;
      if (real) ++rank;
    }
  }
  if (!masked && first == 0) {
#pragma unroll 1
    for (int64_t t = layout.text + thread; t < tokens; t += threads) p.token_slots[row * p.tokens + t] = -1;
  }
  if (thread == 0 && first == 0) fill_prompt_slot(p, segment, layout);
  if (masked) __syncthreads();
#pragma unroll 1
  for (int64_t i = thread; i < slots; i += threads) {
    const int64_t rank = text_rank(segment, layout, first + i);
    sources[i] = fill_slot(p, segment, layout, first + i, rank < 0 ? -1 : masked ? columns[i] : rank);
  }
  // Before the vectors, so that no register keeps the segment while they are copied.
  if (p.mask_format == MaskFormat::four_d_bool)
    fill_visibility<uint8_t>(p, layout, segment.slot, first, slots, uint8_t{0}, uint8_t{1});
  if (p.mask_format == MaskFormat::four_d_additive)
    fill_visibility<E>(p, layout, segment.slot, first, slots, lowest<E>(), E{});
  __syncthreads();

  E* out = static_cast<E*>(p.inputs_embeds) + (segment.slot + first) * p.dim;
  const int packs = static_cast<int>(p.dim / N), lane = thread % kLanes, warps = threads / kLanes;
  const wide_t<E> scale = static_cast<wide_t<E>>(p.scale);
  const int filled = static_cast<int>(slots);
  for (int s = thread / kLanes; s < filled; s += warps) {  // a warp per slot: its lanes take the same branch
    const int64_t source = sources[s], rank = first_rank + s;
    E* write = out + s * p.dim;
    if (source == kPadding) {
#pragma unroll 1
      for (int d = lane; d < packs; d += kLanes) store<E, N>(write + d * N, Pack<E, N>{});
    } else if (source < kPadding) {
      const P* read = row_at<P>(p.prompts, decode_prompt_row(source));
      copy_vector<E, P, N>(write, read, packs, lane,
                           [](const Pack<P, N>& pack) { return converted<E, P, N>(pack, wide_t<E>(1)); });
    } else if (p.token_update.data != nullptr && update >= 0 && rank < p.update_length) {
      const E* read = row_at<E>(p.embedding, source);
      const wide_t<E>* added = row_at<wide_t<E>>(p.token_update, update + rank);
#pragma unroll 1
      for (int d = lane; d < packs; d += kLanes) move_updated<E, N>(write + d * N, read + d * N, added + d * N, scale);
    } else if (p.scale != 1.0) {
      copy_vector<E, E, N>(write, row_at<E>(p.embedding, source), packs, lane,
                           [=](const Pack<E, N>& pack) { return converted<E, E, N>(pack, scale); });
    } else {
      copy_vector<E, E, N>(write, row_at<E>(p.embedding, source), packs, lane,
                           [](const Pack<E, N>& pack) { return pack; });
    }
  }
}

}  // namespace softprompt_fast::cuda
