// Arguments of gae and ppo_advantages.
#pragma once

#include "types.h"

namespace rk {

enum class Holes : int { kSkip = 0, kStop = 1, kZero = 2 };

// Sequences [first, end).
struct Range {
  int64_t first;
  int64_t end;
};

// Padded: sequence b is row b of `time` positions.
// Packed: it is positions [offset b, offset b + 1) of one row.
struct Gae {
  const void* rewards;     // [B, T], rows stride_rewards apart; or [total] contiguous, as all that follow
  const void* values;      // [B, T]
  const uint8_t* mask;     // [B, T], null = every position counts
  const float* bootstrap;  // [B], null = 0
  float* advantages;       // [B, T] contiguous
  float* returns;          // [B, T] contiguous
  int64_t stride_rewards;
  int64_t stride_values;
  int64_t stride_mask;
  int64_t time;
  Dtype dtype;
  Holes holes;
  float gamma;
  float lam;
  Offsets offsets;      // null = padded
  const Range* ranges;  // packed: [tasks], the sequences of each
};

// Rows may be strided; the outputs are [B, T] contiguous.
struct Advantages {
  const void* logprobs;  // [B, T]
  const void* ref_logprobs;
  const void* values;
  const uint8_t* mask;
  const float* scores;  // [B]
  float* advantages;
  float* returns;
  float* kl;
  // [B, 3]: count, mean and sum of squared deviations of the row's advantages; null = not wanted.
  double* moments;
  int64_t stride_logprobs;
  int64_t stride_ref_logprobs;
  int64_t stride_values;
  int64_t stride_mask;
  int64_t time;
  Dtype dtype;  // of logprobs, ref_logprobs and values
  float kl_coef;
  float gamma;
  float lam;
};

}  // namespace rk

// X(kernel, arguments): one line for each kernel of the family's .cpp.
#define RK_SCAN_KERNELS(X) \
  X(gae, Gae)              \
  X(ppo_advantages, Advantages)
