#include "../cpu/full_kl.h"

#include "bind.h"

RK_KERNEL_TABLE(RK_FULL_KL_KERNELS)

namespace rk {
namespace {

FullKlArgs full_kl_args(uintptr_t logits, int64_t stride_outer, int64_t stride_inner, uintptr_t ref,
                        int64_t ref_stride_outer, int64_t ref_stride_inner, int dtype, int64_t inner,
                        int64_t vocab, int direction, uintptr_t mask, double temperature,
                        uintptr_t row_temperature) {
  return {{pointer<void>(logits), inner, stride_outer, stride_inner},
          {pointer<void>(ref), inner, ref_stride_outer, ref_stride_inner},
          static_cast<Dtype>(dtype),
          static_cast<Divergence>(direction),
          vocab,
          pointer<uint8_t>(mask),
          pointer<float>(row_temperature),
          temperature};
}

RK_KEYWORDS(void, full_kl_fwd, uintptr_t logits, int64_t stride_outer, int64_t stride_inner, uintptr_t ref,
            int64_t ref_stride_outer, int64_t ref_stride_inner, int dtype, int64_t outer, int64_t inner,
            int64_t vocab, int direction, uintptr_t mask, double temperature, uintptr_t row_temperature,
            uintptr_t kl, uintptr_t stats, int threads) {
  const FullKlFwd args = {
      full_kl_args(logits, stride_outer, stride_inner, ref, ref_stride_outer, ref_stride_inner, dtype, inner,
                   vocab, direction, mask, temperature, row_temperature),
      pointer<float>(kl), pointer<float>(stats)};
  const int64_t rows = outer * inner;
  parallel_for_rows(kernels().full_kl_fwd, args, rows, rows_per_task(rows, 2 * vocab, threads), threads);
}

RK_KEYWORDS(void, full_kl_bwd, uintptr_t logits, int64_t stride_outer, int64_t stride_inner, uintptr_t ref,
            int64_t ref_stride_outer, int64_t ref_stride_inner, int dtype, int64_t outer, int64_t inner,
            int64_t vocab, int direction, uintptr_t mask, double temperature, uintptr_t row_temperature,
            uintptr_t grad_kl, uintptr_t stats, uintptr_t grad, int threads) {
  // The gradient is contiguous.
  const FullKlBwd args = {
      full_kl_args(logits, stride_outer, stride_inner, ref, ref_stride_outer, ref_stride_inner, dtype, inner,
                   vocab, direction, mask, temperature, row_temperature),
      pointer<float>(grad_kl),
      pointer<float>(stats),
      {pointer<void>(grad), inner, inner * vocab, vocab}};
  const int64_t rows = outer * inner;
  parallel_for_rows(kernels().full_kl_bwd, args, rows, rows_per_task(rows, 2 * vocab, threads), threads);
}

}  // namespace
}  // namespace rk
