// shaped_rewards: -kl_coef * kl, and the score at the last counted token.
// whiten: y = (x - mean) * scale, scale = 1 / sqrt(variance + eps); its gradient is
// scale * (g - mean(g) - y * mean(g * y)), means over what counts. Moments and sums per chunk, merged in
// order. per_token_kl: with d = logprobs - ref_logprobs, k1 d, k2 d^2 / 2, k3 exp(-d) - 1 + d, abs |d|, and
// the slope of each.
#include "tokens.h"

#include "chunk.h"

namespace rk {
namespace RK_ISA {
namespace {

inline vf absolute(vf x) { return x < 0.0f ? -x : x; }

// NaN stays: both comparisons are false.
inline vf bounded(vf x, float limit) {
  x = x > limit ? splat(limit) : x;
  return x < -limit ? splat(-limit) : x;
}

constexpr float kExponentLimit = 20.0f;

// Value and slope at d, |d| finite.
template <Estimator kEstimator>
inline void estimate(vf d, vf& value, vf& slope) {
  const vf zero = {}, one = splat(1.0f);
  switch (kEstimator) {
    case Estimator::kK1:
      value = d;
      slope = one;
      return;
    case Estimator::kAbs:
      value = absolute(d);
      slope = d > 0.0f ? one : d < 0.0f ? -one : zero;
      return;
    case Estimator::kK2: {
      const vf square = d * (d * 0.5f);
      value = square > kLargest ? splat(kLargest) : square;
      slope = square > kLargest ? zero : d;
      return;
    }
    case Estimator::kK3: {
      const SplitExp e(bounded(-d, kExponentLimit));
      // Where |d| <= 1/2 the bracket is exactly 0 and the value is `bend` alone: nothing cancels.
      value = e.scale * e.bend + ((e.scale * e.f + (e.scale - 1.0f)) + d);
      slope = absolute(d) > kExponentLimit ? one : -e.minus_one();
      return;
    }
  }
}

template <Estimator kEstimator, bool kSlope>
void kl_chunks(const PerTokenKlFwd& args, int64_t begin, int64_t end) {
  Buffer buffers[4];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk;
    const int count = chunk_length(args.size, chunk);
    const float* a = read(args.logprobs, first, count, buffers[0]);
    const float* b = read(args.ref, first, count, buffers[1]);
    const Sink kl(args.kl, Dtype::kFloat32, first, count, buffers[2]);
    const Sink slopes(args.slope, Dtype::kFloat32, first, count, buffers[3]);
    for (int i = 0; i < count; i += kLanes) {
      const vf d = load(a + i) - load(b + i);
      vf value, slope;
      estimate<kEstimator>(bounded(d, kLargest), value, slope);
      store(kl.floats + i, value);
      if (kSlope) store(slopes.floats + i, absolute(d) <= kLargest ? slope : vf{});
    }
    kl.flush();
    if (kSlope) slopes.flush();
  }
}

template <Estimator kEstimator>
void kl_of(const PerTokenKlFwd& args, int64_t begin, int64_t end) {
  return args.slope ? kl_chunks<kEstimator, true>(args, begin, end)
                    : kl_chunks<kEstimator, false>(args, begin, end);
}

}  // namespace

void per_token_kl_fwd(const PerTokenKlFwd& args, int64_t begin, int64_t end) {
  switch (args.estimator) {
    case Estimator::kK1:
      return kl_of<Estimator::kK1>(args, begin, end);
    case Estimator::kK2:
      return kl_of<Estimator::kK2>(args, begin, end);
    case Estimator::kK3:
      return kl_of<Estimator::kK3>(args, begin, end);
    case Estimator::kAbs:
      return kl_of<Estimator::kAbs>(args, begin, end);
  }
}

void per_token_kl_bwd(const PerTokenKlBwd& args, int64_t begin, int64_t end) {
  Buffer buffers[4];
  const float limit = largest(args.logprobs_dtype), ref_limit = largest(args.ref_dtype);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk;
    const int count = chunk_length(args.size, chunk);
    const float* grad = read(args.grad, first, count, buffers[0]);
    const float* slope = read(args.slope, first, count, buffers[1]);
    const Sink to_logprobs(args.grad_logprobs, args.logprobs_dtype, first, count, buffers[2]);
    const Sink to_ref(args.grad_ref, args.ref_dtype, first, count, buffers[3]);
    for (int i = 0; i < count; i += kLanes) {
      const vf product = load(grad + i) * load(slope + i);
      if (args.grad_logprobs) store(to_logprobs.floats + i, saturate(product, limit));
      if (args.grad_ref) store(to_ref.floats + i, saturate(-product, ref_limit));
    }
    if (args.grad_logprobs) to_logprobs.flush();
    if (args.grad_ref) to_ref.flush();
  }
}

namespace {

// -1 if nothing counts.
inline int64_t last_counted(const uint8_t* mask, int64_t time) {
  uint64_t eight;
  while (time >= 8) {
    memcpy(&eight, mask + time - 8, 8);
    if (eight) break;
    time -= 8;
  }
  while (time > 0 && !mask[time - 1]) --time;
  return time - 1;
}

}  // namespace

void shaped_rewards(const ShapedRewards& args, int64_t begin, int64_t end) {
  Buffer buffers[2];
  MaskBuffer mask_buffer;
  const FlatMask masks = {args.mask, args.time, args.stride_mask};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * args.time;
    const int64_t counted_until = last_counted(args.mask + row * args.stride_mask, args.time) + 1;
    for (int64_t t = 0; t < counted_until; t += kChunk) {
      const int count = static_cast<int>(counted_until - t < kChunk ? counted_until - t : kChunk);
      const float* kl = read(args.kl, start + t, count, buffers[0]);
      const uint8_t* mask = read(masks, start + t, count, mask_buffer);
      const Sink rewards(args.rewards, Dtype::kFloat32, start + t, count, buffers[1]);
      for (int i = 0; i < count; i += kLanes)
        store(rewards.floats + i, counted(mask + i) ? load(kl + i) * -args.kl_coef : vf{});
      rewards.flush();
    }
    memset(args.rewards + start + counted_until, 0, (args.time - counted_until) * sizeof(float));
    if (counted_until == 0) continue;
    const float score = args.scores[row];  // NaN stays
    args.rewards[start + counted_until - 1] += score > args.clip    ? args.clip
                                               : score < -args.clip ? -args.clip
                                                                    : score;
  }
}

namespace {

// Sums over a chunk: add(i, sums) adds the terms of lanes i and on.
// Four sets of sums hide the latency of addition.
template <int kSums, class Add>
inline void sum_chunk(int count, Add add, float (&totals)[kSums]) {
  vf sums[4][kSums] = {};
  int i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) add(i + k * kLanes, sums[k]);
  for (; i < count; i += kLanes) add(i, sums[0]);
  for (int s = 0; s < kSums; ++s)
    totals[s] = sum_lanes((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
}

inline vf whitened(const Whitening& in, vf x) { return ((x - in.high) - in.low) * in.scale; }

}  // namespace

void whiten_moments(const WhitenMoments& args, int64_t begin, int64_t end) {
  Buffer buffer;
  MaskBuffer mask_buffer;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk;
    const int length = chunk_length(args.in.size, chunk);
    const float* x = read(args.in.x, first, length, buffer);
    const uint8_t* mask = read(args.in.mask, first, length, mask_buffer);
    int count = 0;
    for (int i = 0; i < length; ++i) count += mask[i] != 0;
    const float divisor = static_cast<float>(count ? count : 1);
    float sum[1];
    sum_chunk(length, [&](int i, vf* sums) { sums[0] += counted(mask + i) ? load(x + i) : vf{}; }, sum);
    const float mean = sum[0] / divisor;
    float rest[2];
    sum_chunk(
        length,
        [&](int i, vf* sums) {
          const vf distance = counted(mask + i) ? load(x + i) - mean : vf{};
          sums[0] += distance;
          sums[1] += distance * distance;
        },
        rest);
    // The rounded mean is put right by what the distances to it sum to.
    const double correction = static_cast<double>(rest[0]) / divisor;
    double* partial = args.partials + 3 * chunk;
    partial[0] = count;
    partial[1] = mean + correction;
    partial[2] = rest[1] - correction * rest[0];
  }
}

void whiten_apply(const WhitenApply& args, int64_t begin, int64_t end) {
  Buffer buffers[2];
  MaskBuffer mask_buffer;
  const float mean = args.keep_mean ? args.in.high : 0.0f;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk;
    const int count = chunk_length(args.in.size, chunk);
    const float* x = read(args.in.x, first, count, buffers[0]);
    const uint8_t* mask = read(args.in.mask, first, count, mask_buffer);
    const Sink y(args.y, Dtype::kFloat32, first, count, buffers[1]);
    for (int i = 0; i < count; i += kLanes)
      store(y.floats + i, counted(mask + i) ? whitened(args.in, load(x + i)) + mean : vf{});
    y.flush();
  }
}

void whiten_sums(const WhitenSums& args, int64_t begin, int64_t end) {
  Buffer buffers[2];
  MaskBuffer mask_buffer;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk;
    const int count = chunk_length(args.in.size, chunk);
    const float* x = read(args.in.x, first, count, buffers[0]);
    const float* grad = read(args.grad, first, count, buffers[1]);
    const uint8_t* mask = read(args.in.mask, first, count, mask_buffer);
    float totals[2];
    sum_chunk(
        count,
        [&](int i, vf* sums) {
          const vi counts = counted(mask + i);
          const vf g = counts ? load(grad + i) : vf{};
          sums[0] += g;
          sums[1] += g * (counts ? whitened(args.in, load(x + i)) : vf{});
        },
        totals);
    args.partials[2 * chunk] = totals[0];
    args.partials[2 * chunk + 1] = totals[1];
  }
}

void whiten_bwd(const WhitenBwd& args, int64_t begin, int64_t end) {
  Buffer buffers[3];
  MaskBuffer mask_buffer;
  const float kept = args.keep_mean ? args.mean_grad : 0.0f;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk;
    const int count = chunk_length(args.in.size, chunk);
    const float* x = read(args.in.x, first, count, buffers[0]);
    const float* grad = read(args.grad, first, count, buffers[1]);
    const uint8_t* mask = read(args.in.mask, first, count, mask_buffer);
    const Sink grad_x(args.grad_x, args.dtype, first, count, buffers[2]);
    for (int i = 0; i < count; i += kLanes) {
      const vf y = whitened(args.in, load(x + i));
      const vf slope = (load(grad + i) - args.mean_grad) - y * args.mean_grad_y;
      store(grad_x.floats + i, counted(mask + i) ? slope * args.in.scale + kept : vf{});
    }
    grad_x.flush();
  }
}

}  // namespace RK_ISA
}  // namespace rk
