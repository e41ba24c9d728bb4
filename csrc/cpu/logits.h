// Arguments of selected_logprobs.
#pragma once

#include "types.h"

namespace rk {

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

}  // namespace rk

// X(kernel, arguments): one line for each kernel of the family's .cpp.
#define RK_LOGITS_KERNELS(X)   \
  X(logprobs_fwd, LogprobsFwd) \
  X(logprobs_bwd, LogprobsBwd)
