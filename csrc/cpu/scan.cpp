// gae: delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}; returns = A + V, from
// the end, over padded rows or packed sequences. Eight lanes, not sixteen: as fast in cache, and three times
// as fast on rows that are not (bench/README.md).
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

}  // namespace RK_ISA
}  // namespace rk
