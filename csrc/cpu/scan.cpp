// gae: delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}; returns = A + V, from
// the end, over padded rows or packed sequences. ppo_advantages: the same scan of rewards that it makes
// itself. Eight lanes, not sixteen: as fast in cache, and three times as fast on rows that are not
// (bench/README.md).
#define RK_NARROW
#include "scan.h"

#include "lanes.h"
#include "math.h"

namespace rk {
namespace RK_ISA {
namespace {

template <class T, Holes kHolesMean, bool kHasMask>
struct GaeSource {
  static constexpr Holes kHoles = kHolesMean;
  static constexpr bool kMasked = kHasMask;

  struct Lane {
    const T* rewards;
    const T* values;
    const uint8_t* mask;
    float* advantages;
    float* returns;
    int64_t left = 0;
  };
  struct Carry {
    State scan;
  };

  const Gae& args;
  float gamma = args.gamma;
  float lam = args.lam;

  void open(int64_t slot, int i, Lane& lane, Carry& carry) const {
    const bool packed = args.offsets.data;
    const int64_t sequence = packed ? args.order[slot] : slot;
    const int64_t start = packed ? offset_of(args.offsets, sequence) : 0;
    lane.rewards = static_cast<const T*>(args.rewards) + (packed ? start : slot * args.stride_rewards);
    lane.values = static_cast<const T*>(args.values) + (packed ? start : slot * args.stride_values);
    if (kMasked) lane.mask = args.mask + (packed ? start : slot * args.stride_mask);
    lane.advantages = args.advantages + (packed ? start : slot * args.time);
    lane.returns = args.returns + (packed ? start : slot * args.time);
    lane.left = packed ? offset_of(args.offsets, sequence + 1) - start : args.time;
    carry.scan.next_value[i] = args.bootstrap ? args.bootstrap[sequence] : 0.0f;
    carry.scan.sum[i] = 0.0f;
  }

  void load(const Lane& lane, int steps, vf& reward, vf& value, vi& counts) const {
    reward = load_upper(lane.rewards + lane.left, steps);
    value = load_upper(lane.values + lane.left, steps);
    if (kMasked) {
      counts = load_mask_upper(lane.mask + lane.left, steps);
      reward = select(counts, reward);
      value = select(counts, value);
    }
    prefetch(lane.rewards + lane.left - kAhead);
    prefetch(lane.values + lane.left - kAhead);
    if (kMasked) prefetch(lane.mask + lane.left - kAhead);
    prefetch_to_write(lane.advantages + lane.left - kAhead);
    prefetch_to_write(lane.returns + lane.left - kAhead);
  }

  vf shape(Carry&, vf reward, vi) const { return reward; }
  void collect(Carry&, vf, vi) const {}

  void store(const Lane& lane, int steps, vf advantage, vf value) const {
    store_upper(lane.advantages + lane.left, advantage, steps);
    store_upper(lane.returns + lane.left, advantage + value, steps);
  }

  void close(const Lane&, int, Carry&) const {}
};

template <class T, Holes kHoles, bool kMasked>
void scan(const Gae& args, int64_t begin, int64_t end) {
  const GaeSource<T, kHoles, kMasked> source{args};
  if (!args.offsets.data) return scan_lanes(source, begin, args.time ? end : begin, 1);
  for (int64_t task = begin; task < end; ++task) scan_lanes(source, task, args.count, args.tasks);
}

template <class T>
void scan_holes(const Gae& args, int64_t begin, int64_t end) {
  switch (args.holes) {
    case Holes::kSkip:
      return args.mask ? scan<T, Holes::kSkip, true>(args, begin, end)
                       : scan<T, Holes::kSkip, false>(args, begin, end);
    case Holes::kStop:
      return args.mask ? scan<T, Holes::kStop, true>(args, begin, end)
                       : scan<T, Holes::kStop, false>(args, begin, end);
    case Holes::kZero:
      return args.mask ? scan<T, Holes::kZero, true>(args, begin, end)
                       : scan<T, Holes::kZero, false>(args, begin, end);
  }
}

// reward_t = -kl_coef * (logprob_t - ref_logprob_t), and the score at the last position that counts.
template <class T>
struct AdvantagesSource {
  static constexpr Holes kHoles = Holes::kSkip;
  static constexpr bool kMasked = true;

  struct Lane {
    const T* logprobs;
    const T* ref_logprobs;
    const T* values;
    const uint8_t* mask;
    float* advantages;
    float* returns;
    float* kl;
    double* moments;
    int64_t left = 0;
  };
  struct Carry {
    State scan;
    vf score = {};  // not given to any position yet
    vi count = {};
    // double: the variance is the difference of the two sums, exact to 1e-16 (mean / deviation)^2.
    vd sum = {};
    vd squares = {};
  };

  const Advantages& args;
  float gamma = args.gamma;
  float lam = args.lam;

  void open(int64_t row, int i, Lane& lane, Carry& carry) const {
    lane.logprobs = static_cast<const T*>(args.logprobs) + row * args.stride_logprobs;
    lane.ref_logprobs = static_cast<const T*>(args.ref_logprobs) + row * args.stride_ref_logprobs;
    lane.values = static_cast<const T*>(args.values) + row * args.stride_values;
    lane.mask = args.mask + row * args.stride_mask;
    lane.advantages = args.advantages + row * args.time;
    lane.returns = args.returns + row * args.time;
    lane.kl = args.kl + row * args.time;
    lane.moments = args.moments ? args.moments + 3 * row : nullptr;
    lane.left = args.time;
    carry.scan.next_value[i] = carry.scan.sum[i] = 0.0f;
    carry.score[i] = args.scores[row];
    carry.count[i] = 0;
    carry.sum[i] = carry.squares[i] = 0.0;
  }

  void load(const Lane& lane, int steps, vf& reward, vf& value, vi& counts) const {
    counts = load_mask_upper(lane.mask + lane.left, steps);
    value = select(counts, load_upper(lane.values + lane.left, steps));
    const vf largest = splat(3.40282347e38f);  // finite logprobs give a finite KL
    vf kl = load_upper(lane.logprobs + lane.left, steps) - load_upper(lane.ref_logprobs + lane.left, steps);
    kl = max_keep_second(-largest, kl > largest ? largest : kl);
    kl = select(counts, kl);
    store_upper(lane.kl + lane.left, kl, steps);
    reward = splat(-args.kl_coef) * kl;
    prefetch(lane.logprobs + lane.left - kAhead);
    prefetch(lane.ref_logprobs + lane.left - kAhead);
    prefetch(lane.values + lane.left - kAhead);
    prefetch(lane.mask + lane.left - kAhead);
    prefetch_to_write(lane.advantages + lane.left - kAhead);
    prefetch_to_write(lane.returns + lane.left - kAhead);
    prefetch_to_write(lane.kl + lane.left - kAhead);
  }

  vf shape(Carry& carry, vf reward, vi counts) const {
    const vf shaped = reward + carry.score;
    carry.score = select(~counts, carry.score);
    return shaped;
  }

  void collect(Carry& carry, vf advantage, vi counts) const {
    const vd x = __builtin_convertvector(select(counts, advantage), vd);
    carry.count -= counts;
    carry.sum += x;
    carry.squares += x * x;
  }

  void store(const Lane& lane, int steps, vf advantage, vf value) const {
    store_upper(lane.advantages + lane.left, advantage, steps);
    store_upper(lane.returns + lane.left, advantage + value, steps);
  }

  void close(const Lane& lane, int i, Carry& carry) const {
    if (!lane.moments) return;
    const double count = carry.count[i], mean = count ? carry.sum[i] / count : 0.0;
    const double deviations = carry.squares[i] - carry.sum[i] * mean;
    lane.moments[0] = count;
    lane.moments[1] = mean;
    lane.moments[2] = deviations < 0.0 ? 0.0 : deviations;  // NaN stays
  }
};

}  // namespace

void gae(const Gae& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return scan_holes<float>(args, begin, end);
    case Dtype::kFloat16:
      return scan_holes<Half>(args, begin, end);
    case Dtype::kBFloat16:
      return scan_holes<BFloat>(args, begin, end);
  }
}

void ppo_advantages(const Advantages& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return scan_lanes(AdvantagesSource<float>{args}, begin, end, 1);
    case Dtype::kFloat16:
      return scan_lanes(AdvantagesSource<Half>{args}, begin, end, 1);
    case Dtype::kBFloat16:
      return scan_lanes(AdvantagesSource<BFloat>{args}, begin, end, 1);
  }
}

}  // namespace RK_ISA
}  // namespace rk
