#include "../cpu/logits.h"

#include "bind.h"

RK_KERNEL_TABLE(RK_LOGITS_KERNELS)

namespace rk {
namespace {

// First row whose label is outside [0, vocab), masked rows apart; -1 if there is none.
template <class Label>
int64_t first_bad_label(const void* labels, const uint8_t* mask, int64_t rows, int64_t vocab) {
  const Label* label = static_cast<const Label*>(labels);
  for (int64_t n = 0; n < rows; ++n)
    if ((!mask || mask[n]) && (label[n] < 0 || label[n] >= vocab)) return n;
  return -1;
}

LogprobsArgs logprobs_args(uintptr_t logits, int dtype, int64_t inner, int64_t stride_outer,
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
RK_KEYWORDS(int64_t, selected_logprobs_fwd, uintptr_t logits, int dtype, int64_t outer, int64_t inner,
            int64_t stride_outer, int64_t stride_inner, int64_t vocab, uintptr_t labels, int label_bytes,
            uintptr_t mask, double temperature, uintptr_t row_temperature, uintptr_t logprobs,
            uintptr_t entropy, uintptr_t stats, int threads) {
  LogprobsFwd args = {logprobs_args(logits, dtype, inner, stride_outer, stride_inner, vocab, labels,
                                    label_bytes, mask, temperature, row_temperature),
                      pointer<float>(logprobs), pointer<float>(entropy), pointer<float>(stats)};
  const int64_t rows = outer * inner;
  const int64_t bad =
      (label_bytes == 4 ? first_bad_label<int32_t> : first_bad_label<int64_t>)(args.in.labels.data,
                                                                               args.in.mask, rows, vocab);
  if (bad >= 0) return bad;
  parallel_for_rows(kernels().logprobs_fwd, args, rows, rows_per_task(rows, vocab, threads), threads);
  return -1;
}

RK_KEYWORDS(void, selected_logprobs_bwd, uintptr_t logits, int dtype, int64_t outer, int64_t inner,
            int64_t stride_outer, int64_t stride_inner, int64_t vocab, uintptr_t labels, int label_bytes,
            uintptr_t mask, double temperature, uintptr_t row_temperature, uintptr_t grad_logprobs,
            uintptr_t grad_entropy, uintptr_t stats, uintptr_t entropy, uintptr_t grad,
            int64_t grad_stride_outer, int64_t grad_stride_inner, int threads) {
  LogprobsBwd args = {logprobs_args(logits, dtype, inner, stride_outer, stride_inner, vocab, labels,
                                    label_bytes, mask, temperature, row_temperature),
                      pointer<float>(grad_logprobs),
                      pointer<float>(grad_entropy),
                      pointer<float>(stats),
                      pointer<float>(entropy),
                      {pointer<void>(grad), inner, grad_stride_outer, grad_stride_inner}};
  const int64_t rows = outer * inner;
  parallel_for_rows(kernels().logprobs_bwd, args, rows, rows_per_task(rows, vocab, threads), threads);
}

}  // namespace
}  // namespace rk
