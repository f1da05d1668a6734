// How the CUDA kernels read and write vectors: a thread moves up to 16 bytes in one access.
#pragma once

#include "../dtypes.h"
#include "tuning.h"

namespace softprompt_fast::cuda {

constexpr int64_t kAccessBytes = 16;
constexpr int kLanes = 32;  // threads of a warp

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

template <class T, int N>
struct alignas(sizeof(T) * N < kAccessBytes ? sizeof(T) * N : kAccessBytes) Pack {
  T at[N];
};

template <class T, int N>
SPF_HOST_DEVICE Pack<T, N> load(const T* in) {
  return *reinterpret_cast<const Pack<T, N>*>(in);
}

// Stores a pack in accesses of 16 bytes, or in one smaller access. In PTX, because nvcc stores a converted pack element
// by element.
template <class T, int N>
SPF_HOST_DEVICE void store(T* out, const Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
  constexpr int kWords = static_cast<int>(sizeof(T)) * N / 4;
  if constexpr (kWords > 0) {
    uint32_t words[kWords];
    memcpy(words, &pack, sizeof words);
    if constexpr (kWords == 1) {
      asm volatile("st.global.b32 [%0], %1;" ::"l"(out), "r"(words[0]) : "memory");
    } else if constexpr (kWords == 2) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(out), "r"(words[0]), "r"(words[1]) : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<char*>(out) + 4 * i),
                     "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                     : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(out) = pack;
}

// sum += terms that are there, in their order.
template <class W, class T, int N, int F>
SPF_HOST_DEVICE void add(W (&sum)[N], const Pack<T, N> (&terms)[F], const bool (&there)[F]) {
#pragma unroll
  for (int k = 0; k < F; ++k)
    if (there[k]) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += static_cast<W>(widen(terms[k].at[i]));
    }
}

template <class T, int N, class W>
SPF_HOST_DEVICE Pack<T, N> narrowed(const W (&sum)[N], W scale = W(1)) {
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.at[i] = Narrow<T>::from(sum[i] * scale);
  return result;
}

template <class Out, class In, int N>
SPF_HOST_DEVICE Pack<Out, N> converted(const Pack<In, N>& from, wide_t<Out> scale) {
  Pack<Out, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.at[i] = Narrow<Out>::from(static_cast<wide_t<Out>>(widen(from.at[i])) * scale);
  return to;
}

template <class Out, class In, int N>
SPF_HOST_DEVICE void move(Out* out, const In* in, wide_t<Out> scale) {
  store<Out, N>(out, converted<Out, In, N>(load<In, N>(in), scale));
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
  const Pack<T, N> from = load<T, N>(in);
  const Pack<wide_t<T>, N> added = load<wide_t<T>, N>(update);
  Pack<T, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.at[i] = Narrow<T>::from(rounded_product(widen(from.at[i]), scale) + added.at[i]);
  store<T, N>(out, to);
}

}  // namespace softprompt_fast::cuda
