// Arguments of policy_loss and value_loss, and of the way back. A unit of work is `tile` elements of one row;
// each leaves one row of partial results, which bind/losses.cpp merges in order.
#pragma once

#include "types.h"

namespace rk {

// Rows of a [R, T] tensor whose last dimension is contiguous.
struct Matrix {
  const void* data;  // null = absent
  Dtype dtype;
  int64_t stride;
};

struct Tiles {
  int64_t time;         // T
  int64_t tile;         // elements of a unit, T where whole sequences matter
  const uint8_t* mask;  // [R, T], null = everything counts
  int64_t stride_mask;
  float* grad;  // [R, T] contiguous, null = not asked for
};

// Over the counted elements of one unit.
struct PolicyPartial {
  double loss, count, kl, low, high, dual, ratio, ratio_max;
};

// A ratio for each token, or one for the whole row: of the row's mean log-ratio, whose gradient each token
// shares, or as a constant times a token's own ratio over itself.
enum class Ratio : int { kToken = 0, kSequence = 1, kSequenceToken = 2 };

struct PolicyLoss {
  Matrix logprobs, old_logprobs, advantages, weights;
  Tiles tiles;
  float low, high;  // bounds of the ratio
  float dual_clip;  // infinite = no bound
  Ratio ratio;
  bool row_means;  // each row's losses count divided by its length
  PolicyPartial* partials;
};

// d = v - R.
struct ValuePartial {
  double loss, count, clipped, mean_return, m2_return, mean_d, m2_d;
};

struct ValueLoss {
  Matrix values, old_values, returns;
  Tiles tiles;
  float clip;  // infinite where old_values is absent
  bool row_means;
  ValuePartial* partials;
};

// Runs over elements.
struct LossBwd {
  const float* grad;  // what the forward left
  float factor;
  void* grad_x;
  Dtype dtype;  // of grad_x
};

}  // namespace rk

// X(kernel, arguments): one line for each kernel of the family's .cpp.
#define RK_LOSSES_KERNELS(X) \
  X(policy_loss, PolicyLoss) \
  X(value_loss, ValueLoss)   \
  X(loss_bwd, LossBwd)
