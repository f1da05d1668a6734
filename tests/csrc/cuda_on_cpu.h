// Plays CUDA thread code on a CPU: include this, then the kernels. Blocks run one after the other, the threads of a
// block as fibers that take turns at __syncthreads, so a barrier means what it means on a GPU. Between two barriers a
// thread runs alone, in an order that changes from one barrier to the next: code that lacks one goes wrong here too.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

class Block {
 public:
  explicit Block(unsigned threads) : fibers_(threads), stacks_(threads * kStackBytes), order_(threads) {
    for (unsigned i = 0; i < threads; ++i) order_[i] = i;
  }

  // Runs every thread of one block to its end.
  void run(const std::function<void()>& thread_code);

  // Called by a thread: lets the others come as far.
  void barrier() { swapcontext(&fibers_[running_].context, &scheduler_); }

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  struct Fiber {
    ucontext_t context;
    bool ended;
  };

  static void enter() {
    Block& block = *current();
    (*block.code_)();
    block.fibers_[block.running_].ended = true;  // uc_link leads back to the scheduler
  }

  std::vector<Fiber> fibers_;
  std::vector<char> stacks_;
  std::vector<unsigned> order_;
  std::minstd_rand random_;
  ucontext_t scheduler_;
  const std::function<void()>* code_ = nullptr;
  unsigned running_ = 0;
};

}  // namespace cuda_on_cpu

inline cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_on_cpu::Block::current()->barrier(); }

namespace cuda_on_cpu {

inline void Block::run(const std::function<void()>& thread_code) {
  current() = this;
  code_ = &thread_code;
  for (size_t i = 0; i < fibers_.size(); ++i) {
    getcontext(&fibers_[i].context);
    fibers_[i].context.uc_stack.ss_sp = &stacks_[i * kStackBytes];
    fibers_[i].context.uc_stack.ss_size = kStackBytes;
    fibers_[i].context.uc_link = &scheduler_;
    fibers_[i].ended = false;
    makecontext(&fibers_[i].context, enter, 0);
  }
  for (size_t ended = 0; ended < fibers_.size();) {
    std::shuffle(order_.begin(), order_.end(), random_);
    for (const unsigned thread : order_) {
      running_ = threadIdx.x = thread;
      swapcontext(&scheduler_, &fibers_[thread].context);
      ended += fibers_[thread].ended ? 1 : 0;
    }
    if (ended != 0 && ended != fibers_.size())
      throw std::runtime_error("divergent barrier: some threads of a block ended while others wait");
  }
}

// kernel<<<blocks, threads>>>(arguments...)
template <class Kernel, class... Arguments>
void play(Kernel kernel, unsigned blocks, unsigned threads, const Arguments&... arguments) {
  Block block(threads);
  gridDim.x = blocks;
  blockDim.x = threads;
  const std::function<void()> code = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) block.run(code);
}

}  // namespace cuda_on_cpu
