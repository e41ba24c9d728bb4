// rlhf_kernels._native: addresses, sizes and strides in, numbers into the caller's memory. No torch header:
// one build works with every torch version. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using rk::Dtype;

// Elements handed out at least: 5 us of arithmetic, a few times what it takes to wake a thread.
constexpr int64_t kGrain = 32768;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Elements of a large task: several huge pages, so that two threads rarely fault in, and zero, the same one.
constexpr int64_t kLargeTask = int64_t{1} << 20;

// Rows handed to a thread at a time: four tasks a thread where they are large enough, for balance under a
// mask.
int64_t rows_per_task(int64_t rows, int64_t elements_per_row, int threads) {
  const int64_t width = std::max<int64_t>(1, elements_per_row);
  const int64_t balanced = std::min(kLargeTask / width, rows / (4 * int64_t{std::max(1, threads)}));
  return std::max({int64_t{1}, kGrain / width, balanced});
}

// First row whose label is outside [0, vocab), masked rows apart; -1 if there is none.
template <class Label>
int64_t first_bad_label(const void* labels, const uint8_t* mask, int64_t rows, int64_t vocab) {
  const Label* label = static_cast<const Label*>(labels);
  for (int64_t n = 0; n < rows; ++n)
    if ((!mask || mask[n]) && (label[n] < 0 || label[n] >= vocab)) return n;
  return -1;
}

rk::LogprobsArgs logprobs_args(uintptr_t logits, int dtype, int64_t inner, int64_t stride_outer,
                               int64_t stride_inner, int64_t vocab, uintptr_t labels, int label_bytes,
                               uintptr_t mask, double temperature, uintptr_t row_temperature) {
  return {{pointer<void>(logits), inner, stride_outer, stride_inner},
          static_cast<Dtype>(dtype),
          vocab,
          {pointer<void>(labels), label_bytes},
          pointer<uint8_t>(mask),
          pointer<float>(row_temperature),
          temperature};
}

// Returns the first row with a bad label, and then has computed nothing; -1 when all is done.
int64_t selected_logprobs_fwd(uintptr_t logits, int dtype, int64_t outer, int64_t inner, int64_t stride_outer,
                              int64_t stride_inner, int64_t vocab, uintptr_t labels, int label_bytes,
                              uintptr_t mask, double temperature, uintptr_t row_temperature,
                              uintptr_t logprobs, uintptr_t entropy, uintptr_t stats, int threads) {
  rk::LogprobsFwd args = {logprobs_args(logits, dtype, inner, stride_outer, stride_inner, vocab, labels,
                                        label_bytes, mask, temperature, row_temperature),
                          pointer<float>(logprobs), pointer<float>(entropy), pointer<float>(stats)};
  const int64_t rows = outer * inner;
  const int64_t bad =
      (label_bytes == 4 ? first_bad_label<int32_t> : first_bad_label<int64_t>)(args.in.labels.data,
                                                                               args.in.mask, rows, vocab);
  if (bad >= 0) return bad;
  rk::parallel_rows(
      rows, rows_per_task(rows, vocab, threads), threads,
      [](const void* p, int64_t begin, int64_t end) {
        rk::kernels().logprobs_fwd(*static_cast<const rk::LogprobsFwd*>(p), begin, end);
      },
      &args);
  return -1;
}

void selected_logprobs_bwd(uintptr_t logits, int dtype, int64_t outer, int64_t inner, int64_t stride_outer,
                           int64_t stride_inner, int64_t vocab, uintptr_t labels, int label_bytes,
                           uintptr_t mask, double temperature, uintptr_t row_temperature,
                           uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t stats,
                           uintptr_t entropy, uintptr_t grad, int64_t grad_stride_outer,
                           int64_t grad_stride_inner, int threads) {
  rk::LogprobsBwd args = {logprobs_args(logits, dtype, inner, stride_outer, stride_inner, vocab, labels,
                                        label_bytes, mask, temperature, row_temperature),
                          pointer<float>(grad_logprobs),
                          pointer<float>(grad_entropy),
                          pointer<float>(stats),
                          pointer<float>(entropy),
                          {pointer<void>(grad), inner, grad_stride_outer, grad_stride_inner}};
  const int64_t rows = outer * inner;
  rk::parallel_rows(
      rows, rows_per_task(rows, vocab, threads), threads,
      [](const void* p, int64_t begin, int64_t end) {
        rk::kernels().logprobs_bwd(*static_cast<const rk::LogprobsBwd*>(p), begin, end);
      },
      &args);
}

void gae(uintptr_t rewards, uintptr_t values, int dtype, uintptr_t mask, uintptr_t bootstrap, int64_t batch,
         int64_t time, int64_t stride_rewards, int64_t stride_values, int64_t stride_mask, double gamma,
         double lam, int holes, uintptr_t advantages, uintptr_t returns, int threads) {
  rk::Gae args = {pointer<void>(rewards),
                  pointer<void>(values),
                  pointer<uint8_t>(mask),
                  pointer<float>(bootstrap),
                  pointer<float>(advantages),
                  pointer<float>(returns),
                  stride_rewards,
                  stride_values,
                  stride_mask,
                  batch,
                  time,
                  static_cast<Dtype>(dtype),
                  static_cast<rk::Holes>(holes),
                  static_cast<float>(gamma),
                  static_cast<float>(lam)};
  // A multiple of the widest vector, one lane per row.
  const int64_t chunk = (rows_per_task(batch, time, threads) + 15) / 16 * 16;
  rk::parallel_rows(
      batch, chunk, threads,
      [](const void* p, int64_t begin, int64_t end) {
        rk::kernels().gae(*static_cast<const rk::Gae*>(p), begin, end);
      },
      &args);
}

// Asks for huge pages under [address, address + bytes), not touched yet. Only a hint: refusal costs speed
// alone.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (address + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (address + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(address), static_cast<void>(bytes);
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  const char* forced = std::getenv("RLHF_KERNELS_ISA");
  try {
    rk::set_isa(forced && *forced ? forced : rk::available_isas().at(0));
  } catch (const std::exception& error) {
    throw py::import_error(std::string("RLHF_KERNELS_ISA: ") + error.what());
  }
  m.doc() = "CPU kernels over raw pointers; called by rlhf_kernels.backends.cpu alone.";
  m.def("isa", &rk::isa);
  m.def("available_isas", &rk::available_isas);
  m.def("set_isa", &rk::set_isa);
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("selected_logprobs_fwd", &selected_logprobs_fwd, nogil);
  m.def("selected_logprobs_bwd", &selected_logprobs_bwd, nogil);
  m.def("gae", &gae, nogil);
  m.def("advise_huge_pages", &advise_huge_pages, nogil);
}
