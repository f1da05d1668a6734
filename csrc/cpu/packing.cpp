#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../dtypes.h"
#include "kernels.h"

namespace softprompt_fast::cpu {
namespace {

int64_t items_per_task(int64_t bytes_per_item) {
  return std::max<int64_t>(1, (64 * 1024) / std::max<int64_t>(1, bytes_per_item));
}

template <class T>
const T* read(const Heads& x, int64_t row, int64_t slot, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + slot * x.slot_stride + head * x.head_stride;
}

template <class T>
T* write(const Heads& x, int64_t row, int64_t slot) {
  return const_cast<T*>(static_cast<const T*>(x.data)) + row * x.row_stride + slot * x.slot_stride;
}

int64_t bytes_of(const PackingParams& p) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < p.tensors; ++i) bytes += p.packed[i].heads * p.packed[i].size * size_of(p.packed[i].type);
  return bytes;
}

}  // namespace

void unpack(const PackingParams& p) {
  dispatch_pair(p.packed[0].type, p.unpacked[0].type, [&](auto in_type, auto out_type) {
    using In = typename decltype(in_type)::type;
    using Out = typename decltype(out_type)::type;
    at::parallel_for(0, p.rows * p.width, items_per_task(bytes_of(p)), [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; ++at) {
        const int64_t row = at / p.width, place = at % p.width;
        const int64_t slot = slot_at(p.table + row * kTableColumns, place);
        const bool held = slot >= 0 && slot < p.slots;
        for (int32_t i = 0; i < p.tensors; ++i) {
          const Heads& x = p.packed[i];
          Out* out = write<Out>(p.unpacked[i], row, place);
          for (int64_t head = 0; head < x.heads; ++head, out += x.size) {
            if (!held) {
              std::fill(out, out + x.size, Out{});
              continue;
            }
            const In* in = read<In>(x, 0, slot, head);
            for (int64_t e = 0; e < x.size; ++e) out[e] = Narrow<Out>::from(static_cast<wide_t<Out>>(widen(in[e])));
          }
        }
      }
    });
  });
}

void pack(const PackingParams& p) {
  dispatch_pair(p.unpacked[0].type, p.packed[0].type, [&](auto in_type, auto out_type) {
    using In = typename decltype(in_type)::type;
    using Out = typename decltype(out_type)::type;
    using W = wide_t<Out>;
    at::parallel_for(0, p.slots, items_per_task(bytes_of(p)), [&](int64_t first, int64_t last) {
      std::vector<std::pair<int64_t, int64_t>> holders;  // (row, place), ascending rows: the order of the sum
      std::vector<W> sum;
      for (int64_t slot = first; slot < last; ++slot) {
        holders.clear();
        for (int64_t row = 0; row < p.rows; ++row) {
          const int64_t place = place_of(p.table + row * kTableColumns, slot);
          if (place >= 0 && place < p.width) holders.emplace_back(row, place);
        }
        for (int32_t i = 0; i < p.tensors; ++i) {
          const Heads& x = p.unpacked[i];
          Out* out = write<Out>(p.packed[i], 0, slot);
          sum.resize(static_cast<size_t>(x.size));
          for (int64_t head = 0; head < x.heads; ++head, out += x.size) {
            std::fill(sum.begin(), sum.end(), W(0));
            for (const auto& [row, place] : holders) {
              const In* in = read<In>(x, row, place, head);
              for (int64_t e = 0; e < x.size; ++e) sum[static_cast<size_t>(e)] += static_cast<W>(widen(in[e]));
            }
            for (int64_t e = 0; e < x.size; ++e) out[e] = Narrow<Out>::from(sum[static_cast<size_t>(e)]);
          }
        }
      }
    });
  });
}

}  // namespace softprompt_fast::cpu
