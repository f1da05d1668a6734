// Random arguments of the kernels. Each array has exactly the size that the kernels may touch, so that a sanitizer sees
// one element too many; its contents are whatever 64 bits can say where the ops cannot check them.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "dtypes.h"

namespace fuzz {

using namespace softprompt_fast;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t bits() { return engine_(); }
  int64_t below(int64_t count) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count)); }
  int64_t from(int64_t first, int64_t last) { return first + below(last - first + 1); }  // both included
  bool once_in(int64_t count) { return below(count) == 0; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }

 private:
  std::mt19937_64 engine_;
};

// The arguments of one call and the memory they are in. Memory of outputs begins as the same bytes every time.
class Arguments {
 public:
  explicit Arguments(Random& random) : random(random), hostile(random.once_in(2)) {}

  Random& random;
  const bool hostile;  // contents break rules

  void* bytes(int64_t size) {
    arrays_.push_back({std::unique_ptr<char[]>(new char[static_cast<size_t>(size)]), static_cast<size_t>(size)});
    std::memset(arrays_.back().data.get(), 0x55, arrays_.back().size);
    return arrays_.back().data.get();
  }

  void* output(int64_t size, int fill = 0x55) {
    void* data = bytes(size);
    std::memset(data, fill, static_cast<size_t>(size));
    outputs_.push_back(arrays_.size() - 1);
    return data;
  }

  // What the call has written; sets the outputs back to what they were.
  std::vector<char> take_outputs(int fill = 0x55) {
    std::vector<char> all;
    for (const size_t index : outputs_) {
      Array& array = arrays_[index];
      all.insert(all.end(), array.data.get(), array.data.get() + array.size);
      std::memset(array.data.get(), fill, array.size);
    }
    return all;
  }

  // Integers first..last; hostile: also any other.
  int64_t integer(int64_t first, int64_t last) {
    if (hostile && random.once_in(3)) {
      const int64_t edge = random.pick<int64_t>({INT64_MIN, INT64_MAX, 0, first, last, INT32_MAX, INT32_MIN, 1 << 20});
      return static_cast<int64_t>(static_cast<uint64_t>(edge) + static_cast<uint64_t>(random.from(-2, 2)));
    }
    return last < first ? first : random.from(first, last);
  }

  int64_t* integers(int64_t count, int64_t first, int64_t last) {
    int64_t* values = static_cast<int64_t*>(bytes(count * 8));
    for (int64_t i = 0; i < count; ++i) values[i] = integer(first, last);
    return values;
  }

  Scalar scalar(bool wide = true) {
    return wide ? random.pick({Scalar::f32, Scalar::bf16, Scalar::f16, Scalar::f64})
                : random.pick({Scalar::f32, Scalar::bf16, Scalar::f16});
  }

  // The same type, or float32 on one side.
  Scalar partner(Scalar type) { return random.once_in(2) ? type : type == Scalar::f32 ? scalar() : Scalar::f32; }

  void fill(void* data, Scalar type, int64_t count) {
    const bool any = hostile && random.once_in(2);  // any bits: NaN, infinity, subnormal numbers
    dispatch(type, [&](auto identity) {
      using T = typename decltype(identity)::type;
      T* values = static_cast<T*>(data);
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t bits = random.bits();
        if (any) {
          std::memcpy(values + i, &bits, sizeof(T));
        } else {
          values[i] = Narrow<T>::from(static_cast<wide_t<T>>(static_cast<int32_t>(bits)) * wide_t<T>(1e-9));
        }
      }
    });
  }

  // Elements between rows that are not part of them.
  int64_t gap() { return random.pick<int64_t>({0, 0, 0, 1, 3, 8}); }

  // [count, dim], the last row without a gap after it.
  MatrixRef<const void> matrix(Scalar type, int64_t count, int64_t dim) {
    const int64_t stride = random.once_in(16) ? 0 : dim + gap();  // 0: an expanded row
    const int64_t elements = count == 0 ? 0 : (count - 1) * stride + dim;
    void* data = bytes(elements * size_of(type));
    fill(data, type, elements);
    return {data, type, count, stride};
  }

  MatrixRef<void> output_matrix(Scalar type, int64_t count, int64_t dim, int byte = 0x55) {
    return {output(count * dim * size_of(type), byte), type, count, dim};
  }

  // [rows, slots, heads, size], or [slots, heads, size] where rows is 1, in one of two orders.
  HeadsRef<const void> heads(Scalar type, int64_t rows, int64_t slots, int64_t heads, int64_t size) {
    HeadsRef<const void> x{nullptr, type, 0, 0, 0, heads, size};
    const int64_t inner = size + gap();
    const bool transposed = random.once_in(2);  // [rows, heads, slots, size]
    x.head_stride = transposed ? slots * inner : inner;
    x.slot_stride = transposed ? inner : heads * inner;
    x.row_stride = slots * heads * inner;
    const int64_t elements = rows * slots * heads == 0 ? 0
                                                       : (rows - 1) * x.row_stride + (slots - 1) * x.slot_stride +
                                                             (heads - 1) * x.head_stride + size;
    void* data = bytes(elements * size_of(type));
    fill(data, type, elements);
    x.data = data;
    return x;
  }

  HeadsRef<void> output_heads(Scalar type, int64_t rows, int64_t slots, int64_t heads, int64_t size) {
    return {output(rows * slots * heads * size * size_of(type)),
            type,
            slots * heads * size,
            heads * size,
            size,
            heads,
            size};
  }

  // [rows, columns] of words that hold first..last.
  Words words(int32_t size, int64_t rows, int64_t columns, int64_t first, int64_t last) {
    Words x{nullptr, size, 0, 0};
    x.column_stride = random.pick<int64_t>({1, 1, 2, 0});
    x.row_stride = random.once_in(8) ? 0 : columns * x.column_stride + gap();
    const int64_t count = rows * columns == 0 ? 0 : (rows - 1) * x.row_stride + (columns - 1) * x.column_stride + 1;
    void* data = bytes(count * size);
    for (int64_t i = 0; i < count; ++i) write_bits(data, size, i, static_cast<uint64_t>(integer(first, last)));
    x.data = data;
    return x;
  }

 private:
  struct Array {
    std::unique_ptr<char[]> data;
    size_t size;
  };
  std::deque<Array> arrays_;
  std::vector<size_t> outputs_;
};

}  // namespace fuzz
