// The CUDA kernels of `unpack` and `pack`.
#pragma once

#include "access.cuh"

namespace softprompt_fast::cuda {

constexpr int kPackingThreads = 128;

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
  return {vectors * p.tensors, threads, 1, aligned_elements(p)};
}

// One block writes all heads of one place of one row of one tensor.
template <class In, class Out, int N>
__global__ void __launch_bounds__(kPackingThreads) unpack_kernel(UnpackParams p) {
  const int64_t block = blockIdx.x, places = p.rows * p.width;
  const int64_t row = block % places / p.width, place = block % places % p.width;
  const HeadsRef<const void> from = p.from[block / places];
  const HeadsRef<void> to = p.to[block / places];
  const int64_t slot = slot_at(p.table + row * kTableColumns, place, p.slots);
  const int64_t packs = from.size / N;
  for (int64_t i = threadIdx.x; i < from.heads * packs; i += blockDim.x) {
    const int64_t head = i / packs, e = i % packs * N;
    Out* out = vector_at<Out>(to, row, place, head) + e;
    if (slot >= 0) {
      move<Out, In, N>(out, vector_at<In>(from, 0, slot, head) + e, wide_t<Out>(1));
    } else {
      store<Out, N>(out, Pack<Out, N>{});
    }
  }
}

// One block writes all heads of one slot of one tensor: the sum over the places that hold it, in their order.
template <class In, class Out, int N>
__global__ void __launch_bounds__(kPackingThreads) pack_kernel(PackParams p) {
  __shared__ int64_t offsets[kPackingThreads];  // of as many holders as there are threads, -1: none
  const int64_t block = blockIdx.x, slot = block % p.slots, thread = threadIdx.x, threads = blockDim.x;
  const HeadsRef<const void> from = p.from[block / p.slots];
  const HeadsRef<void> to = p.to[block / p.slots];
  const Range holders = holders_of(p, slot);
  const int64_t packs = from.size / N, total = from.heads * packs;
  for (int64_t first = 0; first < total; first += threads) {
    const int64_t i = first + thread, head = i / packs, e = i % packs * N;
    wide_t<Out> sum[N] = {};
    for (int64_t base = holders.first; base < holders.last; base += threads) {
      if (first == 0 || holders.last - holders.first > threads) {
        __syncthreads();  // others may still read
        const Place at = base + thread < holders.last ? place_at(p, base + thread) : Place{-1, -1};
        offsets[thread] = at.row < 0 ? -1 : at.row * from.row_stride + at.place * from.slot_stride;
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

}  // namespace softprompt_fast::cuda
