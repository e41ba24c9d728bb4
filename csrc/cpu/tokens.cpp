// per_token_kl: with d = logprobs - ref_logprobs, k1 d, k2 d^2 / 2, k3 exp(-d) - 1 + d, abs |d|, and the
// slope of each.
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

}  // namespace RK_ISA
}  // namespace rk
