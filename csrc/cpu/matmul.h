// Operand products that stay float32: C [M, N] = A [M, K] @ B [K, N], of matrices in any layout and dtype.
#pragma once

#include "types.h"

namespace rk {

// Element (i, j) lies at data + i * row + j * column, in elements.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t row;
  int64_t column;
};

struct Matmul {
  Operand a, b;
  float* c;  // columns are contiguous
  int64_t c_row;
  int64_t m, n, k;
  bool accumulate;       // C += instead of =
  int64_t task_columns;  // of C in a task, a multiple of kMatmulPanel
  bool pairs;  // A and B as bfloat16, multiplied two by two by the CPU's own instruction; B is bfloat16
};

constexpr int64_t kMatmulRows = 256;   // of C in a task
constexpr int64_t kMatmulPanel = 256;  // columns of B that are packed together

}  // namespace rk

// X(kernel, arguments): one line for each kernel of the family's .cpp.
#define RK_MATMUL_KERNELS(X) X(matmul, Matmul)
