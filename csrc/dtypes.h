// bfloat16 and half as plain 16-bit words, without a torch header, and their conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace softprompt_fast {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Type in which a value is scaled, converted and summed.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

SPF_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
SPF_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SPF_HOST_DEVICE float widen(float value) { return value; }
SPF_HOST_DEVICE double widen(double value) { return value; }
SPF_HOST_DEVICE float widen(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

SPF_HOST_DEVICE float widen(f16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return float_of(sign | ((rest << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
#endif
}

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  template <class W>
  static SPF_HOST_DEVICE float from(W value) {
    return static_cast<float>(value);
  }
};
template <>
struct Narrow<double> {
  template <class W>
  static SPF_HOST_DEVICE double from(W value) {
    return static_cast<double>(value);
  }
};
template <>
struct Narrow<bf16> {  // to nearest, ties to even
  static SPF_HOST_DEVICE bf16 from(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Narrow<f16> {  // to nearest, ties to even
  static SPF_HOST_DEVICE f16 from(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
    if (rest >= 0x38800000u) {
      const uint32_t rounded = rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u);
      return {static_cast<uint16_t>(sign | rounded >> 13)};
    }
    // Adding 0.5 lets the FPU round a subnormal half at its last bit.
    const float shifted = float_of(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
#endif
  }
};

template <class T>
struct Identity {
  using type = T;
};

// Calls f with Identity<element type of `type`>.
template <class F>
void dispatch(Scalar type, F&& f) {
  switch (type) {
    case Scalar::f32:
      return f(Identity<float>{});
    case Scalar::bf16:
      return f(Identity<bf16>{});
    case Scalar::f16:
      return f(Identity<f16>{});
    case Scalar::f64:
      return f(Identity<double>{});
  }
}

// Calls f with Identity<in>, Identity<out>: the same type, or float32 on one side.
template <class F>
void dispatch_pair(Scalar in, Scalar out, F&& f) {
  dispatch(in, [&](auto a) {
    using In = typename decltype(a)::type;
    if (out == in) {
      f(Identity<In>{}, Identity<In>{});
    } else if (out == Scalar::f32) {
      f(Identity<In>{}, Identity<float>{});
    } else if (in == Scalar::f32) {
      dispatch(out, [&](auto b) { f(Identity<float>{}, Identity<typename decltype(b)::type>{}); });
    }
  });
}

SPF_HOST_DEVICE int64_t size_of(Scalar type) { return type == Scalar::f64 ? 8 : type == Scalar::f32 ? 4 : 2; }

// The most negative finite value of a type, which additive masks use.
template <class T>
SPF_HOST_DEVICE T lowest();
template <>
SPF_HOST_DEVICE float lowest<float>() {
  return float_of(0xff7fffffu);
}
template <>
SPF_HOST_DEVICE double lowest<double>() {
  return -1.7976931348623157e308;
}
template <>
SPF_HOST_DEVICE bf16 lowest<bf16>() {
  return {0xff7f};
}
template <>
SPF_HOST_DEVICE f16 lowest<f16>() {
  return {0xfbff};
}

}  // namespace softprompt_fast
