// Arguments of full_kl.
#pragma once

#include "types.h"

namespace rk {

enum class Divergence : int { kReverse = 0, kForward = 1, kJsd = 2 };

struct FullKlArgs {
  Rows logits;
  Rows ref;
  Dtype dtype;  // of both
  Divergence direction;
  int64_t vocab;
  const uint8_t* mask;           // [N], null = every row counts
  const float* row_temperature;  // [N], null = `temperature` for every row
  double temperature;
};

struct FullKlFwd {
  FullKlArgs in;
  float* kl;  // [N]
  // [N, 5]: max m and log(sum(exp((x - m) / T))), both of the reference, and KL(p || m) of jsd, else the mean
  // of (x - m) - (x' - m') over p (reverse) or of its negative over q (forward)
  float* stats;
};

struct FullKlBwd {
  FullKlArgs in;
  const float* grad_kl;  // [N]
  const float* stats;    // [N, 5] of the forward
  Rows grad;             // dtype of the logits
};

}  // namespace rk

// X(kernel, arguments): one line for each kernel of the family's .cpp.
#define RK_FULL_KL_KERNELS(X) \
  X(full_kl_fwd, FullKlFwd)   \
  X(full_kl_bwd, FullKlBwd)
