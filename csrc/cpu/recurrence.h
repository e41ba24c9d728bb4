// sum_t = delta_t + decay * sum_{t+1} from the end of a sequence, in vectors of neighbouring positions:
// within a vector by doubling, between vectors by one fma. Vectors are counted from the last position that
// counts, so that no bit depends on other sequences or on padding. For math.h's reason everything here has
// internal linkage; a family includes it after math.h.
#pragma once

#include "math.h"
#include "scan.h"

namespace rk {
namespace RK_ISA {
namespace {

static_assert(kLanes == 4 || kLanes == 8);

// count < kLanes elements, in pieces of a size the compiler knows: calling memcpy costs more than the move.
template <class T>
inline void copy_few(T* to, const T* from, int count) {
  for (int piece = kLanes / 2; piece > 0; piece /= 2)
    if (count & piece) {
      __builtin_memcpy(to, from, piece * sizeof(T));
      to += piece, from += piece;
    }
}

#ifdef __AVX2__
// All bits set in the upper `steps` lanes.
inline __m256i upper(int steps) {
  return reinterpret_cast<__m256i>(vi{1, 2, 3, 4, 5, 6, 7, 8} > kLanes - steps);
}
#endif

// `steps` elements as the upper lanes, 0 in the lower ones.
template <class T>
inline vf load_upper(const T* p, int steps) {
  if (steps == kLanes) return load(p);
#ifdef __AVX2__
  if constexpr (std::is_same_v<T, float>) return _mm256_maskload_ps(p - (kLanes - steps), upper(steps));
#endif
  T lanes[kLanes] = {};
  copy_few(lanes + kLanes - steps, p, steps);
  return load(lanes);
}

inline void store_upper(float* p, vf x, int steps) {
  if (steps == kLanes) return store(p, x);
#ifdef __AVX2__
  _mm256_maskstore_ps(p - (kLanes - steps), upper(steps), x);
#else
  float lanes[kLanes];
  store(lanes, x);
  copy_few(p, lanes + kLanes - steps, steps);
#endif
}

inline vf select(vi counts, vf x) { return reinterpret_cast<vf>(counts & reinterpret_cast<vi>(x)); }

inline bool any_not_finite(vf x) {
  const vi bad = (reinterpret_cast<vi>(x) & 0x7fffffff) >= 0x7f800000;
#ifdef __AVX2__
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(bad), reinterpret_cast<__m256i>(bad));
#else
  uint64_t parts[kBytes / 8], either = 0;
  memcpy(parts, &bad, sizeof parts);
  for (uint64_t part : parts) either |= part;
  return either != 0;
#endif
}

constexpr unsigned kEvery = (1u << kLanes) - 1;

// One bit for each lane.
inline unsigned bits_of(vi lanes) {
#ifdef __AVX2__
  return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(lanes)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<unsigned>(lanes[i] & 1) << i;
  return bits;
#endif
}

// Which of a vector's positions count; those before the sequence's beginning do not.
struct Counts {
  vi lanes = vi{} - 1;  // all bits set where one counts
  unsigned bits = kEvery;
  bool all = true;  // all that belong to the sequence

  Counts() = default;  // of a sequence without mask

  Counts(const uint8_t* mask, int steps) {
    uint8_t bytes[kLanes] = {};
    if (steps < kLanes) copy_few(bytes + kLanes - steps, mask, steps);
    lanes = load_bytes(steps < kLanes ? bytes : mask) != 0;
    bits = bits_of(lanes);
    all = (bits | kEvery >> steps) == kEvery;
  }
};

// One after the last position that counts.
inline int64_t counted_end(const uint8_t* mask, int64_t time) {
  for (uint64_t word; time >= 8; time -= 8) {
    memcpy(&word, mask + time - 8, 8);
    if (word) break;
  }
  while (time > 0 && !mask[time - 1]) --time;
  return time;
}

inline void fill_zero(float* p, int64_t begin, int64_t end) {
  if (begin < end) memset(p + begin, 0, (end - begin) * sizeof(float));
}

// For every set of lanes: which of them go to the upper lanes if the others are left out,
// and where each then is.
struct Packing {
  uint8_t together[kEvery + 1][kLanes] = {}, apart[kEvery + 1][kLanes] = {};

  constexpr Packing() {
    for (unsigned bits = 0; bits <= kEvery; ++bits) {
      int place = kLanes;
      for (int i = kLanes - 1; i >= 0; --i)
        if (bits >> i & 1) {
          together[bits][--place] = static_cast<uint8_t>(i);
          apart[bits][i] = static_cast<uint8_t>(place);
        }
    }
  }
};
constexpr Packing kPacking;

// Lanes picked by number.
inline vf pick(vf x, vi lanes) {
#ifdef __clang__
  vf picked;
  for (int i = 0; i < kLanes; ++i) picked[i] = x[lanes[i]];
  return picked;
#else
  return __builtin_shuffle(x, lanes);
#endif
}

// Between a vector and the one before it.
struct State {
  vf turned;  // a vector whose last lane is the value that follows
  float sum;

  explicit State(float next_value, float sum_ = 0.0f) : turned(splat(next_value)), sum(sum_) {}
};

struct Recurrence {
  float gamma, decay;
  float two;       // decay^2
  vf half = {};    // decay^(4 - i) in the lower half's lane i, where there are halves of four
  vf to_end = {};  // decay^(kLanes - i)

  Recurrence(float gamma_, float lam) : gamma(gamma_), decay(gamma_ * lam), two(decay * decay) {
    double power = 1.0;
    for (int i = 1; i <= kLanes; ++i) {
      power *= decay;
      to_end[kLanes - i] = static_cast<float>(power);
      if (i <= 4) half[4 - i] = static_cast<float>(power);
    }
  }

  // Lane i of every four takes lane i + kBy, 0 comes in.
  // (The zeros are picked where one instruction finds them.)
  template <int kBy, size_t... I>
  static vf down(vf x, std::index_sequence<I...>) {
    return RK_SHUFFLE(x, vf{}, (int(I) % 4 + kBy < 4 ? int(I) + kBy : kLanes + int(I) + kBy - 4)...);
  }

  // Lane 4 in the four lanes below it, 0 above.
  template <size_t... I>
  static vf middle(vf x, std::index_sequence<I...>) {
    return RK_SHUFFLE(x, vf{}, (int(I) < 4 ? 4 : kLanes)...);
  }

  template <size_t... I>
  static vf turn(vf x, std::index_sequence<I...>) {
    return RK_SHUFFLE(x, x, ((int(I) + 1) % kLanes)...);
  }

  template <size_t... I>
  static vf with_last(vf x, vf last, std::index_sequence<I...>) {
    return RK_SHUFFLE(x, last, (int(I) < kLanes - 1 ? int(I) : kLanes + int(I))...);
  }

  // Over `positions` at the end of which none counts.
  template <Holes kHoles>
  void pass(int64_t positions, State& state) const {
    if (positions == 0 || kHoles == Holes::kSkip) return;
    float sum = 0.0f;
    if (kHoles == Holes::kZero) {
      sum = gamma * state.turned[kLanes - 1];
      while (--positions > 0 && sum != 0.0f) sum *= decay;
    }
    state = State(0.0f, sum);
  }

  // The sums of a vector of which every position from lane `first` on counts.
  vf advance(vf reward, vf value, int first, State& state) const {
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    const vf turned = turn(value, lanes);
    vf sum = reward + gamma * with_last(turned, state.turned, lanes) - value;
    sum += decay * down<1>(sum, lanes);
    sum += two * down<2>(sum, lanes);
    if constexpr (kLanes == 8) sum += half * middle(sum, lanes);
    const vf all = sum + to_end * state.sum;
    if (first == 0) {
      state.turned = turned;
      state.sum = sum[0] + to_end[0] * state.sum;  // all[0], one instruction from the last vector's
    } else {
      state = State(value[first], all[first]);
    }
    return all;
  }

  // The same, one position after the other, and whatever counts.
  template <Holes kHoles>
  vf step(vf reward, vf value, vi counts, State& state) const {
    vf sums = {};
    float next_value = state.turned[kLanes - 1], sum = state.sum;
    for (int i = kLanes - 1; i >= 0; --i) {
      if (counts[i] || kHoles == Holes::kZero) {
        const float delta = reward[i] + gamma * next_value - value[i];
        sum = delta + decay * sum;
        next_value = value[i];
      } else if (kHoles == Holes::kStop) {
        next_value = sum = 0.0f;
      }
      sums[i] = sum;
    }
    state = State(next_value, sum);
    return sums;
  }

  // `reward` and `value` are 0 where a position does not count, and so is the result.
  template <Holes kHoles>
  vf scan(vf reward, vf value, const Counts& counts, State& state) const {
    if (counts.bits == 0 && kHoles != Holes::kZero) {
      if (kHoles == Holes::kStop) state = State(0.0f);
      return vf{};
    }
    State after = state;
    vf sums;
    if (counts.all || kHoles == Holes::kZero) {
      sums = advance(reward, value, 0, after);
    } else if (kHoles == Holes::kSkip) {
      const vi together = load_bytes(kPacking.together[counts.bits]),
               apart = load_bytes(kPacking.apart[counts.bits]);
      const int first = kLanes - __builtin_popcount(counts.bits);
      sums = pick(advance(pick(reward, together), pick(value, together), first, after), apart);
    } else {
      return select(counts.lanes, step<kHoles>(reward, value, counts.lanes, state));
    }
    if (__builtin_expect(any_not_finite(sums), 0)) {
      // Products with powers of the decay could make another NaN or infinity than the recurrence does.
      const vf steps = step<kHoles>(reward, value, counts.lanes, state);
      int last = kLanes - 1;
      while (__builtin_isfinite(sums[last])) --last;
      for (int i = last; i >= 0; --i) sums[i] = steps[i];
    } else {
      state = after;
    }
    return select(counts.lanes, sums);
  }
};

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
