// Shared by the bindings: addresses as pointers, and a kernel run over rows on torch's threads.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "../cpu/isa.h"
#include "../cpu/parallel.h"

namespace rk {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Elements handed out at least: 5 us of arithmetic, a few times what it takes to wake a thread.
constexpr int64_t kGrain = 32768;

// Elements of a large task: several huge pages, so that two threads rarely fault in, and zero, the same one.
constexpr int64_t kLargeTask = int64_t{1} << 20;

// Rows handed to a thread at a time: four tasks a thread where they are large enough, for balance under a
// mask.
inline int64_t rows_per_task(int64_t rows, int64_t elements_per_row, int threads) {
  const int64_t width = std::max<int64_t>(1, elements_per_row);
  const int64_t balanced = std::min(kLargeTask / width, rows / (4 * int64_t{std::max(1, threads)}));
  return std::max({int64_t{1}, kGrain / width, balanced});
}

// Runs the chosen ISA's copy of a kernel over rows [0, rows), `chunk` rows at a time.
template <auto kKernel, class Args>
void run(const Args& args, int64_t rows, int64_t chunk, int threads) {
  parallel_rows(
      rows, chunk, threads,
      [](const void* p, int64_t begin, int64_t end) {
        (kernels().*kKernel)(*static_cast<const Args*>(p), begin, end);
      },
      &args);
}

// Each adds one family's functions to the module.
void bind_full_kl(py::module_& m);
void bind_linear(py::module_& m);
void bind_logits(py::module_& m);
void bind_losses(py::module_& m);
void bind_sampling(py::module_& m);
void bind_scan(py::module_& m);
void bind_tokens(py::module_& m);

}  // namespace rk
