// Arguments of per_token_kl, shaped_rewards and whiten.
#pragma once

#include "types.h"

namespace rk {

enum class Estimator : int { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };

// Runs over chunks of the flattened tensors.
struct PerTokenKlFwd {
  Flat logprobs;
  Flat ref;
  float* kl;     // [size]
  float* slope;  // [size], d kl / d logprobs; null = not wanted
  Estimator estimator;
  int64_t size;
};

// Runs over chunks; a null output is not wanted.
struct PerTokenKlBwd {
  Flat grad;
  Flat slope;
  void* grad_logprobs;  // [size]
  void* grad_ref;       // [size]
  Dtype logprobs_dtype;
  Dtype ref_dtype;
  int64_t size;
};

// Runs over rows.
struct ShapedRewards {
  Flat kl;              // [B, T]
  const uint8_t* mask;  // [B, T], rows stride_mask apart
  int64_t stride_mask;
  const float* scores;  // [B]
  float* rewards;       // [B, T] contiguous
  int64_t time;
  float kl_coef;
  float clip;  // bound on |score|; infinite = none
};

// What is whitened, and by what; mean = high + low, because x - mean would lose the digits
// of a mean rounded once.
struct Whitening {
  Flat x;
  FlatMask mask;
  int64_t size;
  float high;
  float low;
  float scale;  // 1 / sqrt(variance + eps)
};

// Runs over chunks, and so do the rest.
struct WhitenMoments {
  Whitening in;      // without its mean and scale
  double* partials;  // [chunks, 3]: count, mean, sum of squared distances to that mean
};

struct WhitenApply {
  Whitening in;
  float* y;        // [size]
  bool keep_mean;  // add it again
};

struct WhitenSums {
  Whitening in;
  Flat grad;
  double* partials;  // [chunks, 2]: sums of grad and of grad * y over what counts, y the whitened x
};

struct WhitenBwd {
  Whitening in;
  Flat grad;
  void* grad_x;  // [size]
  Dtype dtype;
  bool keep_mean;
  float mean_grad;    // over what counts
  float mean_grad_y;  // of grad * y
};

}  // namespace rk

// X(kernel, arguments): one line for each kernel of the family's .cpp.
#define RK_TOKENS_KERNELS(X)         \
  X(per_token_kl_fwd, PerTokenKlFwd) \
  X(per_token_kl_bwd, PerTokenKlBwd) \
  X(shaped_rewards, ShapedRewards)   \
  X(whiten_moments, WhitenMoments)   \
  X(whiten_apply, WhitenApply)       \
  X(whiten_sums, WhitenSums)         \
  X(whiten_bwd, WhitenBwd)
