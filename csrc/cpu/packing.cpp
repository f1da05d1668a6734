#include <algorithm>
#include <vector>

#include "../dtypes.h"
#include "kernels.h"
#include "parallel.h"

namespace softprompt_fast::cpu {
namespace {

// Bytes of one slot of all packed tensors.
template <class Data>
int64_t slot_bytes(const PackingParams& p, const HeadsRef<Data>* packed) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < p.tensors; ++i) bytes += packed[i].heads * packed[i].size * size_of(packed[i].type);
  return bytes;
}

}  // namespace

void unpack(const UnpackParams& p) {
  dispatch_pair(p.from[0].type, p.to[0].type, [&](auto in_type, auto out_type) {
    using In = typename decltype(in_type)::type;
    using Out = typename decltype(out_type)::type;
    at::parallel_for(0, p.rows * p.width, grain(slot_bytes(p, p.from)), [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; ++at) {
        const int64_t row = at / p.width, place = at % p.width;
        const int64_t slot = slot_at(p.table + row * kTableColumns, place, p.slots);
        for (int32_t i = 0; i < p.tensors; ++i) {
          const HeadsRef<const void>& x = p.from[i];
          Out* out = vector_at<Out>(p.to[i], row, place, 0);
          for (int64_t head = 0; head < x.heads; ++head, out += x.size) {
            if (slot < 0) {
              std::fill(out, out + x.size, Out{});
              continue;
            }
            const In* in = vector_at<In>(x, 0, slot, head);
            for (int64_t e = 0; e < x.size; ++e) out[e] = Narrow<Out>::from(static_cast<wide_t<Out>>(widen(in[e])));
          }
        }
      }
    });
  });
}

void pack(const PackParams& p) {
  dispatch_pair(p.from[0].type, p.to[0].type, [&](auto in_type, auto out_type) {
    using In = typename decltype(in_type)::type;
    using Out = typename decltype(out_type)::type;
    using W = wide_t<Out>;
    at::parallel_for(0, p.slots, grain(slot_bytes(p, p.to)), [&](int64_t first, int64_t last) {
      std::vector<Place> holders;
      std::vector<W> sum;
      for (int64_t slot = first; slot < last; ++slot) {
        holders.clear();
        const Range range = holders_of(p, slot);
        for (int64_t holder = range.first; holder < range.last; ++holder) {
          const Place at = place_at(p, holder);
          if (at.row >= 0) holders.push_back(at);
        }
        for (int32_t i = 0; i < p.tensors; ++i) {
          const HeadsRef<const void>& x = p.from[i];
          Out* out = vector_at<Out>(p.to[i], 0, slot, 0);
          sum.resize(static_cast<size_t>(x.size));
          for (int64_t head = 0; head < x.heads; ++head, out += x.size) {
            std::fill(sum.begin(), sum.end(), W(0));
            for (const Place& at : holders) {
              const In* in = vector_at<In>(x, at.row, at.place, head);
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
