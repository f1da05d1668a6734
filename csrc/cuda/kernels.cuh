// The CUDA kernels and how they are launched. No torch header and no CUDA runtime call: nvcc compiles this file on
// any machine, and the tests run the same thread code on a CPU with `tests/csrc/cuda_on_cpu.h` in place of a GPU.
#pragma once

#include <type_traits>

#include "assemble.cuh"
#include "gradients.cuh"
#include "packing.cuh"

namespace softprompt_fast::cuda {

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
          go.run(assemble_kernel<E, E, N>, launch, p, tiling_of(p, launch));
        } else {
          go.run(assemble_kernel<E, float, N>, launch, p, tiling_of(p, launch));
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
void run_unpack(const UnpackParams& p, const Go& go) {
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
void run_pack(const PackParams& p, const Go& go) {
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
    using G = typename decltype(grad)::type;
    using E = typename decltype(type)::type;
    with_elements(launch.elements, [&](auto elements) {
      constexpr int N = decltype(elements)::value;
      if constexpr (!too_wide<G>(N) && !too_wide<E>(N)) go.run(embedding_backward_kernel<G, E, N>, launch, p);
    });
  });
}

}  // namespace softprompt_fast::cuda
