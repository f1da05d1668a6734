// How work is divided among threads on a CPU.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace softprompt_fast::cpu {

// Work below this many bytes is not worth a second thread.
constexpr int64_t kBytesPerTask = 64 * 1024;

// Items of this size that a thread takes at least: the grain of at::parallel_for.
inline int64_t grain(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_item));
}

// Calls a task with every index below `count`. make_task() is called once a thread: its task owns the thread's scratch.
// Threads take the next index that is left; the results must not depend on which thread takes which.
template <class MakeTask>
void run_tasks(int64_t count, const MakeTask& make_task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      auto task = make_task();
      for (int64_t index; (index = next.fetch_add(1)) < count;) task(index);
    }
  });
}

}  // namespace softprompt_fast::cpu
