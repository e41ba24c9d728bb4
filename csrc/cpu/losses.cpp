// policy_loss: -min(rho A, clamp(rho, low, high) A), rho = exp(logprob - old logprob); value_loss:
// 0.5 max((v - R)^2, (clamp(v, old - c, old + c) - R)^2). One read of the inputs gives losses,
// slopes, statistics.
#include "losses.h"

#include <algorithm>
#include <array>

#include "math.h"

namespace rk {
namespace RK_ISA {
namespace {

// Elements at a time: so few that their sums stay accurate in float lanes, and that their copies stay in the
// first-level cache.
constexpr int kPiece = 256;
constexpr float kExponentLimit = 20.0f;

inline int sum_lanes(vi x) {
  int sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

template <class T>
const float* padded(const T* source, int count, float* buffer) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(buffer + i, load(source + i));
  if (i < count) {
    T lanes[kLanes] = {};
    memcpy(lanes, source + i, (count - i) * sizeof(T));
    store(buffer + i, load(lanes));
  }
  return buffer;
}

// `count` elements as floats: where they lie if that is whole vectors of floats, else in `buffer`,
// zeros behind.
inline const float* floats(const Matrix& matrix, int64_t row, int64_t start, int count, float* buffer) {
  const int64_t first = row * matrix.stride + start;
  switch (matrix.dtype) {
    case Dtype::kFloat16:
      return padded(static_cast<const Half*>(matrix.data) + first, count, buffer);
    case Dtype::kBFloat16:
      return padded(static_cast<const BFloat*>(matrix.data) + first, count, buffer);
    case Dtype::kFloat32:
      break;
  }
  const float* source = static_cast<const float*>(matrix.data) + first;
  return count % kLanes == 0 ? source : padded(source, count, buffer);
}

// The mask of a block: its own bytes, or a copy that counts nothing behind the last element.
class Counted {
 public:
  Counted(const Tiles& tiles, int64_t row, int64_t start, int size) {
    const uint8_t* mask = tiles.mask ? tiles.mask + row * tiles.stride_mask + start : nullptr;
    bytes_ = copy_;
    if (mask && size == kPiece) {
      bytes_ = mask;
    } else {
      memset(copy_, 0, sizeof copy_);
      if (mask)
        memcpy(copy_, mask, size);
      else
        memset(copy_, 1, size);
    }
    vi kept = {};
    for (int i = 0; i < size; i += kLanes) kept += lanes(i);
    count = -sum_lanes(kept);
  }
  vi lanes(int i) const { return load_bytes(bytes_ + i) > 0; }

  int count = 0;

 private:
  const uint8_t* bytes_;
  uint8_t copy_[kPiece];
};

// Calls body(start, count) for the blocks of [begin, end).
template <class Body>
inline void each_block(int64_t begin, int64_t end, const Body& body) {
  for (int64_t start = begin; start < end; start += kPiece)
    body(start, static_cast<int>(std::min<int64_t>(kPiece, end - start)));
}

struct Unit {
  int64_t row, begin, end;
};

inline Unit unit_of(const Tiles& tiles, int64_t index) {
  const int64_t per_row = (tiles.time + tiles.tile - 1) / tiles.tile;
  const int64_t begin = index % per_row * tiles.tile;
  return {index / per_row, begin, std::min(begin + tiles.tile, tiles.time)};
}

// Where a block's gradient goes: straight to the tensor, or through a buffer if it is not whole vectors or
// not wanted.
class GradBlock {
 public:
  GradBlock(const Tiles& tiles, int64_t row, int64_t start, int size)
      : to_(tiles.grad ? tiles.grad + row * tiles.time + start : nullptr),
        size_(size),
        direct_(to_ && size % kLanes == 0) {}
  ~GradBlock() {
    if (to_ && !direct_) memcpy(to_, buffer_, size_ * sizeof(float));
  }
  float* data() { return direct_ ? to_ : buffer_; }

 private:
  float* to_;
  int size_;
  bool direct_;
  float buffer_[kPiece];
};

// Also true of NaN, which then shows.
inline vi same(vf a, vf b) { return ~((a < b) | (a > b)); }

inline vf clamp_exponent(vf x) {  // NaN stays
  x = max_keep_second(splat(-kExponentLimit), x);
  return x > kExponentLimit ? splat(kExponentLimit) : x;
}

// e = exp(x) and k3 = exp(x) - 1 - x for |x| <= 20, the latter without cancellation near 0.
// Not SplitExp: with it policy_loss [64, 1024] took 13 % longer forward (AVX-512, one thread).
inline void exponential(vf x, vf& e, vf& k3) {
  constexpr float kRound = 12582912.0f + 127.0f;  // as in Exp::split
  const vf rounded = x * 1.44269504f + kRound;
  const vf n = rounded - kRound;
  const vf scale = reinterpret_cast<vf>(reinterpret_cast<vu>(rounded) << 23);
  // ln 2 in two parts, the first with so few bits that n times it is exact.
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // exp(r) - 1 - r = r^2 p(r) on |r| <= ln(2) / 2: Cephes' polynomial, relative error of exp below 2^-24.
  vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vf rest = r * r * p;
  e = scale * (1.0f + (r + rest));
  k3 = n == 0.0f ? rest : (scale - 1.0f) + scale * (r + rest) - x;
}

// The loss of min(rho A, clamp(rho, low, high) A), bounded by dual_clip, is -A times rho clamped on one side:
// from below by `low` and from above by `dual_clip` where A < 0, from above by `high` elsewhere.
struct PolicySums {
  DoubleSum loss, slope, kl, ratio, low, high, dual;  // the last three count -1 for each hit
  vf ratio_max = {};
  int64_t count = 0;

  PolicyPartial partial() const {
    float largest = max_lane<kLanes / 2>(ratio_max, std::make_index_sequence<kLanes>());
    if (ratio.value() != ratio.value()) largest = NAN;
    return {loss.value(),  static_cast<double>(count),
            kl.value(),    -low.value(),
            -high.value(), -dual.value(),
            ratio.value(), largest};
  }
};

// Calls body(i, keep, log-ratio) for the vectors of a block; the log-ratio is 0 where nothing counts.
template <class Body>
inline void each_log_ratio(const PolicyLoss& args, const Counted& counted, int64_t row, int64_t start,
                           int size, const Body& body) {
  float new_buffer[kPiece], old_buffer[kPiece];
  const float* logprobs = floats(args.logprobs, row, start, size, new_buffer);
  const float* old_logprobs = floats(args.old_logprobs, row, start, size, old_buffer);
  for (int i = 0; i < size; i += kLanes) {
    const vi keep = counted.lanes(i);
    body(i, keep, keep ? load(logprobs + i) - load(old_logprobs + i) : vf{});
  }
}

// A block's losses into `sums`, its slopes (of the loss by the log-ratio, times `share`) into `slopes`.
// each_ratio(body) calls body(i, keep, whether rho moves with the log-ratio, rho) for every vector.
template <class EachRatio>
inline void policy_block(const PolicyLoss& args, const Unit& unit, int64_t start, int size,
                         const Counted& counted, float share, float* slopes, PolicySums& sums,
                         const EachRatio& each_ratio) {
  static const std::array<float, kPiece> kOnes = [] {
    std::array<float, kPiece> ones;
    ones.fill(1.0f);
    return ones;
  }();
  float advantage_buffer[kPiece], weight_buffer[kPiece];
  const float* advantages = floats(args.advantages, unit.row, start, size, advantage_buffer);
  const float* weights =
      args.weights.data ? floats(args.weights, unit.row, start, size, weight_buffer) : kOnes.data();
  vf loss = {}, slope = {}, ratio = {}, ratio_max = sums.ratio_max;
  vi low = {}, high = {}, dual = {};
  each_ratio([&](int i, vi keep, vi moves, vf rho) {
    const vf advantage = keep ? load(advantages + i) : vf{};
    const vf weight = keep ? load(weights + i) : vf{};
    const vi negative = advantage < 0.0f;
    vf used = max_keep_second(negative ? splat(args.low) : splat(-kInf), rho);
    const vf ceiling = negative ? splat(args.dual_clip) : splat(args.high);
    used = used > ceiling ? ceiling : used;
    const vi raised = used > rho, lowered = used < rho;
    const vf term = -(used * advantage) * weight;
    vf term_slope = same(used, rho) ? term : vf{};
    term_slope = moves ? term_slope : vf{};
    store(slopes + i, term_slope * share);
    loss += term;
    slope += term_slope;
    low += raised;
    dual += lowered & negative;
    high += lowered & (advantage > 0.0f);
    const vf kept = keep ? rho : vf{};
    ratio += kept;
    ratio_max = max_keep_second(kept, ratio_max);
  });
  sums.loss.add(loss);
  sums.slope.add(slope);
  sums.ratio.add(ratio);
  sums.low.add(low);
  sums.high.add(high);
  sums.dual.add(dual);
  sums.ratio_max = ratio_max;
  sums.count += counted.count;
}

int64_t length_of(const Tiles& tiles, const Unit& unit) {
  int64_t count = 0;
  each_block(unit.begin, unit.end,
             [&](int64_t start, int size) { count += Counted(tiles, unit.row, start, size).count; });
  return std::max<int64_t>(1, count);
}

PolicyPartial token_ratios(const PolicyLoss& args, const Unit& unit) {
  const double length = args.row_means ? length_of(args.tiles, unit) : 1;
  const float share = static_cast<float>(1 / length);
  PolicySums sums;
  each_block(unit.begin, unit.end, [&](int64_t start, int size) {
    const Counted counted(args.tiles, unit.row, start, size);
    GradBlock grad(args.tiles, unit.row, start, size);
    // On its own: in one loop with the rest, the exponential's long chain of dependent steps fills what the
    // core can look ahead, and the next vector's waits.
    float rhos[kPiece];
    vi moves[kPiece / kLanes];
    vf kl = {};
    each_log_ratio(args, counted, unit.row, start, size, [&](int i, vi, vf log_ratio) {
      vf rho, k3;
      const vf clamped = clamp_exponent(log_ratio);
      exponential(clamped, rho, k3);
      store(rhos + i, rho);
      moves[i / kLanes] = same(clamped, log_ratio);
      kl += k3;  // exactly 0 where nothing counts
    });
    sums.kl.add(kl);
    policy_block(args, unit, start, size, counted, share, grad.data(), sums, [&](const auto& body) {
      for (int i = 0; i < size; i += kLanes) body(i, counted.lanes(i), moves[i / kLanes], load(rhos + i));
    });
  });
  PolicyPartial partial = sums.partial();
  partial.loss /= length;
  return partial;
}

PolicyPartial sequence_ratio(const PolicyLoss& args, const Unit& unit) {
  DoubleSum total;
  int64_t count = 0;
  each_block(unit.begin, unit.end, [&](int64_t start, int size) {
    const Counted counted(args.tiles, unit.row, start, size);
    vf sum = {};
    each_log_ratio(args, counted, unit.row, start, size, [&](int, vi, vf log_ratio) { sum += log_ratio; });
    total.add(sum);
    count += counted.count;
  });
  const double length = std::max<int64_t>(1, count);
  const vf mean = splat(static_cast<float>(total.value() / length)), clamped = clamp_exponent(mean);
  vf rho, k3;
  exponential(clamped, rho, k3);
  const vi moves = same(clamped, mean);
  const bool per_token = args.ratio == Ratio::kSequenceToken;
  const float share = static_cast<float>(args.row_means ? 1 / length : 1);
  PolicySums sums;
  each_block(unit.begin, unit.end, [&](int64_t start, int size) {
    const Counted counted(args.tiles, unit.row, start, size);
    vf kl = {};
    const auto run = [&](float* slopes) {
      policy_block(args, unit, start, size, counted, share, slopes, sums, [&](const auto& body) {
        for (int i = 0; i < size; i += kLanes) {
          const vi keep = counted.lanes(i);
          kl += keep ? k3 : vf{};
          body(i, keep, moves, rho);
        }
      });
    };
    if (per_token) {
      GradBlock grad(args.tiles, unit.row, start, size);
      run(grad.data());
    } else {
      float unused[kPiece];
      run(unused);
    }
    sums.kl.add(kl);
  });
  PolicyPartial partial = sums.partial();
  double slope = sums.slope.value() / length;
  if (args.row_means) {
    partial.loss /= length;
    slope /= length;
  }
  if (args.tiles.grad && !per_token)
    each_block(unit.begin, unit.end, [&](int64_t start, int size) {
      const Counted counted(args.tiles, unit.row, start, size);
      GradBlock grad(args.tiles, unit.row, start, size);
      for (int i = 0; i < size; i += kLanes)
        store(grad.data() + i, counted.lanes(i) ? splat(static_cast<float>(slope)) : vf{});
    });
  return partial;
}

// Mean and sum of squared deviations, grown block by block by Chan's formula.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // x: the block's elements, `sum` over its counted ones.
  void add(const float* x, int size, const Counted& counted, vf sum) {
    if (counted.count == 0) return;
    const double n = counted.count;
    const float near = static_cast<float>(sum_lanes(sum) / n);
    vf deviation = {}, square = {};
    for (int i = 0; i < size; i += kLanes) {
      const vf d = counted.lanes(i) ? load(x + i) - near : vf{};
      deviation += d;
      square += d * d;
    }
    // `near` is the mean rounded: what is left of it shows in the sum of the deviations.
    const double left = sum_lanes(deviation) / n;
    const double delta = near + left - mean, total = count + n;
    mean += delta * n / total;
    m2 += sum_lanes(square) - left * left * n + delta * delta * count * n / total;
    count = total;
  }
};

ValuePartial value_unit(const ValueLoss& args, const Unit& unit) {
  const double length = args.row_means ? length_of(args.tiles, unit) : 1;
  const float share = static_cast<float>(1 / length);
  DoubleSum total, clipped_total;
  Moments of_returns, of_d;
  each_block(unit.begin, unit.end, [&](int64_t start, int size) {
    const Counted counted(args.tiles, unit.row, start, size);
    GradBlock grad(args.tiles, unit.row, start, size);
    float buffers[3][kPiece], targets[kPiece], errors[kPiece];
    const float* values = floats(args.values, unit.row, start, size, buffers[0]);
    const float* returns = floats(args.returns, unit.row, start, size, buffers[1]);
    const float* old_values =
        args.old_values.data ? floats(args.old_values, unit.row, start, size, buffers[2]) : values;
    float* slopes = grad.data();
    vf loss = {}, target_sum = {}, error_sum = {};
    vi clipped = {};
    for (int i = 0; i < size; i += kLanes) {
      const vi keep = counted.lanes(i);
      const vf value = keep ? load(values + i) : vf{}, target = keep ? load(returns + i) : vf{};
      const vf old = keep ? load(old_values + i) : vf{};
      const vf error = value - target, high = old + args.clip;
      vf moved = max_keep_second(old - args.clip, value);
      moved = moved > high ? high : moved;
      const vf squared = error * error, squared_clipped = (moved - target) * (moved - target);
      const vi is_clipped = squared_clipped > squared;  // never where moved is the value
      loss += is_clipped ? squared_clipped : squared;
      clipped += is_clipped;
      target_sum += target;
      error_sum += error;
      store(targets + i, target);
      store(errors + i, error);
      store(slopes + i, (is_clipped ? vf{} : error) * share);
    }
    total.add(loss);
    clipped_total.add(clipped);
    of_returns.add(targets, size, counted, target_sum);
    of_d.add(errors, size, counted, error_sum);
  });
  return {0.5 * total.value() / length,
          of_d.count,
          -clipped_total.value(),
          of_returns.mean,
          of_returns.m2,
          of_d.mean,
          of_d.m2};
}

}  // namespace

void policy_loss(const PolicyLoss& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit = unit_of(args.tiles, i);
    args.partials[i] = args.ratio != Ratio::kToken ? sequence_ratio(args, unit) : token_ratios(args, unit);
  }
}

void value_loss(const ValueLoss& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) args.partials[i] = value_unit(args, unit_of(args.tiles, i));
}

void loss_bwd(const LossBwd& args, int64_t begin, int64_t end) {
  const float limit = largest(args.dtype);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(args.grad_x);
    const auto scaled = [&](const float* grad) { return saturate(load(grad) * args.factor, limit); };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(out + i, scaled(args.grad + i));
    if (i == end) return;
    float grad[kLanes] = {};
    T lanes[kLanes];
    memcpy(grad, args.grad + i, (end - i) * sizeof(float));
    store(lanes, scaled(grad));
    memcpy(out + i, lanes, (end - i) * sizeof(T));
  });
}

}  // namespace RK_ISA
}  // namespace rk
