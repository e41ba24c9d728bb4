#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace rk {
namespace {

// libgomp's entry point, which LLVM's and Intel's OpenMP on Linux provide as well.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// torch's wheels bring an OpenMP runtime of their own, under a name that differs between versions. Asking
// libtorch's own dependencies for the symbol finds the very one that torch's threads live in. Linking to one
// at build time may load a second, and threads of the first then spin on cores that the second one needs.
GompParallel find_gomp() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch ? reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel")) : nullptr;
}

// A forked child has none of its parent's threads and an OpenMP runtime that waits for them: there,
// run serially.
std::atomic<bool> forked{false};
const int fork_hook = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Work {
  std::atomic<int64_t> next{0};
  int64_t rows;
  int64_t rows_per_task;
  RangeFn fn;
  const void* args;
};

void drain(void* pointer) {
  Work& work = *static_cast<Work*>(pointer);
  for (;;) {
    const int64_t begin = work.next.fetch_add(work.rows_per_task, std::memory_order_relaxed);
    if (begin >= work.rows) return;
    work.fn(work.args, begin, std::min(begin + work.rows_per_task, work.rows));
  }
}

}  // namespace

void parallel_rows(int64_t rows, int64_t rows_per_task, int threads, RangeFn fn, const void* args) {
  if (threads <= 1 || rows <= rows_per_task || forked) {
    if (rows > 0) fn(args, 0, rows);
    return;
  }
  Work work;
  work.rows = rows;
  work.rows_per_task = rows_per_task;
  work.fn = fn;
  work.args = args;
  static const GompParallel gomp = find_gomp();
  if (gomp) {
    // The whole team even where fewer threads would do:
    // libgomp ends and restarts threads when the size changes.
    gomp(drain, &work, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(drain, &work);
  drain(&work);
  for (std::thread& thread : team) thread.join();
}

}  // namespace rk
