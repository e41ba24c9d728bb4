// Arguments of the scan on a GPU: device pointers, strides in elements. No torch header, no CUDA header.
#pragma once

#include <cstdint>

namespace rk {
namespace cuda {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Holes : int { kSkip = 0, kStop = 1, kZero = 2 };

struct Gae {
  const void* rewards;     // [B, T], rows stride_rewards apart; packed: [total]
  const void* values;      // the same
  const uint8_t* mask;     // the same, null = every position counts
  const float* bootstrap;  // [B], null = 0
  const void* offsets;     // [B + 1] starts of packed sequences, null = padded rows
  int offset_bytes;        // 4 or 8
  float* advantages;       // [B, T] contiguous; packed: [total]
  float* returns;          // the same
  int64_t stride_rewards;
  int64_t stride_values;
  int64_t stride_mask;
  int64_t rows;  // B
  int64_t time;  // T; packed: total
  float gamma;
  float decay;  // gamma * lam
};

// Queues the scan on `stream` (a cudaStream_t). Returns null, or CUDA's words for what went wrong.
const char* gae(const Gae& args, Dtype dtype, Holes holes, void* stream);

}  // namespace cuda
}  // namespace rk
