#include "../cpu/linear.h"

#include "bind.h"

RK_KERNEL_TABLE(RK_LINEAR_KERNELS)

namespace rk {
namespace {

HeadTile head_tile(uintptr_t data, int dtype, int64_t stride, int64_t width, int64_t first, uintptr_t bias,
                   double softcap, double scale, uintptr_t labels, int label_bytes, double temperature,
                   uintptr_t row_temperature) {
  return {pointer<void>(data),
          static_cast<Dtype>(dtype),
          stride,
          width,
          first,
          pointer<float>(bias),
          static_cast<float>(softcap),
          static_cast<float>(scale),
          {pointer<void>(labels), label_bytes},
          pointer<float>(row_temperature),
          temperature};
}

RK_KEYWORDS(void, online_softmax_update, uintptr_t data, int dtype, int64_t rows, int64_t stride,
            int64_t width, int64_t first, uintptr_t bias, double softcap, double scale, uintptr_t labels,
            int label_bytes, double temperature, uintptr_t row_temperature, uintptr_t state, bool entropy,
            int threads) {
  const OnlineSoftmax args = {head_tile(data, dtype, stride, width, first, bias, softcap, scale, labels,
                                        label_bytes, temperature, row_temperature),
                              pointer<double>(state), entropy};
  parallel_for_rows(kernels().online_softmax_update, args, rows, rows_per_task(rows, width, threads),
                    threads);
}

RK_KEYWORDS(void, linear_gradient, uintptr_t data, int dtype, int64_t rows, int64_t stride, int64_t width,
            int64_t first, uintptr_t bias, double softcap, double scale, uintptr_t labels, int label_bytes,
            double temperature, uintptr_t row_temperature, uintptr_t coefficients, bool narrow, int threads) {
  const LinearGradient args = {head_tile(data, dtype, stride, width, first, bias, softcap, scale, labels,
                                         label_bytes, temperature, row_temperature),
                               pointer<float>(coefficients), narrow};
  parallel_for_rows(kernels().linear_gradient, args, rows, rows_per_task(rows, width, threads), threads);
}

}  // namespace
}  // namespace rk
