#include "../cpu/tokens.h"

#include <cmath>

#include "bind.h"

RK_KERNEL_TABLE(RK_TOKENS_KERNELS)

namespace rk {
namespace {

constexpr int64_t kElements = 1024;  // of a chunk: kChunk in csrc/cpu/chunk.h, which only the kernels include

int64_t chunks_of(int64_t size) { return (size + kElements - 1) / kElements; }

Flat flat(uintptr_t data, int dtype, int64_t columns, int64_t stride) {
  return {pointer<void>(data), static_cast<Dtype>(dtype), columns, stride};
}

RK_POSITIONS(void, per_token_kl_fwd, uintptr_t logprobs, int logprobs_dtype, int64_t logprobs_columns,
             int64_t logprobs_stride, uintptr_t ref_logprobs, int ref_logprobs_dtype,
             int64_t ref_logprobs_columns, int64_t ref_logprobs_stride, int estimator, int64_t size,
             uintptr_t kl, uintptr_t slope, int threads) {
  PerTokenKlFwd args = {flat(logprobs, logprobs_dtype, logprobs_columns, logprobs_stride),
                        flat(ref_logprobs, ref_logprobs_dtype, ref_logprobs_columns, ref_logprobs_stride),
                        pointer<float>(kl),
                        pointer<float>(slope),
                        static_cast<Estimator>(estimator),
                        size};
  const int64_t chunks = chunks_of(size);
  parallel_for_rows(kernels().per_token_kl_fwd, args, chunks, rows_per_task(chunks, kElements, threads),
                    threads);
}

RK_POSITIONS(void, per_token_kl_bwd, uintptr_t grad, uintptr_t slope, int64_t size, uintptr_t grad_logprobs,
             int grad_logprobs_dtype, uintptr_t grad_ref_logprobs, int grad_ref_logprobs_dtype, int threads) {
  PerTokenKlBwd args = {flat(grad, 0, size, size),
                        flat(slope, 0, size, size),
                        pointer<void>(grad_logprobs),
                        pointer<void>(grad_ref_logprobs),
                        static_cast<Dtype>(grad_logprobs_dtype),
                        static_cast<Dtype>(grad_ref_logprobs_dtype),
                        size};
  const int64_t chunks = chunks_of(size);
  parallel_for_rows(kernels().per_token_kl_bwd, args, chunks, rows_per_task(chunks, kElements, threads),
                    threads);
}

RK_POSITIONS(void, shaped_rewards, uintptr_t kl, int dtype, int64_t batch, int64_t time, int64_t kl_stride,
             uintptr_t mask, int64_t mask_stride, uintptr_t scores, double kl_coef, double clip,
             uintptr_t rewards, int threads) {
  ShapedRewards args = {flat(kl, dtype, time, kl_stride), pointer<uint8_t>(mask),  mask_stride,
                        pointer<float>(scores),           pointer<float>(rewards), time,
                        static_cast<float>(kl_coef),      static_cast<float>(clip)};
  parallel_for_rows(kernels().shaped_rewards, args, batch, rows_per_task(batch, time, threads), threads);
}

// Of parts [count, 3] (count, mean, sum of squared distances), in order. The distances are taken to the mean
// of all, which is known by then, so that no digits go where the mean is large; in double, where its own
// rounding is 1e-16.
void merge(const double* parts, int64_t parts_count, double* merged) {
  double count = 0, sum = 0, squares = 0;
  for (int64_t i = 0; i < parts_count; ++i) {
    count += parts[3 * i];
    sum += parts[3 * i] * parts[3 * i + 1];
  }
  const double mean = count > 0 ? sum / count : 0;
  for (int64_t i = 0; i < parts_count; ++i) {
    const double distance = parts[3 * i + 1] - mean;
    squares += parts[3 * i + 2] + parts[3 * i] * distance * distance;
  }
  merged[0] = count;
  merged[1] = mean;
  merged[2] = squares;
}

Whitening whitening(const Flat& x, const FlatMask& mask, int64_t size, const double* moments, double eps) {
  const float high = static_cast<float>(moments[1]);
  const double variance = moments[2] / std::max(moments[0], 1.0);
  return {x,
          mask,
          size,
          high,
          static_cast<float>(moments[1] - high),
          static_cast<float>(1 / std::sqrt(variance + eps))};
}

RK_POSITIONS(void, whiten_moments, uintptr_t x, int dtype, int64_t x_columns, int64_t x_stride,
             uintptr_t mask, int64_t mask_columns, int64_t mask_stride, int64_t size, uintptr_t partials,
             uintptr_t moments, int threads) {
  WhitenMoments args = {{flat(x, dtype, x_columns, x_stride),
                         {pointer<uint8_t>(mask), mask_columns, mask_stride},
                         size,
                         0,
                         0,
                         0},
                        pointer<double>(partials)};
  const int64_t chunks = chunks_of(size);
  parallel_for_rows(kernels().whiten_moments, args, chunks, rows_per_task(chunks, kElements, threads),
                    threads);
  merge(args.partials, chunks, pointer<double>(moments));
}

// `parts` [ranks, 3] are merged into `moments` [3] first; none if `moments` hold already.
RK_POSITIONS(void, whiten_fwd, uintptr_t x, int dtype, int64_t x_columns, int64_t x_stride, uintptr_t mask,
             int64_t mask_columns, int64_t mask_stride, int64_t size, uintptr_t parts, int64_t parts_count,
             uintptr_t moments, double eps, bool keep_mean, uintptr_t y, int threads) {
  if (parts_count) merge(pointer<double>(parts), parts_count, pointer<double>(moments));
  WhitenApply args = {
      whitening(flat(x, dtype, x_columns, x_stride), {pointer<uint8_t>(mask), mask_columns, mask_stride},
                size, pointer<double>(moments), eps),
      pointer<float>(y), keep_mean};
  const int64_t chunks = chunks_of(size);
  parallel_for_rows(kernels().whiten_apply, args, chunks, rows_per_task(chunks, kElements, threads), threads);
}

RK_POSITIONS(void, whiten_bwd, uintptr_t x, int dtype, int64_t x_columns, int64_t x_stride, uintptr_t mask,
             int64_t mask_columns, int64_t mask_stride, int64_t size, uintptr_t grad, uintptr_t moments,
             double eps, bool keep_mean, uintptr_t partials, uintptr_t grad_x, int threads) {
  const Whitening in =
      whitening(flat(x, dtype, x_columns, x_stride), {pointer<uint8_t>(mask), mask_columns, mask_stride},
                size, pointer<double>(moments), eps);
  const Flat grads = flat(grad, 0, size, size);
  const int64_t chunks = chunks_of(size);
  const int64_t task = rows_per_task(chunks, kElements, threads);
  WhitenSums sums = {in, grads, pointer<double>(partials)};
  parallel_for_rows(kernels().whiten_sums, sums, chunks, task, threads);
  double total = 0, total_y = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    total += sums.partials[2 * i];
    total_y += sums.partials[2 * i + 1];
  }
  const double count = std::max(*pointer<double>(moments), 1.0);
  WhitenBwd args = {in,
                    grads,
                    pointer<void>(grad_x),
                    static_cast<Dtype>(dtype),
                    keep_mean,
                    static_cast<float>(total / count),
                    static_cast<float>(total_y / count)};
  parallel_for_rows(kernels().whiten_bwd, args, chunks, task, threads);
}

}  // namespace
}  // namespace rk
