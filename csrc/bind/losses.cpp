#include "../cpu/losses.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bind.h"

RK_KERNEL_TABLE(RK_LOSSES_KERNELS)

namespace rk {
namespace {

// Units of work in all; `tile` is T where whole rows matter.
int64_t units(const Tiles& tiles, int64_t rows) {
  return tiles.time ? rows * ((tiles.time + tiles.tile - 1) / tiles.tile) : 0;
}

// stats: the six of the op, then the denominator, so that backward finds it in a tensor.
void finish_policy(const PolicyPartial* partials, int64_t count, double denominator, float* loss,
                   float* stats) {
  PolicyPartial sum = {};
  for (int64_t i = 0; i < count; ++i) {
    const PolicyPartial& p = partials[i];
    sum.loss += p.loss;
    sum.count += p.count;
    sum.kl += p.kl;
    sum.low += p.low;
    sum.high += p.high;
    sum.dual += p.dual;
    sum.ratio += p.ratio;
    sum.ratio_max = p.ratio_max > sum.ratio_max || std::isnan(p.ratio_max) ? p.ratio_max : sum.ratio_max;
  }
  const double tokens = std::max(1.0, sum.count);
  const double divisor = std::isnan(denominator) ? tokens : denominator;
  *loss = static_cast<float>(sum.loss / divisor);
  const double results[] = {
      sum.kl / tokens, sum.low / tokens, sum.high / tokens, sum.dual / tokens, sum.ratio / tokens,
      sum.ratio_max,   divisor};
  for (double result : results) *stats++ = static_cast<float>(result);
}

// stats: the two of the op, then the denominator.
void finish_value(const ValuePartial* partials, int64_t count, double denominator, float* loss,
                  float* stats) {
  double total = 0, tokens = 0, clipped = 0, returns = 0, d = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += partials[i].loss;
    tokens += partials[i].count;
    clipped += partials[i].clipped;
    returns += partials[i].count * partials[i].mean_return;
    d += partials[i].count * partials[i].mean_d;
  }
  tokens = std::max(1.0, tokens);
  double m2_returns = 0, m2_d = 0;
  for (int64_t i = 0; i < count; ++i) {
    const ValuePartial& p = partials[i];
    const double off_return = p.mean_return - returns / tokens, off_d = p.mean_d - d / tokens;
    m2_returns += p.m2_return + p.count * off_return * off_return;
    m2_d += p.m2_d + p.count * off_d * off_d;
  }
  const double divisor = std::isnan(denominator) ? tokens : denominator;
  *loss = static_cast<float>(total / divisor);
  stats[0] = static_cast<float>(clipped / tokens);
  stats[1] = m2_returns > 0 ? static_cast<float>(1 - m2_d / m2_returns) : 0.0f;
  stats[2] = static_cast<float>(divisor);
}

Matrix matrix(uintptr_t data, int dtype, int64_t stride) {
  return {pointer<void>(data), static_cast<Dtype>(dtype), stride};
}

// denominator: NaN = the number of counted tokens.
RK_POSITIONS(void, policy_loss, uintptr_t logprobs, int logprobs_dtype, int64_t logprobs_stride,
             uintptr_t old_logprobs, int old_logprobs_dtype, int64_t old_logprobs_stride,
             uintptr_t advantages, int advantages_dtype, int64_t advantages_stride, uintptr_t weights,
             int weights_dtype, int64_t weights_stride, uintptr_t mask, int64_t mask_stride, int64_t rows,
             int64_t time, int64_t tile, double low, double high, double dual_clip, int ratio, bool row_means,
             double denominator, uintptr_t loss, uintptr_t stats, uintptr_t grad, int threads) {
  PolicyLoss args = {matrix(logprobs, logprobs_dtype, logprobs_stride),
                     matrix(old_logprobs, old_logprobs_dtype, old_logprobs_stride),
                     matrix(advantages, advantages_dtype, advantages_stride),
                     matrix(weights, weights_dtype, weights_stride),
                     {time, tile, pointer<uint8_t>(mask), mask_stride, pointer<float>(grad)},
                     static_cast<float>(low),
                     static_cast<float>(high),
                     static_cast<float>(dual_clip),
                     static_cast<Ratio>(ratio),
                     row_means,
                     nullptr};
  const int64_t count = units(args.tiles, rows);
  std::vector<PolicyPartial> partials(count);
  args.partials = partials.data();
  parallel_for_rows(kernels().policy_loss, args, count, rows_per_task(count, tile, threads), threads);
  finish_policy(args.partials, count, denominator, pointer<float>(loss), pointer<float>(stats));
}

RK_POSITIONS(void, value_loss, uintptr_t values, int values_dtype, int64_t values_stride,
             uintptr_t old_values, int old_values_dtype, int64_t old_values_stride, uintptr_t returns,
             int returns_dtype, int64_t returns_stride, uintptr_t mask, int64_t mask_stride, int64_t rows,
             int64_t time, int64_t tile, double clip, bool row_means, double denominator, uintptr_t loss,
             uintptr_t stats, uintptr_t grad, int threads) {
  ValueLoss args = {matrix(values, values_dtype, values_stride),
                    matrix(old_values, old_values_dtype, old_values_stride),
                    matrix(returns, returns_dtype, returns_stride),
                    {time, tile, pointer<uint8_t>(mask), mask_stride, pointer<float>(grad)},
                    static_cast<float>(clip),
                    row_means,
                    nullptr};
  const int64_t count = units(args.tiles, rows);
  std::vector<ValuePartial> partials(count);
  args.partials = partials.data();
  parallel_for_rows(kernels().value_loss, args, count, rows_per_task(count, tile, threads), threads);
  finish_value(args.partials, count, denominator, pointer<float>(loss), pointer<float>(stats));
}

// grad_x = grad * upstream / denominator.
RK_POSITIONS(void, loss_bwd, uintptr_t grad, int64_t size, uintptr_t upstream, uintptr_t denominator,
             uintptr_t grad_x, int dtype, int threads) {
  const LossBwd args = {pointer<float>(grad), *pointer<float>(upstream) / *pointer<float>(denominator),
                        pointer<void>(grad_x), static_cast<Dtype>(dtype)};
  parallel_for_rows(kernels().loss_bwd, args, size, rows_per_task(size, 1, threads), threads);
}

}  // namespace
}  // namespace rk
