// Arguments of the linear family's kernels: a tile of the products hidden @ weight.T and what is done to it.
#pragma once

#include "types.h"

namespace rk {

// Columns [first, first + width) of R rows of the products. A logit is
// z = softcap * tanh((x + bias) * scale / softcap), without a softcap (x + bias) * scale.
struct HeadTile {
  void* data;
  Dtype dtype;
  int64_t stride;  // from row to row, in elements
  int64_t width;
  int64_t first;
  const float* bias;  // [width], null = none
  float softcap;      // 0 = none
  float scale;
  Labels labels;                 // [R], of the whole vocabulary
  const float* row_temperature;  // [R], null = `temperature` for every row
  double temperature;
};

// Takes the tile into each row's running softmax.
struct OnlineSoftmax {
  HeadTile tile;
  double* state;  // [R, 4]: max m, sum(e), sum(e * (z - m)) with e = exp((z - m) / T), logit of the label
  bool entropy;   // whether the third is wanted
};

// Replaces the tile by the gradient of the products: (e * (a + b * (z - m)) + onehot * c) * dz/dx.
struct LinearGradient {
  HeadTile tile;
  const float* rows;  // [R, 4]: a, b, c, m
  bool narrow;        // float32 logits become a bfloat16 gradient, at the beginning of each row
};

}  // namespace rk

// X(kernel, arguments): one line for each kernel of the family's .cpp.
#define RK_LINEAR_KERNELS(X)              \
  X(online_softmax_update, OnlineSoftmax) \
  X(linear_gradient, LinearGradient)
