// What a family's kernel takes: raw pointers, sizes, strides in elements. Data only: a member function
// defined here would be one symbol shared by every ISA's copy.
#pragma once

#include <cstdint>

namespace rk {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Rows of logits [O, I, V]: row n = o * inner + i starts at o * stride_outer + i * stride_inner.
struct Rows {
  void* data;
  int64_t inner;
  int64_t stride_outer;
  int64_t stride_inner;
};

struct Labels {
  const void* data;
  int bytes;  // 4 or 8
};

struct LogprobsArgs {
  Rows logits;
  Dtype dtype;
  int64_t vocab;
  Labels labels;
  const uint8_t* mask;           // [N], null = every row counts
  const float* row_temperature;  // [N], null = `temperature` for every row
  double temperature;
};

struct LogprobsFwd {
  LogprobsArgs in;
  float* logprobs;  // [N]
  float* entropy;   // [N], null = not asked for
  float* stats;     // [N, 2]: max m of the raw row, log(sum(exp((x - m) / T)))
};

struct LogprobsBwd {
  LogprobsArgs in;
  const float* grad_logprobs;  // [N], null = zero
  const float* grad_entropy;   // [N], null = zero
  const float* stats;          // [N, 2] of the forward
  const float* entropy;        // [N], read where grad_entropy is given
  Rows grad;                   // dtype of the logits; may be the logits themselves
};

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

// One entry per kernel; each works on rows [begin, end) and may run on any thread.
struct Kernels {
  void (*logprobs_fwd)(const LogprobsFwd&, int64_t begin, int64_t end);
  void (*logprobs_bwd)(const LogprobsBwd&, int64_t begin, int64_t end);
  void (*gae)(const Gae&, int64_t begin, int64_t end);
};

}  // namespace rk
