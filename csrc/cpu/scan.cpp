// gae: delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}; returns = A + V, from
// the end, over padded rows or packed sequences. ppo_advantages: the same scan of rewards that it makes
// itself. Eight lanes, not sixteen: a shift through sixteen is two more steps of the doubling.
#define RK_NARROW
#include "scan.h"

#include "math.h"
#include "recurrence.h"

namespace rk {
namespace RK_ISA {
namespace {

// f(at, steps) for the vectors of a sequence of `time` positions, from its end.
template <class F>
inline void backwards(int64_t time, F f) {
  int64_t at = time;
  while ((at -= kLanes) >= 0) f(at, std::integral_constant<int, kLanes>());
  if (at > -kLanes) f(int64_t{0}, static_cast<int>(at) + kLanes);
}

// The recurrence by value: stores to floats might change one that others see.
template <class T, Holes kHoles, bool kMasked>
void gae_sequence(const Gae& args, const Recurrence recurrence, int64_t sequence) {
  const bool packed = args.offsets.data;
  const int64_t start = packed ? offset_of(args.offsets, sequence) : 0;
  const int64_t time = packed ? offset_of(args.offsets, sequence + 1) - start : args.time;
  const auto first = [&](int64_t stride) { return packed ? start : sequence * stride; };
  const T* rewards = static_cast<const T*>(args.rewards) + first(args.stride_rewards);
  const T* values = static_cast<const T*>(args.values) + first(args.stride_values);
  const uint8_t* mask = kMasked ? args.mask + first(args.stride_mask) : nullptr;
  float* advantages = args.advantages + first(args.time);
  float* returns = args.returns + first(args.time);
  State state(args.bootstrap ? args.bootstrap[sequence] : 0.0f);
  const int64_t counted = kMasked ? counted_end(mask, time) : time;
  recurrence.pass<kHoles>(time - counted, state);
  for (float* result : {advantages, returns}) fill_zero(result, counted, time);
  backwards(counted, [&](int64_t at, int steps) {
    vf reward = load_upper(rewards + at, steps), value = load_upper(values + at, steps);
    Counts counts;
    if (kMasked) {
      counts = Counts(mask + at, steps);
      reward = select(counts.lanes, reward);
      value = select(counts.lanes, value);
    }
    const vf advantage = recurrence.scan<kHoles>(reward, value, counts, state);
    store_upper(advantages + at, advantage, steps);
    store_upper(returns + at, advantage + value, steps);
  });
}

template <class T, Holes kHoles, bool kMasked>
void scan(const Gae& args, int64_t begin, int64_t end) {
  const Recurrence recurrence(args.gamma, args.lam);
  // Backwards, as within a sequence: each array is one stream.
  const auto scan = [&](int64_t first, int64_t sequence) {
    while (sequence-- > first) gae_sequence<T, kHoles, kMasked>(args, recurrence, sequence);
  };
  if (!args.ranges) return scan(begin, end);
  for (int64_t task = begin; task < end; ++task) scan(args.ranges[task].first, args.ranges[task].end);
}

template <class T>
void scan_holes(const Gae& args, int64_t begin, int64_t end) {
  if (!args.mask) return scan<T, Holes::kSkip, false>(args, begin, end);
  switch (args.holes) {
    case Holes::kSkip:
      return scan<T, Holes::kSkip, true>(args, begin, end);
    case Holes::kStop:
      return scan<T, Holes::kStop, true>(args, begin, end);
    case Holes::kZero:
      return scan<T, Holes::kZero, true>(args, begin, end);
  }
}

// reward_t = -kl_coef * (logprob_t - ref_logprob_t), and the score at the last position that counts.
template <class T>
void advantages_row(const Advantages& args, const Recurrence recurrence, int64_t row) {
  const T* logprobs = static_cast<const T*>(args.logprobs) + row * args.stride_logprobs;
  const T* ref_logprobs = static_cast<const T*>(args.ref_logprobs) + row * args.stride_ref_logprobs;
  const T* values = static_cast<const T*>(args.values) + row * args.stride_values;
  const uint8_t* mask = args.mask + row * args.stride_mask;
  float* advantages = args.advantages + row * args.time;
  float* returns = args.returns + row * args.time;
  float* kls = args.kl + row * args.time;
  State state(0.0f);
  const int64_t end = counted_end(mask, args.time);
  for (float* result : {advantages, returns, kls}) fill_zero(result, end, args.time);
  int64_t count = 0;
  DoubleSum sums, squares;  // the variance is their difference, exact to 1e-16 (mean / deviation)^2
  backwards(end, [&](int64_t at, int steps) {
    const Counts counts(mask + at, steps);
    const vf value = select(counts.lanes, load_upper(values + at, steps));
    const vf largest = splat(3.40282347e38f);  // finite logprobs give a finite KL
    vf kl = load_upper(logprobs + at, steps) - load_upper(ref_logprobs + at, steps);
    kl = max_keep_second(-largest, kl > largest ? largest : kl);
    kl = select(counts.lanes, kl);
    store_upper(kls + at, kl, steps);
    vf reward = splat(-args.kl_coef) * kl;
    if (at + steps == end) reward[kLanes - 1] += args.scores[row];
    const vf advantage = recurrence.scan<Holes::kSkip>(reward, value, counts, state);
    store_upper(advantages + at, advantage, steps);
    store_upper(returns + at, advantage + value, steps);
    count += __builtin_popcount(counts.bits);
    sums.add(advantage);
    squares.add_squares(advantage);
  });
  if (!args.moments) return;
  const double mean = count ? sums.value() / count : 0.0, deviations = squares.value() - sums.value() * mean;
  double* moments = args.moments + 3 * row;
  moments[0] = static_cast<double>(count);
  moments[1] = mean;
  moments[2] = deviations < 0.0 ? 0.0 : deviations;  // NaN stays
}

template <class T>
void advantages_rows(const Advantages& args, int64_t begin, int64_t end) {
  const Recurrence recurrence(args.gamma, args.lam);
  for (int64_t row = end; row-- > begin;) advantages_row<T>(args, recurrence, row);
}

}  // namespace

void gae(const Gae& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { scan_holes<decltype(type)>(args, begin, end); });
}

void ppo_advantages(const Advantages& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { advantages_rows<decltype(type)>(args, begin, end); });
}

}  // namespace RK_ISA
}  // namespace rk
