// The CUDA kernels of `unpack` and `pack`.
#pragma once

#include "access.cuh"

namespace softprompt_fast::cuda {

constexpr int kPackingThreads = 128;
constexpr int kPackingTile = 4;  // slots or places of a block: what is copied waits for all of them together

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
  const int threads = max_threads < kPackingThreads ? max_threads : kPackingThreads;
  const int64_t tiles = (vectors + kPackingTile - 1) / kPackingTile;
  return {tiles * p.tensors, threads, kPackingTile, aligned_elements(p)};
}

// One block writes all heads of a few places of the rows of one tensor.
template <class In, class Out, int N>
__global__ void __launch_bounds__(kPackingThreads) unpack_kernel(UnpackParams p) {
  const int64_t places = p.rows * p.width, tiles = (places + kPackingTile - 1) / kPackingTile;
  const int64_t tensor = blockIdx.x / tiles, first = blockIdx.x % tiles * kPackingTile;
  const HeadsRef<const void> from = p.from[tensor];
  const HeadsRef<void> to = p.to[tensor];
  int64_t slots[kPackingTile];
#pragma unroll
  for (int j = 0; j < kPackingTile; ++j) {
    const int64_t row = (first + j) / p.width, place = (first + j) % p.width;
    slots[j] = first + j < places ? slot_at(p.table + row * kTableColumns, place, p.slots) : -1;
  }
  const int64_t packs = from.size / N;
  for (int64_t i = threadIdx.x; i < from.heads * packs; i += blockDim.x) {
    const int64_t head = i / packs, e = i % packs * N;
    Pack<In, N> held[kPackingTile];
#pragma unroll
    for (int j = 0; j < kPackingTile; ++j)
      held[j] = slots[j] < 0 ? Pack<In, N>{} : load<In, N>(vector_at<In>(from, 0, slots[j], head) + e);
#pragma unroll
    for (int j = 0; j < kPackingTile; ++j)  // rows and their places are adjacent
      if (first + j < places)
        store<Out, N>(vector_at<Out>(to, 0, first + j, head) + e, converted<Out, In, N>(held[j], wide_t<Out>(1)));
  }
}

// Where a holder's vectors begin in `from`, -1: there is no such place.
__device__ inline int64_t offset_of(const PackParams& p, const HeadsRef<const void>& from, int64_t holder) {
  const Place at = place_at(p, holder);
  return at.row < 0 ? -1 : at.row * from.row_stride + at.place * from.slot_stride;
}

// All threads of a block sum all heads of one slot over its holders, in their order.
template <class In, class Out, int N>
__device__ void sum_holders(const PackParams& p, const HeadsRef<const void>& from, const HeadsRef<void>& to,
                            int64_t slot) {
  __shared__ int64_t offsets[kPackingThreads];  // of as many holders as there are threads, -1: none
  const int64_t thread = threadIdx.x, threads = blockDim.x;
  const Range holders = holders_of(p, slot);
  const int64_t packs = from.size / N, total = from.heads * packs;
  for (int64_t first = 0; first < total; first += threads) {
    const int64_t i = first + thread, head = i / packs, e = i % packs * N;
    wide_t<Out> sum[N] = {};
    for (int64_t base = holders.first; base < holders.last; base += threads) {
      if (first == 0 || holders.last - holders.first > threads) {
        __syncthreads();  // others may still read
        offsets[thread] = base + thread < holders.last ? offset_of(p, from, base + thread) : -1;
        __syncthreads();
      }
      const int64_t rest = holders.last - base, count = rest < threads ? rest : threads;
      for (int64_t k = 0; k < count && i < total; k += kFlight) {
        Pack<In, N> terms[kFlight];
        bool there[kFlight];
#pragma unroll
        for (int j = 0; j < kFlight; ++j) {
          const int64_t offset = k + j < count ? offsets[k + j] : -1;
          there[j] = offset >= 0;
          if (there[j])
            terms[j] = load<In, N>(static_cast<const In*>(from.data) + offset + head * from.head_stride + e);
        }
        add(sum, terms, there);
      }
    }
    if (i < total) store<Out, N>(vector_at<Out>(to, 0, slot, head) + e, narrowed<Out, N>(sum));
  }
}

// One block writes all heads of a few slots of one tensor: the sums over the places that hold them.
template <class In, class Out, int N>
__global__ void __launch_bounds__(kPackingThreads) pack_kernel(PackParams p) {
  const int64_t tiles = (p.slots + kPackingTile - 1) / kPackingTile;
  const int64_t tensor = blockIdx.x / tiles, first = blockIdx.x % tiles * kPackingTile;
  const HeadsRef<const void> from = p.from[tensor];
  const HeadsRef<void> to = p.to[tensor];
  const int count = static_cast<int>(p.slots - first < kPackingTile ? p.slots - first : kPackingTile);
  int64_t offsets[kPackingTile];
  bool alone = true;  // no slot of the tile has two holders, as most slots
#pragma unroll
  for (int j = 0; j < kPackingTile; ++j) {
    const Range holders = j < count ? holders_of(p, first + j) : Range{0, 0};
    alone = alone && holders.last - holders.first <= 1;
    offsets[j] = holders.last - holders.first == 1 ? offset_of(p, from, holders.first) : -1;
  }
  if (!alone) {
    for (int j = 0; j < count; ++j) sum_holders<In, Out, N>(p, from, to, first + j);
    return;
  }
  const int64_t packs = from.size / N;
  for (int64_t i = threadIdx.x; i < from.heads * packs; i += blockDim.x) {
    const int64_t head = i / packs, e = i % packs * N;
    Pack<In, N> held[kPackingTile];
#pragma unroll
    for (int j = 0; j < kPackingTile; ++j)
      if (offsets[j] >= 0)
        held[j] = load<In, N>(static_cast<const In*>(from.data) + offsets[j] + head * from.head_stride + e);
#pragma unroll
    for (int j = 0; j < kPackingTile; ++j) {
      if (j >= count) break;
      wide_t<Out> sum[N] = {};  // also of one term, for the sign of its zeros
      const Pack<In, N> term[1] = {held[j]};
      const bool there[1] = {offsets[j] >= 0};
      add(sum, term, there);
      store<Out, N>(vector_at<Out>(to, 0, first + j, head) + e, narrowed<Out, N>(sum));
    }
  }
}

}  // namespace softprompt_fast::cuda
