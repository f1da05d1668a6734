// Plays CUDA thread code on a CPU: include this, then the kernels. Blocks run one after the other, the threads of a
// block as fibers that take turns at __syncthreads, so a barrier means what it means on a GPU. Between two barriers a
// thread runs alone, in an order that changes from one barrier to the next: code that lacks one goes wrong here too.
//
// Under ThreadSanitizer every fiber is a thread of its own and only barriers order them, so a lacking one is reported.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

// What the sanitizers are told of a switch from a thread to the scheduler, in the function that switches.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SPF_LEAVE(block, saved) __sanitizer_start_switch_fiber(saved, (block).main_, (block).main_size_)
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SPF_LEAVE(block, saved) __tsan_switch_to_fiber((block).main_, __tsan_switch_to_fiber_no_sync)
#else
#define SPF_LEAVE(block, saved)
#endif

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace cuda_on_cpu {

// Relaxed: reading one orders nothing, so that a sanitizer does not take it for a barrier.
template <class T>
class Shared {
 public:
  Shared() = default;
  Shared(const Shared& other) : value_(static_cast<T>(other)) {}
  operator T() const { return value_.load(std::memory_order_relaxed); }
  void operator=(T value) { value_.store(value, std::memory_order_relaxed); }

 private:
  std::atomic<T> value_{};
};

struct Index {
  Shared<unsigned> x, y, z;
};

class Block {
 public:
  explicit Block(unsigned threads)
      : fibers_(threads), stacks_(threads * kStackBytes), order_(threads), exchanged_(threads) {
    for (unsigned i = 0; i < threads; ++i) {
      order_[i] = i;
      fibers_[i].stack = &stacks_[i * kStackBytes];
    }
#if defined(__SANITIZE_THREAD__)
    main_ = __tsan_get_current_fiber();
    for (Fiber& fiber : fibers_) fiber.identity = __tsan_create_fiber(0);
#endif
  }

  ~Block() {
#if defined(__SANITIZE_THREAD__)
    for (Fiber& fiber : fibers_) __tsan_destroy_fiber(fiber.identity);
#endif
  }

  unsigned threads() const { return static_cast<unsigned>(fibers_.size()); }

  // Runs every thread of one block to its end.
  void run(const std::function<void()>& thread_code);

  // Called by a thread: lets the others come as far.
  void barrier() {
    Fiber& fiber = fibers_[running_];
    const unsigned round = round_;
    before_barrier(round);
    SPF_LEAVE(*this, &fiber.saved);
    swapcontext(&fiber.context, &scheduler_);
    arrive(fiber.saved, round);
  }

  // Called by every thread of the block: the value that the lane `distance` below gives, or its own if there is none.
  int64_t from_lane_below(unsigned thread, int64_t value, unsigned distance) {
    exchanged_[thread] = value;
    barrier();
    const int64_t found = exchanged_[thread % kWarp >= distance ? thread - distance : thread];
    barrier();
    return found;
  }

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr unsigned kWarp = 32;

  struct Fiber {
    ucontext_t context;
    char* stack;
    Shared<bool> ended;
    void *saved = nullptr, *identity = nullptr;  // of the sanitizers
  };

  // Not instrumented: it begins as this thread and ends as the scheduler.
  static __attribute__((no_sanitize_thread)) void enter() {
    Block& block = *current();
    block.arrive(nullptr, block.round_ - 1);
    (*block.code_)();
    block.end();
    SPF_LEAVE(block, nullptr);  // uc_link leads back to the scheduler
  }

  void end() {
    fibers_[running_].ended = true;
    before_barrier(round_);
  }

  void resume(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void* saved;
    __sanitizer_start_switch_fiber(&saved, fiber.stack, kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#else
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.identity, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&scheduler_, &fiber.context);
#endif
  }

  // A thread goes on after a switch, at its beginning (`saved`: null) or after a barrier.
  void arrive([[maybe_unused]] void* saved, unsigned round) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, &main_, &main_size_);
#endif
    after_barrier(round);
  }
  // Two objects in turn: who comes from one barrier must not see who is at the next one already.
  void before_barrier([[maybe_unused]] unsigned round) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&barriers_[round % 2]);
#endif
  }
  void after_barrier([[maybe_unused]] unsigned round) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&barriers_[round % 2]);
#endif
  }

  std::vector<Fiber> fibers_;
  std::vector<char> stacks_;
  std::vector<unsigned> order_;
  std::vector<int64_t> exchanged_;
  std::minstd_rand random_;
  ucontext_t scheduler_;
  const std::function<void()>* code_ = nullptr;
  Shared<unsigned> running_, round_;
  char barriers_[2] = {};
#if defined(__SANITIZE_ADDRESS__)
  const void* main_ = nullptr;  // the scheduler's stack
  size_t main_size_ = 0;
#else
  void* main_ = nullptr;
#endif
};

}  // namespace cuda_on_cpu

inline cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_on_cpu::Block::current()->barrier(); }

// Only where all threads of a block call it, not those of one warp alone: it waits for the block.
inline int64_t __shfl_up_sync(unsigned, int64_t value, unsigned distance) {
  return cuda_on_cpu::Block::current()->from_lane_below(threadIdx.x, value, distance);
}

namespace cuda_on_cpu {

inline void Block::run(const std::function<void()>& thread_code) {
  current() = this;
  code_ = &thread_code;
  for (Fiber& fiber : fibers_) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    fiber.ended = false;
    makecontext(&fiber.context, enter, 0);
  }
  before_barrier(round_);
  for (size_t ended = 0; ended < fibers_.size();) {
    round_ = round_ + 1;
    std::shuffle(order_.begin(), order_.end(), random_);
    for (const unsigned thread : order_) {
      running_ = thread;
      threadIdx.x = thread;
      resume(fibers_[thread]);
      ended += fibers_[thread].ended ? 1 : 0;
    }
    if (ended != 0 && ended != fibers_.size())
      throw std::runtime_error("divergent barrier: some threads of a block ended while others wait");
  }
  after_barrier(0);
  after_barrier(1);
}

// kernel<<<blocks, threads>>>(arguments...)
template <class Kernel, class... Arguments>
void play(Kernel kernel, unsigned blocks, unsigned threads, const Arguments&... arguments) {
  static std::unique_ptr<Block> kept;  // making fibers takes longer than small kernels
  if (!kept || kept->threads() != threads) kept = std::make_unique<Block>(threads);
  Block& block = *kept;
  gridDim.x = blocks;
  blockDim.x = threads;
  const std::function<void()> code = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    block.run(code);
  }
}

}  // namespace cuda_on_cpu
