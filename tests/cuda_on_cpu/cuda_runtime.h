// Enough of CUDA for g++ to run one kernel on the CPU: every thread of a block is a fiber, and whatever waits
// for other threads hands the processor round once. Right for kernels whose threads all wait the same number
// of times; run_block says so when they do not.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulated {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  long waits = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline std::vector<uint32_t> slots;  // what each thread offers in a shuffle

inline void entry() {
  body();
  fibers[current].done = true;
}

// Returns when every other thread of the block has come as far.
inline void wait() {
  ++fibers[current].waits;
  swapcontext(&fibers[current].context, &scheduler);
}

// Runs `kernel` as the threads of one block, in the order of `first`, first + 1, ...: any order is legal.
inline void run_block(unsigned block, unsigned threads, unsigned first, std::function<void()> kernel) {
  fibers = std::vector<Fiber>(threads);
  slots.assign(threads, 0);
  body = std::move(kernel);
  blockIdx.x = block;
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (unsigned i = 0; i < threads; ++i) {
      current = (first + i) % threads;
      threadIdx.x = current;
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      left = true;
    }
  }
  for (const Fiber& fiber : fibers)
    if (fiber.waits != fibers[0].waits) throw std::logic_error("threads of one block waited unequally often");
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(); }

inline float __shfl_down_sync(unsigned, float value, int by) {
  const unsigned self = emulated::current, lane = self % 32;
  memcpy(&emulated::slots[self], &value, sizeof value);
  emulated::wait();
  memcpy(&value, &emulated::slots[lane + by < 32 ? self + by : self], sizeof value);
  emulated::wait();
  return value;
}
