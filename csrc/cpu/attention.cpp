// Causal attention over packed vectors, in blocks that stay in a core's cache: a segment's queries against its prefix
// and itself, read in place. Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) and its recomputation
// in the backward pass (Dao et al. 2022, arXiv 2205.14135). Inside, numbers are float32 for every dtype.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../dtypes.h"
#include "kernels.h"
#include "parallel.h"
#include "vectors.h"

namespace softprompt_fast::cpu {
namespace {

constexpr int64_t kQueryRows = 96;  // queries times heads of a group, per block
constexpr int64_t kKeys = 128;      // keys per block
constexpr float kNever = -std::numeric_limits<float>::infinity();

// One segment of the table, and which keys its queries see.
struct AttentionSegment {
  int64_t own, length, prefix, prefix_length, window;
  int64_t query, count;  // first slot and number of queries

  AttentionSegment(const AttentionParams& p, int64_t index) : window(p.window) {
    const int64_t* line = p.table + index * kTableColumns;
    own = line[kOwnSlot];
    length = line[kOwnLength];
    prefix = line[kPrefixSlot];
    prefix_length = line[kPrefixLength];
    query = p.queries != nullptr ? p.queries[2 * index] : own;
    count = p.queries != nullptr ? p.queries[2 * index + 1] : length;
  }
  // Query t sees keys [first_key, last_key). Key j is slot j of the prefix; after it come the segment's own.
  int64_t last_key(int64_t t) const { return prefix_length + length - count + t + 1; }
  int64_t first_key(int64_t t) const { return window > 0 ? std::max<int64_t>(0, last_key(t) - window) : 0; }
};

// Scratch of one thread: float32 blocks whose rows are whole vectors, zero beyond their columns.
struct Block {
  std::vector<float> data;
  int64_t stride;
  Block(int64_t rows, int64_t columns)
      : data(static_cast<size_t>(rows * padded(columns)), 0.0f), stride(padded(columns)) {}
  float* row(int64_t i) { return data.data() + i * stride; }
  Left left() { return {data.data(), stride, 1}; }
  Left transposed() { return {data.data(), 1, stride}; }
};

template <class T>
void read_vector(const T* from, float* to, int64_t size, float scale = 1.0f) {
  for (int64_t e = 0; e < size; ++e) to[e] = widen(from[e]) * scale;
}

// Rows (t, head of the group) of queries [first, last) of a group of heads.
template <class T>
void read_queries(const HeadsRef<const void>& x, const AttentionSegment& s, int64_t first, int64_t last, int64_t head,
                  int64_t group, Block& out, float scale) {
  for (int64_t t = first; t < last; ++t)
    for (int64_t g = 0; g < group; ++g)
      read_vector(vector_at<T>(x, 0, s.query + t, head * group + g), out.row((t - first) * group + g), x.size, scale);
}

// Keys or values [first, last) of a segment as rows.
template <class T>
void read_keys(const HeadsRef<const void>& prefix, const HeadsRef<const void>& own, const AttentionSegment& s,
               int64_t first, int64_t last, int64_t head, Block& out) {
  for (int64_t j = first; j < last; ++j) {
    const T* from = j < s.prefix_length ? vector_at<T>(prefix, 0, s.prefix + j, head)
                                        : vector_at<T>(own, 0, s.own + j - s.prefix_length, head);
    read_vector(from, out.row(j - first), own.size);
  }
}

// Writes the first `count` rows as columns, and as many more as fill a vector.
void transpose_rows(Block& rows, int64_t count, Block& columns) {
  Vector square[kLanes];
  for (int64_t j = 0; j < count; j += kLanes)
    for (int64_t e = 0; e < rows.stride; e += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) square[i] = load(rows.row(j + i) + e);
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store(columns.row(e + i) + j, square[i]);
    }
}

// Sets the scores of keys [first, last) that query t does not see to `value`.
void hide(float* row, const AttentionSegment& s, int64_t t, int64_t first, int64_t last, int64_t stride, float value) {
  const int64_t begin = std::clamp(s.first_key(t) - first, int64_t{0}, stride);
  const int64_t end = std::clamp(s.last_key(t) - first, int64_t{0}, std::min(last - first, stride));
  std::fill(row, row + begin, value);
  std::fill(row + end, row + stride, value);
}

float sum_of(Vector v) {
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

template <class T>
struct Forward {
  const AttentionForwardParams& p;
  const int64_t group = p.query.heads / p.key.heads;
  const int64_t block = std::max<int64_t>(1, kQueryRows / group);
  Block query{block * group, p.query.size}, keys{kKeys, p.key.size}, values{kKeys, p.value.size};
  Block key_columns{padded(p.key.size), kKeys};
  Block scores{block * group, kKeys}, sum{block * group, p.value.size};
  std::vector<float> largest = std::vector<float>(static_cast<size_t>(block * group)), total = largest;

  // Queries [first, last) of a segment with one head of keys.
  void operator()(const AttentionSegment& s, int64_t first, int64_t last, int64_t head) {
    const int64_t rows = (last - first) * group;
    read_queries<T>(p.query, s, first, last, head, group, query, static_cast<float>(p.scale));
    std::fill(sum.data.begin(), sum.data.end(), 0.0f);
    std::fill(largest.begin(), largest.end(), kNever);
    std::fill(total.begin(), total.end(), 0.0f);
    const int64_t end = s.last_key(last - 1);
    for (int64_t from = s.first_key(first); from < end; from += kKeys) {
      const int64_t to = std::min(from + kKeys, end);
      read_keys<T>(p.prefix_key, p.key, s, from, to, head, keys);
      read_keys<T>(p.prefix_value, p.value, s, from, to, head, values);
      transpose_rows(keys, to - from, key_columns);
      multiply(rows, to - from, p.key.size, query.left(), key_columns.row(0), key_columns.stride, scores.row(0),
               scores.stride, false);
      for (int64_t i = 0; i < rows; ++i) {
        float* row = scores.row(i);
        const int64_t width = padded(to - from);
        hide(row, s, first + i / group, from, to, width, kNever);
        online_softmax_step(row, width, i);
      }
      multiply(rows, p.value.size, to - from, scores.left(), values.row(0), values.stride, sum.row(0), sum.stride,
               true);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = s.query + first + i / group, h = head * group + i % group;
      T* out = vector_at<T>(p.out, 0, slot, h);
      const float inverse = 1.0f / total[static_cast<size_t>(i)];
      for (int64_t e = 0; e < p.value.size; ++e) out[e] = Narrow<T>::from(sum.row(i)[e] * inverse);
      p.log_sums[slot * p.query.heads + h] = largest[static_cast<size_t>(i)] + std::log(total[static_cast<size_t>(i)]);
    }
  }

  // Turns scores into exponentials relative to the largest score so far, and rescales the earlier sums to match.
  void online_softmax_step(float* row, int64_t width, int64_t i) {
    Vector high = load(row);
    for (int64_t n = kLanes; n < width; n += kLanes) {
      const Vector v = load(row + n);
      high = v > high ? v : high;
    }
    float& before = largest[static_cast<size_t>(i)];
    float now = before;
    for (int64_t n = 0; n < kLanes; ++n) now = std::max(now, high[n]);
    if (now == kNever) {  // nothing seen yet
      std::fill(row, row + width, 0.0f);
      return;
    }
    Vector added{};
    for (int64_t n = 0; n < width; n += kLanes) {
      const Vector v = load(row + n), never = Vector{} + kNever;
      const Vector e = v == never ? Vector{} : exponential(v - now);
      added += e;
      store(row + n, e);
    }
    const float scale = before == kNever ? 0.0f : std::exp(before - now);
    total[static_cast<size_t>(i)] = total[static_cast<size_t>(i)] * scale + sum_of(added);
    if (scale != 1.0f && before != kNever)
      for (int64_t e = 0; e < sum.stride; e += kLanes) store(sum.row(i) + e, load(sum.row(i) + e) * scale);
    before = now;
  }
};

template <class T>
struct Backward {
  const AttentionBackwardParams& p;
  const std::vector<int64_t>& prefix_starts;  // of each segment in the two buffers below
  float *prefix_key, *prefix_value;           // [sum of prefix lengths, H', E] and [.., H', E']
  const int64_t group = p.query.heads / p.key.heads;
  const int64_t block = std::max<int64_t>(1, kQueryRows / group);
  Block query{block * group, p.query.size}, grad_out{block * group, p.value.size};
  Block keys{kKeys, p.key.size}, values{kKeys, p.value.size};
  Block key_columns{padded(p.key.size), kKeys}, value_columns{padded(p.value.size), kKeys};
  Block weights{block * group, kKeys}, slopes{block * group, kKeys}, grad_query{block * group, p.query.size};
  Block grad_keys{kKeys, p.key.size}, grad_values{kKeys, p.value.size};
  std::vector<float> shift = std::vector<float>(static_cast<size_t>(block * group)), log_sum = shift;

  // One segment with one head of keys.
  void operator()(int64_t index, int64_t head) {
    const AttentionSegment s(p, index);
    const int64_t end = s.last_key(s.length - 1);
    for (int64_t from = s.first_key(0); from < end; from += kKeys) {
      const int64_t to = std::min(from + kKeys, end);
      read_keys<T>(p.prefix_key, p.key, s, from, to, head, keys);
      read_keys<T>(p.prefix_value, p.value, s, from, to, head, values);
      transpose_rows(keys, to - from, key_columns);
      transpose_rows(values, to - from, value_columns);
      std::fill(grad_keys.data.begin(), grad_keys.data.end(), 0.0f);
      std::fill(grad_values.data.begin(), grad_values.data.end(), 0.0f);
      for (int64_t first = 0; first < s.length; first += block) {
        const int64_t last = std::min(first + block, s.length);
        if (s.last_key(last - 1) > from && s.first_key(first) < to) query_gradients(s, first, last, head, from, to);
      }
      write_keys(s, index, head, from, to);
    }
  }

  // Gradients between queries [first, last) and keys [from, to), both ways.
  void query_gradients(const AttentionSegment& s, int64_t first, int64_t last, int64_t head, int64_t from, int64_t to) {
    const int64_t rows = (last - first) * group, count = to - from, width = padded(count);
    read_queries<T>(p.query, s, first, last, head, group, query, static_cast<float>(p.scale));
    read_queries<T>(p.grad_out, s, first, last, head, group, grad_out, 1.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = s.query + first + i / group, h = head * group + i % group;
      const T* out = vector_at<T>(p.out, 0, slot, h);
      float sum = 0;
      for (int64_t e = 0; e < p.value.size; ++e) sum += grad_out.row(i)[e] * widen(out[e]);
      shift[static_cast<size_t>(i)] = sum;
      log_sum[static_cast<size_t>(i)] = p.log_sums[slot * p.query.heads + h];
    }
    multiply(rows, count, p.key.size, query.left(), key_columns.row(0), key_columns.stride, weights.row(0),
             weights.stride, false);
    multiply(rows, count, p.value.size, grad_out.left(), value_columns.row(0), value_columns.stride, slopes.row(0),
             slopes.stride, false);
    for (int64_t i = 0; i < rows; ++i) {
      float *weight = weights.row(i), *slope = slopes.row(i);
      for (int64_t n = 0; n < width; n += kLanes) {
        const Vector e = exponential(load(weight + n) - log_sum[static_cast<size_t>(i)]);
        store(weight + n, e);
      }
      hide(weight, s, first + i / group, from, to, width, 0.0f);
      for (int64_t n = 0; n < width; n += kLanes) {
        const Vector e = load(weight + n);
        store(slope + n, e * (load(slope + n) - shift[static_cast<size_t>(i)]));
      }
      hide(slope, s, first + i / group, from, to, width, 0.0f);
    }
    multiply(count, p.value.size, rows, weights.transposed(), grad_out.row(0), grad_out.stride, grad_values.row(0),
             grad_values.stride, true);
    multiply(count, p.key.size, rows, slopes.transposed(), query.row(0), query.stride, grad_keys.row(0),
             grad_keys.stride, true);
    multiply(rows, p.query.size, count, slopes.left(), keys.row(0), keys.stride, grad_query.row(0), grad_query.stride,
             false);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = s.query + first + i / group, h = head * group + i % group;
      float* out = p.grad_query + (slot * p.query.heads + h) * p.query.size;
      for (int64_t e = 0; e < p.query.size; ++e) out[e] += grad_query.row(i)[e] * static_cast<float>(p.scale);
    }
  }

  void write_keys(const AttentionSegment& s, int64_t index, int64_t head, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j) {
      const bool own = j >= s.prefix_length;
      const int64_t line = own ? s.own + j - s.prefix_length : prefix_starts[static_cast<size_t>(index)] + j;
      const int64_t place = line * p.key.heads + head;
      std::copy_n(grad_keys.row(j - from), p.key.size, (own ? p.grad_key : prefix_key) + place * p.key.size);
      std::copy_n(grad_values.row(j - from), p.value.size, (own ? p.grad_value : prefix_value) + place * p.value.size);
    }
  }
};

void add_to(float* out, const float* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += in[i];
}

}  // namespace

void attention(const AttentionForwardParams& p) {
  dispatch(p.query.type, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t block = std::max<int64_t>(1, kQueryRows / (p.query.heads / p.key.heads));
    struct Piece {
      int64_t segment, first, last;
    };
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < p.segments; ++i) {
      const AttentionSegment s(p, i);
      for (int64_t t = 0; t < s.count; t += block) pieces.push_back({i, t, std::min(t + block, s.count)});
    }
    run_tasks(static_cast<int64_t>(pieces.size()) * p.key.heads, [&] {
      return [&p, &pieces, work = Forward<T>{p}](int64_t index) mutable {
        const Piece& piece = pieces[static_cast<size_t>(index / p.key.heads)];
        work(AttentionSegment(p, piece.segment), piece.first, piece.last, index % p.key.heads);
      };
    });
  });
}

void attention_backward(const AttentionBackwardParams& p) {
  std::vector<int64_t> starts;
  int64_t total = 0;
  for (int64_t i = 0; i < p.segments; ++i) {
    const AttentionSegment s(p, i);
    starts.push_back(total);
    total += s.length > 0 ? s.prefix_length : 0;
  }
  const int64_t key_width = p.key.heads * p.key.size, value_width = p.key.heads * p.value.size;
  // Slots outside every window are never written.
  std::vector<float> prefix_key(static_cast<size_t>(total * key_width));
  std::vector<float> prefix_value(static_cast<size_t>(total * value_width));
  dispatch(p.query.type, [&](auto type) {
    using T = typename decltype(type)::type;
    run_tasks(p.segments * p.key.heads, [&] {
      return [&p, work = Backward<T>{p, starts, prefix_key.data(), prefix_value.data()}](int64_t index) mutable {
        if (AttentionSegment(p, index / p.key.heads).length > 0) work(index / p.key.heads, index % p.key.heads);
      };
    });
  });
  // A prefix's gradient is the sum over its segments, in ascending order.
  at::parallel_for(0, p.prefix_slots, 16, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < p.segments; ++i) {
      const AttentionSegment s(p, i);
      if (s.length == 0) continue;
      const int64_t begin = std::max(first, s.prefix), end = std::min(last, s.prefix + s.prefix_length);
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t line = starts[static_cast<size_t>(i)] + slot - s.prefix;
        add_to(p.grad_prefix_key + slot * key_width, prefix_key.data() + line * key_width, key_width);
        add_to(p.grad_prefix_value + slot * value_width, prefix_value.data() + line * value_width, value_width);
      }
    }
  });
}

}  // namespace softprompt_fast::cpu
