#include "../cpu/sampling.h"

#include "bind.h"

RK_KERNEL_TABLE(RK_SAMPLING_KERNELS)

namespace rk {
namespace {

RK_KEYWORDS(void, sample_tokens, uintptr_t logits, int dtype, int64_t outer, int64_t inner,
            int64_t stride_outer, int64_t stride_inner, int64_t vocab, uintptr_t uniform, uintptr_t mask,
            double temperature, uintptr_t row_temperature, int64_t top_k, double top_p, uintptr_t tokens,
            uintptr_t logprobs, int threads) {
  SampleTokens args = {{pointer<void>(logits), inner, stride_outer, stride_inner},
                       static_cast<Dtype>(dtype),
                       vocab,
                       pointer<double>(uniform),
                       pointer<uint8_t>(mask),
                       pointer<float>(row_temperature),
                       temperature,
                       top_k,
                       top_p,
                       pointer<int64_t>(tokens),
                       pointer<float>(logprobs)};
  const int64_t rows = outer * inner;
  parallel_for_rows(kernels().sample_tokens, args, rows, rows_per_task(rows, vocab, threads), threads);
}

}  // namespace
}  // namespace rk
