// What several families' kernels take: raw pointers, sizes, strides in elements. Data only, here and in
// the family headers: a member function defined there would be one symbol shared by every ISA's copy.
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

// Bounds of packed sequences, as flash-attn spells them: [S + 1], from 0 to the total.
struct Offsets {
  const void* data;
  int bytes;  // 4 or 8
};

struct Labels {
  const void* data;
  int bytes;  // 4 or 8
};

// A float tensor [R, C] as one sequence of R * C elements:
// element i lies at (i / columns) * stride + i % columns.
struct Flat {
  const void* data;
  Dtype dtype;
  int64_t columns;
  int64_t stride;
};

// Likewise a mask, one byte an element; null = every element counts.
struct FlatMask {
  const uint8_t* data;
  int64_t columns;
  int64_t stride;
};

}  // namespace rk
