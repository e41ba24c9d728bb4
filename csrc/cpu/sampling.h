// Arguments of sample_tokens.
#pragma once

#include "types.h"

namespace rk {

struct SampleTokens {
  Rows logits;
  Dtype dtype;
  int64_t vocab;
  const double* uniform;         // [N], each in [0, 1)
  const uint8_t* mask;           // [N], null = every row is wanted
  const float* row_temperature;  // [N], null = `temperature` for every row
  double temperature;
  int64_t top_k;    // 0 = all, else in [1, vocab]
  double top_p;     // 1 = all
  int64_t* tokens;  // [N]
  float* logprobs;  // [N]
};

}  // namespace rk

// X(kernel, arguments): one line for each kernel of the family's .cpp.
#define RK_SAMPLING_KERNELS(X) X(sample_tokens, SampleTokens)
