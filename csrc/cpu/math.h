// Vectors of the ISA's own width, exp, and 16-bit loads and stores. Everything here has internal linkage: were it
// shared, the linker could keep the AVX-512 copy of a function for the AVX2 kernels too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace rk {
namespace RK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr float kInf = INFINITY;

typedef float vf __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef uint16_t vh __attribute__((vector_size(kBytes / 2)));
typedef float vf_unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

inline int64_t offset(const Rows& rows, int64_t row) {
  return (row / rows.inner) * rows.stride_outer + (row % rows.inner) * rows.stride_inner;
}

inline int64_t label_of(const Labels& labels, int64_t row) {
  return labels.bytes == 4 ? static_cast<const int32_t*>(labels.data)[row]
                           : static_cast<const int64_t*>(labels.data)[row];
}

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }

// The first operand's NaN is dropped, the second's kept: the order that maps to one instruction.
inline vf max_keep_second(vf a, vf b) { return a > b ? a : b; }

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }

inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

inline vu load_bits(const void* p) {
  return __builtin_convertvector(*static_cast<const vh_unaligned*>(p), vu);
}

inline void store_bits(void* p, vu bits) {
  *static_cast<vh_unaligned*>(p) = __builtin_convertvector(bits, vh);
}

inline vf load(const BFloat* p) { return reinterpret_cast<vf>(load_bits(p) << 16); }

// Round to nearest even; a NaN stays one (rounding its payload up could carry into infinity or the sign).
inline void store(BFloat* p, vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_bits(p, (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

#if defined(__AVX512F__)
inline vf load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(Half* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline vf load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(Half* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Exponent and mantissa move to their float places; the two ends of the exponent range are put right after.
inline vf load(const Half* p) {
  const vu half = load_bits(p);
  const vu magnitude = (half & 0x7fffu) << 13;
  const vu exponent = magnitude & (0x7c00u << 13);
  const vu rebiased = magnitude + (112u << 23);
  const vu subnormal = reinterpret_cast<vu>(reinterpret_cast<vf>(magnitude + (113u << 23)) - 0x1p-14f);
  const vu finite = exponent == 0u ? subnormal : rebiased;
  const vu value = exponent == (0x7c00u << 13) ? rebiased + (112u << 23) : finite;
  return reinterpret_cast<vf>(value | (half & 0x8000u) << 16);
}
inline void store(Half* p, vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  const vu magnitude = bits & 0x7fffffffu;
  const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the subnormal's rounded mantissa in the low bits.
  const vu subnormal = reinterpret_cast<vu>(reinterpret_cast<vf>(magnitude) + 0.5f) - 0x3f000000u;
  const vu finite = magnitude < (113u << 23) ? subnormal : normal;
  const vu large = magnitude > 0x7f800000u ? (magnitude >> 13 & 0x3ffu) | 0x7e00u : vu{} + 0x7c00u;
  store_bits(p, (magnitude >= (143u << 23) ? large : finite) | (bits >> 16 & 0x8000u));
}
#endif

// exp((x - m) / T) written as 2^(d * c), d = x - m, c = log2(e) / T. Below 2^-126.5 the result is exactly 0.
struct Exp {
  float c;
  float floor;  // the d at which the result has reached 0: clamping there keeps d * c and entropy's e * d finite

  explicit Exp(double temperature) {
    c = static_cast<float>(1.4426950408889634 / temperature);
    floor = -127.0f / c;
  }

  // NaN stays: the comparison is false.
  vf clamp(vf d) const { return max_keep_second(splat(floor), d); }

  // 2^(d * c) = fraction * scale for clamped d <= 0. Kept apart so that a sum takes the product in one fma.
  void split(vf d, vf& fraction, vf& scale) const {
    // 1.5 * 2^23 makes the addition round to an integer; + 127 leaves that integer already biased as an exponent.
    constexpr float kRound = 12582912.0f + 127.0f;
    const vf rounded = d * c + kRound;
    const vf f = d * c - (rounded - kRound);
    scale = reinterpret_cast<vf>(reinterpret_cast<vu>(rounded) << 23);
    // Minimax for 2^f on [-1/2, 1/2]: relative error 1.9e-9, 7.9e-8 with the rounding of the last step.
    vf p = 1.534581242594868e-4f * f + 1.3399930903688073e-3f;
    p = p * f + 9.618489071726799e-3f;
    p = p * f + 5.550328642129898e-2f;
    p = p * f + 2.4022646248340607e-1f;
    p = p * f + 6.931471824645996e-1f;
    fraction = p * f + 1.0f;
  }
};

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
