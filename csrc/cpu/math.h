// Vectors of the ISA's own width, exp, and 16-bit loads and stores. Everything here has internal linkage:
// were it shared, the linker could keep the AVX-512 copy of a function for the AVX2 kernels too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "types.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace rk {
namespace RK_ISA {
namespace {

#if defined(__AVX512F__) && !defined(RK_NARROW)  // a family may prefer half the width
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr float kInf = INFINITY;

typedef float vf __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef double vd __attribute__((vector_size(kBytes)));  // of half as many lanes
typedef uint8_t vb __attribute__((vector_size(kLanes)));
typedef uint16_t vh __attribute__((vector_size(kBytes / 2)));
typedef float vf_unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(kBytes), aligned(2), may_alias));
typedef uint8_t vb_unaligned __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

inline int64_t offset(const Rows& rows, int64_t row) {
  return (row / rows.inner) * rows.stride_outer + (row % rows.inner) * rows.stride_inner;
}

inline int64_t label_of(const Labels& labels, int64_t row) {
  return labels.bytes == 4 ? static_cast<const int32_t*>(labels.data)[row]
                           : static_cast<const int64_t*>(labels.data)[row];
}

inline int64_t offset_of(const Offsets& offsets, int64_t sequence) {
  return offsets.bytes == 4 ? static_cast<const int32_t*>(offsets.data)[sequence]
                            : static_cast<const int64_t*>(offsets.data)[sequence];
}

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// f(T()) with the type of a dtype.
template <class F>
inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat16:
      return f(Half());
    case Dtype::kBFloat16:
      return f(BFloat());
  }
}

// Lanes picked by constants from those of a (0 and up) and b (kLanes and up).
#ifdef __clang__
#define RK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

inline vf splat(float x) { return x - vf{}; }

// Into the second-level cache. Never faults: the address may lie past the end.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 2); }

// The first operand's NaN is dropped, the second's kept: the order that maps to one instruction.
inline vf max_keep_second(vf a, vf b) { return a > b ? a : b; }

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }

inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

inline vu load_bits(const void* p) {
  return __builtin_convertvector(*static_cast<const vh_unaligned*>(p), vu);
}

// One lane for each byte. gcc 12 writes 51 instructions for it as one conversion, 9 as two, where one does.
inline vi load_bytes(const uint8_t* p) {
#if defined(__AVX512F__) && !defined(RK_NARROW)
  return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  const vh halves = __builtin_convertvector(*reinterpret_cast<const vb_unaligned*>(p), vh);
  return __builtin_convertvector(halves, vi);
#endif
}

inline void store_bits(void* p, vu bits) {
  *static_cast<vh_unaligned*>(p) = __builtin_convertvector(bits, vh);
}

inline vf load(const BFloat* p) { return reinterpret_cast<vf>(load_bits(p) << 16); }

// bfloat16 is the upper half of a float, so a vector of pairs splits into its even and its odd columns with
// one operation each; widening them in order takes a shuffle more.
inline void load_pairs(const BFloat* p, vf& even, vf& odd) {
  const vu pairs = *reinterpret_cast<const vu_unaligned*>(p);
  even = reinterpret_cast<vf>(pairs << 16);
  odd = reinterpret_cast<vf>(pairs & 0xffff0000u);
}

// Round to nearest even. A NaN must have the default payload: a larger one would carry into the sign.
inline vu round_to_upper_half(vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline void store_pairs(BFloat* p, vf even, vf odd) {
  *reinterpret_cast<vu_unaligned*>(p) =
      round_to_upper_half(even) >> 16 | (round_to_upper_half(odd) & 0xffff0000u);
}

#if defined(__AVX512F__) && !defined(RK_NARROW)
inline vf load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Half* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline vf load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
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

inline void store(BFloat* p, vf x) {
  const vu nan = vu{} + 0x7fc00000u;  // of the default payload
  store_bits(p, round_to_upper_half(x == x ? x : reinterpret_cast<vf>(nan)) >> 16);
}

constexpr float kLargest = 3.402823466e38f;

// The largest finite number of a dtype.
inline float largest(Dtype dtype) {
  return dtype == Dtype::kFloat16 ? 65504.0f : dtype == Dtype::kBFloat16 ? 3.3895313892515355e38f : kLargest;
}

// Bounded to +-limit, so that a finite number stays finite in a narrower dtype; infinities and NaN stay.
inline vf saturate(vf x, float limit) {
  const vf magnitude = x < 0.0f ? -x : x;
  const vf bounded = x < 0.0f ? splat(-limit) : splat(limit);
  return (magnitude > limit) & (magnitude <= kLargest) ? bounded : x;
}

template <int kHalf, size_t... I>
inline float max_lane(vf x, std::index_sequence<I...> lanes) {
  x = max_keep_second(RK_SHUFFLE(x, x, int(I ^ kHalf)...), x);
  if constexpr (kHalf == 1)
    return x[0];
  else
    return max_lane<kHalf / 2>(x, lanes);
}

// In a fixed tree.
inline float sum_lanes(vf x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// A sum in double by lane. (One vector of as many doubles as lanes goes through memory in gcc 12.)
class DoubleSum {
  vd low_ = {}, high_ = {};

  static vd half(vf x, int which) {
    typedef float Half __attribute__((vector_size(kBytes / 2)));
    Half halves[2];
    memcpy(halves, &x, sizeof x);
    return __builtin_convertvector(halves[which], vd);
  }

 public:
  void add(vf x) {
    low_ += half(x, 0);
    high_ += half(x, 1);
  }
  void add(vi x) { add(__builtin_convertvector(x, vf)); }
  void add_squares(vf x) {
    low_ += half(x, 0) * half(x, 0);
    high_ += half(x, 1) * half(x, 1);
  }

  double value() const {
    double sum = 0.0;
    for (int i = 0; i < kLanes / 2; ++i) sum += low_[i];
    for (int i = 0; i < kLanes / 2; ++i) sum += high_[i];
    return sum;
  }
};

// exp((x - m) / T) written as 2^(d * c), d = x - m, c = log2(e) / T. Below 2^-126.5 the result is exactly 0.
struct Exp {
  float c;
  // The d at which the result has reached 0: clamping there keeps d * c and entropy's e * d finite.
  float floor;

  explicit Exp(double temperature) {
    c = static_cast<float>(1.4426950408889634 / temperature);
    floor = -127.0f / c;
  }

  // NaN stays: the comparison is false.
  vf clamp(vf d) const { return max_keep_second(splat(floor), d); }

  // 2^(d * c) = fraction * scale for clamped d <= 0. Kept apart so that a sum takes the product in one fma.
  void split(vf d, vf& fraction, vf& scale) const {
    // 1.5 * 2^23 makes the addition round to an integer;
    // + 127 leaves that integer already biased as an exponent.
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

// exp(u) for |u| <= 20 in parts, so that nothing cancels where 1 or 1 + u is taken off it:
// exp(u) = scale * (1 + f + bend), bend = exp(f) - 1 - f. Where |u| <= 1/2, scale = 1 and f = u exactly.
struct SplitExp {
  vf scale, f, bend;

  explicit SplitExp(vf u) {
    // As in Exp::split. 127 leaves the integer biased as an exponent.
    constexpr float kRound = 12582912.0f + 127.0f;
    const vf magnitude = u < 0.0f ? -u : u;
    const vf rounded = magnitude <= 0.5f ? splat(kRound) : u * 1.44269504f + kRound;
    const vf n = rounded - kRound;
    scale = reinterpret_cast<vf>(reinterpret_cast<vu>(rounded) << 23);
    // ln 2 in two parts; the first has 9 trailing zeros, so that n times it is exact.
    f = (u - n * 0.693145751953125f) - n * 1.4286068203094172e-6f;
    // Taylor: the term left out is 6e-9 of the sum at |f| = 1/2.
    vf p = 2.7557319e-7f * f + 2.7557319e-6f;
    p = p * f + 2.4801587e-5f;
    p = p * f + 1.9841270e-4f;
    p = p * f + 1.3888889e-3f;
    p = p * f + 8.3333333e-3f;
    p = p * f + 4.1666667e-2f;
    p = p * f + 1.6666667e-1f;
    p = p * f + 0.5f;
    bend = f * f * p;
  }

  vf value() const { return scale * (f + bend) + scale; }
  vf minus_one() const { return scale * bend + (scale * f + (scale - 1.0f)); }
};

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
