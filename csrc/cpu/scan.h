// Arguments of gae.
#pragma once

#include "types.h"

namespace rk {

enum class Holes : int { kSkip = 0, kStop = 1, kZero = 2 };

struct Gae {
  const void* rewards;     // [B, T], rows stride_rewards apart
  const void* values;      // [B, T]
  const uint8_t* mask;     // [B, T], null = every position counts
  const float* bootstrap;  // [B], null = 0
  float* advantages;       // [B, T] contiguous
  float* returns;          // [B, T] contiguous
  int64_t stride_rewards;
  int64_t stride_values;
  int64_t stride_mask;
  int64_t batch;
  int64_t time;
  Dtype dtype;
  Holes holes;
  float gamma;
  float lam;
};

}  // namespace rk
