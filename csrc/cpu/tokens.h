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

}  // namespace rk
