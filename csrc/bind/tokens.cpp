#include "bind.h"

namespace rk {
namespace {

constexpr int64_t kElements = 1024;  // of a chunk: kChunk in csrc/cpu/chunk.h, which only the kernels include

int64_t chunks_of(int64_t size) { return (size + kElements - 1) / kElements; }

Flat flat(uintptr_t data, int dtype, int64_t columns, int64_t stride) {
  return {pointer<void>(data), static_cast<Dtype>(dtype), columns, stride};
}

void per_token_kl_fwd(uintptr_t logprobs, int dtype, int64_t columns, int64_t stride, uintptr_t ref,
                      int ref_dtype, int64_t ref_columns, int64_t ref_stride, int estimator, int64_t size,
                      uintptr_t kl, uintptr_t slope, int threads) {
  PerTokenKlFwd args = {flat(logprobs, dtype, columns, stride),
                        flat(ref, ref_dtype, ref_columns, ref_stride),
                        pointer<float>(kl),
                        pointer<float>(slope),
                        static_cast<Estimator>(estimator),
                        size};
  const int64_t chunks = chunks_of(size);
  run<&Kernels::per_token_kl_fwd>(args, chunks, rows_per_task(chunks, kElements, threads), threads);
}

void per_token_kl_bwd(uintptr_t grad, uintptr_t slope, int64_t size, uintptr_t grad_logprobs, int dtype,
                      uintptr_t grad_ref, int ref_dtype, int threads) {
  PerTokenKlBwd args = {flat(grad, 0, size, size),
                        flat(slope, 0, size, size),
                        pointer<void>(grad_logprobs),
                        pointer<void>(grad_ref),
                        static_cast<Dtype>(dtype),
                        static_cast<Dtype>(ref_dtype),
                        size};
  const int64_t chunks = chunks_of(size);
  run<&Kernels::per_token_kl_bwd>(args, chunks, rows_per_task(chunks, kElements, threads), threads);
}

}  // namespace

void bind_tokens(py::module_& m) {
  m.def("per_token_kl_fwd", &per_token_kl_fwd, NoGil());
  m.def("per_token_kl_bwd", &per_token_kl_bwd, NoGil());
}

}  // namespace rk
