// Numbers that change the kernels' speed and not their results. benchmarks/kernels compiles others in their place.
#pragma once

#ifndef SPF_THREADS
#define SPF_THREADS 128
#endif
#ifndef SPF_MIN_BLOCKS
#define SPF_MIN_BLOCKS 5
#endif
#ifndef SPF_MIN_TILE
#define SPF_MIN_TILE 8
#endif
#ifndef SPF_FLIGHT
#define SPF_FLIGHT 4
#endif

namespace softprompt_fast::cuda {

constexpr int kMaxThreads = SPF_THREADS;    // per block
constexpr int kMinBlocks = SPF_MIN_BLOCKS;  // per multiprocessor: enough accesses under way to keep the memory busy
constexpr int kMinTile = SPF_MIN_TILE;      // output slots per block
constexpr int kFlight = SPF_FLIGHT;         // loads that a thread starts before it uses the first

}  // namespace softprompt_fast::cuda
