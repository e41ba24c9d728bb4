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
  Matmul args = {{pointer<void>(a), static_cast<Dtype>(a_dtype), a_row, a_column},
                 {pointer<void>(b), static_cast<Dtype>(b_dtype), b_row, b_column},
                 pointer<float>(c),
                 c_row,
                 m,
                 n,
                 k,
                 accumulate,
                 0,
                 pairs};
  auto kernel = kernels().matmul;
#ifdef RK_AVX512BF16
  if (pairs && has_bfloat_pairs()) kernel = x86_64_v4_bf16::matmul;
#endif
  // Wide tasks pack A less often; there must be enough of them for every thread.
  const auto tasks_of = [&](int64_t columns) {
    return ((m + kMatmulRows - 1) / kMatmulRows) * ((n + columns - 1) / columns);
  };
  args.task_columns = 8 * kMatmulPanel;
  while (args.task_columns > kMatmulPanel && tasks_of(args.task_columns) < 3 * threads)
    args.task_columns /= 2;
  const int64_t tasks = tasks_of(args.task_columns);
  parallel_for_rows(kernel, args, tasks, 1, threads);
}

}  // namespace
}  // namespace rk
