#include "../cpu/scan.h"

#include <vector>

#include "bind.h"

RK_KERNEL_TABLE(RK_SCAN_KERNELS)

namespace rk {
namespace {

// -1 if the offsets run from 0 to total and never fall, else the first place where they do not.
template <class Offset>
int64_t first_bad_offset(const Offset* offsets, int64_t sequences, int64_t total) {
  if (offsets[0] != 0) return 0;
  for (int64_t s = 1; s <= sequences; ++s)
    if (offsets[s] < offsets[s - 1] || offsets[s] > total) return s;
  return offsets[sequences] == total ? -1 : sequences;
}

// Neighbouring sequences of about a quarter of a thread's share; those that hold the most first, so that no
// long one is left to run alone at the end.
template <class Offset>
std::vector<Range> split(const Offset* offsets, int64_t sequences, int threads) {
  const int64_t share =
      threads > 1 ? std::max<int64_t>(kMinElementsPerTask, offsets[sequences] / (4 * threads)) : INT64_MAX;
  std::vector<Range> ranges;
  for (int64_t first = 0, end = 0; first < sequences; first = end) {
    while (end < sequences && offsets[end] - offsets[first] < share) ++end;
    ranges.push_back({first, end});
  }
  const auto positions = [&](const Range& range) { return offsets[range.end] - offsets[range.first]; };
  std::sort(ranges.begin(), ranges.end(),
            [&](const Range& a, const Range& b) { return positions(a) > positions(b); });
  return ranges;
}

RK_POSITIONS(void, gae, uintptr_t rewards, uintptr_t values, int dtype, uintptr_t mask, uintptr_t bootstrap,
             int64_t batch, int64_t time, int64_t rewards_stride, int64_t values_stride, int64_t mask_stride,
             double gamma, double lam, int masked, uintptr_t advantages, uintptr_t returns, int threads) {
  Gae args = {};
  args.rewards = pointer<void>(rewards);
  args.values = pointer<void>(values);
  args.mask = pointer<uint8_t>(mask);
  args.bootstrap = pointer<float>(bootstrap);
  args.advantages = pointer<float>(advantages);
  args.returns = pointer<float>(returns);
  args.stride_rewards = rewards_stride;
  args.stride_values = values_stride;
  args.stride_mask = mask_stride;
  args.time = time;
  args.dtype = static_cast<Dtype>(dtype);
  args.holes = static_cast<Holes>(masked);
  args.gamma = static_cast<float>(gamma);
  args.lam = static_cast<float>(lam);
  parallel_for_rows(kernels().gae, args, batch, rows_per_task(batch, time, threads), threads);
}

// Returns the first place where the offsets are wrong, and then has computed nothing; -1 when all is done.
RK_POSITIONS(int64_t, gae_packed, uintptr_t rewards, uintptr_t values, int dtype, uintptr_t mask,
             uintptr_t bootstrap, int64_t total, uintptr_t cu_seqlens, int cu_seqlens_bytes,
             int64_t sequences, double gamma, double lam, int masked, uintptr_t advantages, uintptr_t returns,
             int threads) {
  Gae args = {};
  args.rewards = pointer<void>(rewards);
  args.values = pointer<void>(values);
  args.mask = pointer<uint8_t>(mask);
  args.bootstrap = pointer<float>(bootstrap);
  args.advantages = pointer<float>(advantages);
  args.returns = pointer<float>(returns);
  args.dtype = static_cast<Dtype>(dtype);
  args.holes = static_cast<Holes>(masked);
  args.gamma = static_cast<float>(gamma);
  args.lam = static_cast<float>(lam);
  args.offsets = {pointer<void>(cu_seqlens), cu_seqlens_bytes};
  std::vector<Range> ranges;
  const auto plan = [&](auto* bounds) {
    const int64_t bad = first_bad_offset(bounds, sequences, total);
    if (bad < 0) ranges = split(bounds, sequences, threads);
    return bad;
  };
  const int64_t bad = cu_seqlens_bytes == 4 ? plan(pointer<const int32_t>(cu_seqlens))
                                            : plan(pointer<const int64_t>(cu_seqlens));
  if (bad >= 0) return bad;
  args.ranges = ranges.data();
  parallel_for_rows(kernels().gae, args, static_cast<int64_t>(ranges.size()), 1, threads);
  return -1;
}

// moments: room for three doubles a row, which whiten_fwd takes as its parts; or null.
RK_POSITIONS(void, ppo_advantages, uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t scores,
             uintptr_t values, int dtype, uintptr_t mask, int64_t batch, int64_t time,
             int64_t logprobs_stride, int64_t ref_logprobs_stride, int64_t values_stride, int64_t mask_stride,
             double kl_coef, double gamma, double lam, uintptr_t advantages, uintptr_t returns, uintptr_t kl,
             uintptr_t moments, int threads) {
  Advantages args = {};
  args.logprobs = pointer<void>(logprobs);
  args.ref_logprobs = pointer<void>(ref_logprobs);
  args.values = pointer<void>(values);
  args.mask = pointer<uint8_t>(mask);
  args.scores = pointer<float>(scores);
  args.advantages = pointer<float>(advantages);
  args.returns = pointer<float>(returns);
  args.kl = pointer<float>(kl);
  args.moments = pointer<double>(moments);
  args.stride_logprobs = logprobs_stride;
  args.stride_ref_logprobs = ref_logprobs_stride;
  args.stride_values = values_stride;
  args.stride_mask = mask_stride;
  args.time = time;
  args.dtype = static_cast<Dtype>(dtype);
  args.kl_coef = static_cast<float>(kl_coef);
  args.gamma = static_cast<float>(gamma);
  args.lam = static_cast<float>(lam);
  if (batch == 0 || time == 0) return;
  parallel_for_rows(kernels().ppo_advantages, args, batch, rows_per_task(batch, time, threads), threads);
}

}  // namespace
}  // namespace rk
