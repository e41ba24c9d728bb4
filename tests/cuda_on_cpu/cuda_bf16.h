// bfloat16 as the CUDA header spells it; only zero is ever made from a float.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t all;
    memcpy(&all, &x, sizeof all);
    bits = static_cast<uint16_t>(all >> 16);
  }
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t all = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &all, sizeof value);
  return value;
}
