// Stands in for torch's header of this name, so that the CPU kernels compile without torch and divide their work among
// std::threads: ThreadSanitizer sees those, but it does not see what libgomp does. Work is divided however small it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int& num_threads() {
  static int threads = 1;
  return threads;
}

inline int get_num_threads() { return num_threads(); }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin >= end) return;
  const int64_t parts = std::min<int64_t>(num_threads(), end - begin);
  std::vector<std::thread> others;
  const auto part = [&](int64_t i) { f(begin + (end - begin) * i / parts, begin + (end - begin) * (i + 1) / parts); };
  for (int64_t i = 1; i < parts; ++i) others.emplace_back(part, i);
  part(0);
  for (std::thread& other : others) other.join();
}

}  // namespace at
