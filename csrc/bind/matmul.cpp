#include "../cpu/matmul.h"

#include "bind.h"

RK_KERNEL_TABLE(RK_MATMUL_KERNELS)

namespace rk {
#ifdef RK_AVX512BF16
namespace x86_64_v4_bf16 {
void matmul(const Matmul&, int64_t begin, int64_t end);
}
#endif
namespace {

RK_KEYWORDS(void, matmul, uintptr_t a, int a_dtype, int64_t a_row, int64_t a_column, uintptr_t b, int b_dtype,
            int64_t b_row, int64_t b_column, uintptr_t c, int64_t c_row, int64_t m, int64_t n, int64_t k,
            bool accumulate, bool pairs, int threads) {
  const Matmul args = {{pointer<void>(a), static_cast<Dtype>(a_dtype), a_row, a_column},
                       {pointer<void>(b), static_cast<Dtype>(b_dtype), b_row, b_column},
                       pointer<float>(c),
                       c_row,
                       m,
                       n,
                       k,
                       accumulate,
                       pairs};
  auto kernel = kernels().matmul;
#ifdef RK_AVX512BF16
  if (pairs && has_bfloat_pairs()) kernel = x86_64_v4_bf16::matmul;
#endif
  const int64_t tasks = ((m + kMatmulRows - 1) / kMatmulRows) * ((n + kMatmulColumns - 1) / kMatmulColumns);
  parallel_for_rows(kernel, args, tasks, 1, threads);
}

}  // namespace
}  // namespace rk
