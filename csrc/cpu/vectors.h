// Vectors of floats in the widest registers available, and the loops over them that attention needs.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace softprompt_fast::cpu {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kPanel = 4;  // kPanel vectors wide and kTile rows high: what the registers hold
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kPanel = 2;
#else
constexpr int64_t kLanes = 4, kPanel = 2;
#endif
constexpr int64_t kTile = 6;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Vector load(const float* at) {
  Vector value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
inline void store(float* at, Vector value) { std::memcpy(at, &value, sizeof value); }

// Whole vectors that hold `count` floats, in floats.
inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// e^x to 1e-7 relative; at least 2^-126, and not a number where x is none. Reduced by ln 2 in two parts, then the
// minimax polynomial of the Cephes library's expf.
inline Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f, highest = Vector{} + 88.0f;
  x = x < lowest ? lowest : x;  // a comparison with a NaN is false and keeps it
  x = x > highest ? highest : x;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x * 1.44269504f + magic;
  const Vector n = shifted - magic;
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * (r * r) + r + 1.0f;
  const Integers exponent = (bits - 0x4b400000 + 127) << 23;
  Vector power;
  std::memcpy(&power, &exponent, sizeof power);
  return sum * power;
}

// Exchanges rows and columns of kLanes vectors: in step s, blocks of s lanes are swapped with those s rows away.
inline void transpose(Vector (&rows)[kLanes]) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 4
  for (int64_t step = 1; step < kLanes; step *= 2) {
    Integers upper, lower;
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      upper[lane] = lane & step ? lane - static_cast<int32_t>(step) + static_cast<int32_t>(kLanes) : lane;
      lower[lane] = lane & step ? lane + static_cast<int32_t>(kLanes) : lane + static_cast<int32_t>(step);
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const Vector a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + step] = __builtin_shuffle(a, b, lower);
    }
  }
#else
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < i; ++j) {
      const float kept = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = kept;
    }
#endif
}

// A matrix to be multiplied from the left, element (row, column) at data[row * row_stride + column * column_stride].
struct Left {
  const float* data;
  int64_t row_stride, column_stride;
};

template <int64_t rows, int64_t vectors>
inline void multiply_tile(int64_t depth, Left a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                          bool add) {
  Vector sum[rows][vectors];
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < vectors; ++j) sum[i][j] = add ? load(c + i * c_stride + j * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[vectors];
    for (int64_t j = 0; j < vectors; ++j) right[j] = load(b + k * b_stride + j * kLanes);
    for (int64_t i = 0; i < rows; ++i) {
      const float left = a.data[i * a.row_stride + k * a.column_stride];
      for (int64_t j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < vectors; ++j) store(c + i * c_stride + j * kLanes, sum[i][j]);
}

template <int64_t vectors>
inline void multiply_panel(int64_t rows, int64_t depth, Left a, const float* b, int64_t b_stride, float* c,
                           int64_t c_stride, bool add) {
  int64_t row = 0;
  const auto tile = [&](auto height) {
    constexpr int64_t n = decltype(height)::value;
    multiply_tile<n, vectors>(depth, {a.data + row * a.row_stride, a.row_stride, a.column_stride}, b, b_stride,
                              c + row * c_stride, c_stride, add);
    row += n;
  };
  while (rows - row >= kTile) tile(std::integral_constant<int64_t, kTile>{});
  if (rows - row >= 4) tile(std::integral_constant<int64_t, 4>{});
  if (rows - row >= 2) tile(std::integral_constant<int64_t, 2>{});
  if (rows - row >= 1) tile(std::integral_constant<int64_t, 1>{});
}

// C [rows, columns] = A [rows, depth] B [depth, columns], or added to it. Rows of B and C are whole vectors.
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_stride, float* c,
                     int64_t c_stride, bool add) {
  int64_t at = 0;
  for (; at + kPanel * kLanes <= padded(columns); at += kPanel * kLanes)
    multiply_panel<kPanel>(rows, depth, a, b + at, b_stride, c + at, c_stride, add);
  for (; at < columns; at += kLanes) multiply_panel<1>(rows, depth, a, b + at, b_stride, c + at, c_stride, add);
}

}  // namespace softprompt_fast::cpu
