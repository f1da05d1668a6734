// How large outputs are written on a CPU: page faults and write-allocate traffic cost more than the copy.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace softprompt_fast::cpu {

// Beyond a shared cache nothing written now is still there when the next layer reads it.
constexpr int64_t kStreamingBytes = int64_t{32} << 20;
constexpr int64_t kHugePage = int64_t{2} << 20;

inline bool prefer_streaming(int64_t bytes) {
#ifdef __AVX512F__
  return bytes >= kStreamingBytes;
#else
  (void)bytes;
  return false;
#endif
}

// Rows are a few kilobytes: a plain vector loop beats memcpy, which starts a string move for each of them.
inline void copy_bytes(void* out, const void* in, int64_t bytes, bool streaming) {
#ifdef __AVX512F__
  char* to = static_cast<char*>(out);
  const char* from = static_cast<const char*>(in);
  const int64_t whole = bytes & ~int64_t{63};
  if (streaming && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    for (int64_t at = 0; at < whole; at += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
  } else {
    int64_t at = 0;
    for (; at + 256 <= whole; at += 256) {
      const __m512i a = _mm512_loadu_si512(from + at), b = _mm512_loadu_si512(from + at + 64);
      const __m512i c = _mm512_loadu_si512(from + at + 128), d = _mm512_loadu_si512(from + at + 192);
      _mm512_storeu_si512(to + at, a);
      _mm512_storeu_si512(to + at + 64, b);
      _mm512_storeu_si512(to + at + 128, c);
      _mm512_storeu_si512(to + at + 192, d);
    }
    for (; at < whole; at += 64) _mm512_storeu_si512(to + at, _mm512_loadu_si512(from + at));
  }
  if (whole < bytes) std::memcpy(to + whole, from + whole, static_cast<size_t>(bytes - whole));
#else
  (void)streaming;
  std::memcpy(out, in, static_cast<size_t>(bytes));
#endif
}

// Rows of the embedding are anywhere in memory: asking for the next one early hides the latency.
inline void prefetch(const void* row, int64_t bytes) {
#if defined(__GNUC__)
  const char* at = static_cast<const char*>(row);
  for (int64_t i = 0; i < bytes && i < 1024; i += 64) __builtin_prefetch(at + i);
#else
  (void)row;
  (void)bytes;
#endif
}

inline void finish_streaming() {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}

// A fresh block of this size is mapped page by page as it is written; huge pages make that 512 times rarer.
inline void prepare_output(void* data, int64_t bytes) {
#ifdef __linux__
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t mask = static_cast<uintptr_t>(kHugePage) - 1;
  const uintptr_t first = (begin + mask) & ~mask, last = (begin + static_cast<uintptr_t>(bytes)) & ~mask;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace softprompt_fast::cpu
