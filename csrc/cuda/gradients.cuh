// The CUDA kernels of the backward passes of `assemble`. One thread sums a few elements over all terms in ascending
// order: no atomics, so the same bits on every run.
#pragma once

#include "access.cuh"

namespace softprompt_fast::cuda {

constexpr int kGradientThreads = 64;  // many small blocks: a prompt has few rows
constexpr int kTerms = 8;             // of a sum, under way at once: few threads need more of them

// Blocks that cover the elements of one vector.
inline int64_t chunks_of(int64_t dim, const Launch& launch) {
  const int64_t packs = dim / launch.elements;
  return (packs + launch.threads - 1) / launch.threads;
}

inline Launch plan_prompt_backward(const PromptBackwardParams& p, int max_threads = kMaxThreads) {
  Launch launch;
  launch.elements = aligned_elements(size_of(p.grad.type), p.dim, p.grad, p.grad_prompts);
  launch.threads = max_threads < kGradientThreads ? max_threads : kGradientThreads;
  launch.tile = 1;
  launch.blocks = p.grad_prompts.count * chunks_of(p.dim, launch);
  return launch;
}

// One block sums a part of one prompt row over the uses of its prompt.
template <class G, class P, int N>
__global__ void __launch_bounds__(kGradientThreads) prompt_backward_kernel(PromptBackwardParams p) {
  __shared__ int64_t rows[kGradientThreads];  // of the gradient, for as many uses; -1: none
  const unsigned thread = threadIdx.x, threads = blockDim.x;
  const unsigned chunks = static_cast<unsigned>((p.dim / N + threads - 1) / threads);  // a launch has fewer than 2^31
  const int64_t row = blockIdx.x / chunks, d = N * (int64_t{blockIdx.x % chunks} * threads + thread);
  const int64_t prompt = prompt_holding(p, row), place = prompt < 0 ? 0 : row - integer_at(p.prompt_offsets, prompt);
  const Range uses = uses_of(p, prompt);
  const G* grad = static_cast<const G*>(p.grad.data) + d;
  wide_t<P> sum[N] = {};
  for (int64_t base = uses.first; base < uses.last; base += threads) {
    if (base > uses.first) __syncthreads();  // others may still read
    rows[thread] = base + thread < uses.last ? gradient_row(p, base + thread, place) : -1;
    __syncthreads();
    const int count = static_cast<int>(uses.last - base < threads ? uses.last - base : threads);
    for (int use = 0; use < count && d < p.dim; use += kTerms) {
      Pack<G, N> terms[kTerms];
      bool there[kTerms];
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        const int64_t from = use + k < count ? rows[use + k] : -1;
        there[k] = from >= 0;
        if (there[k]) terms[k] = load<G, N>(grad + from * p.grad.stride);
      }
      add(sum, terms, there);
    }
  }
  if (d < p.dim) store<P, N>(row_at<P>(p.grad_prompts, row) + d, narrowed<P, N>(sum));
}

inline Launch plan_embedding_backward(const EmbeddingBackwardParams& p, int max_threads = kMaxThreads) {
  Launch launch;
  const Scalar wider = size_of(p.grad.type) > size_of(p.grad_embedding.type) ? p.grad.type : p.grad_embedding.type;
  launch.elements = aligned_elements(size_of(wider), p.dim, p.grad, p.grad_embedding);
  launch.threads = max_threads < kGradientThreads ? max_threads : kGradientThreads;
  launch.tile = 1;
  launch.blocks = p.tokens * chunks_of(p.dim, launch);
  return launch;
}

// One block sums a part of one id's vector over its run of entries, which it finds by the first of them.
template <class G, class E, int N>
__global__ void __launch_bounds__(kGradientThreads) embedding_backward_kernel(EmbeddingBackwardParams p) {
  const int64_t packs = p.dim / N, chunks = (packs + blockDim.x - 1) / blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) / chunks, id = p.sorted_ids[first];
  const int64_t d = (static_cast<int64_t>(blockIdx.x) % chunks * blockDim.x + threadIdx.x) * N;
  if (d >= p.dim || id < 0 || id >= p.grad_embedding.count || (first > 0 && p.sorted_ids[first - 1] == id)) return;
  wide_t<E> sum[N] = {};
  bool more = true;
  for (int64_t i = first; more; i += kFlight) {
    Pack<G, N> terms[kFlight];
    bool there[kFlight];
#pragma unroll
    for (int k = 0; k < kFlight; ++k) {
      more = more && i + k < p.tokens && p.sorted_ids[i + k] == id;
      const int64_t slot = more ? p.sorted_slots[i + k] : -1;
      there[k] = slot >= 0 && slot < p.grad.count;
      if (there[k]) terms[k] = load<G, N>(row_at<G>(p.grad, slot) + d);
    }
    add(sum, terms, there);
  }
  store<E, N>(row_at<E>(p.grad_embedding, id) + d, narrowed<E, N>(sum, static_cast<wide_t<E>>(p.scale)));
}

}  // namespace softprompt_fast::cuda
