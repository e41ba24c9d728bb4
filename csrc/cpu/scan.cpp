// gae: delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}; returns = A + V, from
// the end. One lane per row, so that a step of the scan is one vector operation and a row's bits never depend
// on its neighbours; squares of kLanes rows and steps are transposed in registers. Eight rows at a time, not
// sixteen: as fast in cache, and three times as fast on rows that are not (bench/README.md).
#define RK_NARROW
#include "scan.h"

#include "math.h"

namespace rk {
namespace RK_ISA {
namespace {

// Exchanges the upper `kStep` lanes of every 2 * kStep in `a` with the lower ones in `b`.
template <int kStep, size_t... I>
inline void exchange(vf& a, vf& b, std::index_sequence<I...>) {
  const vf low = RK_SHUFFLE(a, b, (I & kStep ? int(I) - kStep + kLanes : int(I))...);
  b = RK_SHUFFLE(a, b, (I & kStep ? int(I) + kLanes : int(I) + kStep)...);
  a = low;
}

template <int kStep>
inline void transpose_stages(vf (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes>());
  if constexpr (kStep > 1) transpose_stages<kStep / 2>(rows);
}

// rows[i][j] <-> rows[j][i]
inline void transpose(vf (&rows)[kLanes]) { transpose_stages<kLanes / 2>(rows); }

// The first `steps` lanes from memory, the rest 0.
template <class T>
inline vf load_part(const T* p, int steps) {
  if (steps == kLanes) return load(p);
  T lanes[kLanes] = {};
  memcpy(lanes, p, steps * sizeof(T));
  return load(lanes);
}

// All bits set where the position counts.
inline vi load_mask(const uint8_t* p, int steps) {
  uint8_t bytes[kLanes] = {};
  vb mask;
  if (steps == kLanes) {
    memcpy(&mask, p, sizeof mask);
  } else {
    memcpy(bytes, p, steps);
    memcpy(&mask, bytes, sizeof mask);
  }
  return __builtin_convertvector(mask, vi) != 0;
}

inline void store_part(float* p, vf x, int steps) {
  if (steps == kLanes)
    store(p, x);
  else
    memcpy(p, &x, steps * sizeof(float));
}

// Carried from one square to the one before it.
struct State {
  vf next_value = {};
  vf sum = {};
};

// On entry rewards and values, 0 where keep is not set, by time; on exit the advantages in place of the
// rewards.
template <Holes kHoles, bool kMasked>
inline void scan_square(const Gae& args, int steps, vf (&rewards)[kLanes], const vf (&values)[kLanes],
                        const vf (&keep)[kLanes], State& state) {
  const vf gamma = splat(args.gamma), decay = splat(args.gamma * args.lam);
  for (int t = steps - 1; t >= 0; --t) {
    const vf delta = rewards[t] + gamma * state.next_value - values[t];
    const vf sum = delta + decay * state.sum;
    if (kMasked && kHoles != Holes::kZero) {
      const vi counts = reinterpret_cast<vi>(keep[t]) != 0;
      if (kHoles == Holes::kSkip) {
        state.next_value = counts ? values[t] : state.next_value;
        state.sum = counts ? sum : state.sum;
      } else {
        state.next_value = values[t];
        state.sum = counts ? sum : vf{};
      }
    } else {  // reward and value of a hole are 0 already
      state = {values[t], sum};
    }
    rewards[t] = state.sum;
  }
}

// Rows [row, row + count), time [start, start + steps), both at most kLanes.
template <class T, Holes kHoles, bool kMasked>
void square(const Gae& args, int64_t row, int count, int64_t start, int steps, State& state) {
  const T* reward = static_cast<const T*>(args.rewards) + row * args.stride_rewards + start;
  const T* value = static_cast<const T*>(args.values) + row * args.stride_values + start;
  const uint8_t* mask = kMasked ? args.mask + row * args.stride_mask + start : nullptr;
  vf rewards[kLanes] = {}, values[kLanes] = {}, keep[kLanes] = {}, returned[kLanes];
  vi mask_rows[kLanes] = {};
  for (int i = 0; i < count; ++i) {
    rewards[i] = load_part(reward + i * args.stride_rewards, steps);
    values[i] = load_part(value + i * args.stride_values, steps);
    if (kMasked) {
      mask_rows[i] = load_mask(mask + i * args.stride_mask, steps);
      rewards[i] = mask_rows[i] ? rewards[i] : vf{};
      values[i] = mask_rows[i] ? values[i] : vf{};
      keep[i] = reinterpret_cast<vf>(mask_rows[i]);
    }
    returned[i] = values[i];
    // The same square of the next group of rows: each row is a page of its own, and its address takes long to
    // look up.
    const int64_t next = row + i + kLanes;
    prefetch(reward + (i + kLanes) * args.stride_rewards);
    prefetch(value + (i + kLanes) * args.stride_values);
    if (kMasked) prefetch(mask + (i + kLanes) * args.stride_mask);
    prefetch_to_write(args.advantages + next * args.time + start);
    prefetch_to_write(args.returns + next * args.time + start);
  }
  transpose(rewards);
  transpose(values);
  if (kMasked && kHoles != Holes::kZero) transpose(keep);
  scan_square<kHoles, kMasked>(args, steps, rewards, values, keep, state);
  transpose(rewards);
  for (int i = 0; i < count; ++i) {
    const vf advantage = kMasked ? (mask_rows[i] ? rewards[i] : vf{}) : rewards[i];
    store_part(args.advantages + (row + i) * args.time + start, advantage, steps);
    store_part(args.returns + (row + i) * args.time + start, advantage + returned[i], steps);
  }
}

template <class T, Holes kHoles, bool kMasked>
void scan(const Gae& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kLanes) {
    const int count = static_cast<int>(end - row < kLanes ? end - row : kLanes);
    State state;
    if (args.bootstrap)
      for (int i = 0; i < count; ++i) state.next_value[i] = args.bootstrap[row + i];
    for (int64_t stop = args.time; stop > 0;) {
      const int64_t start = (stop - 1) / kLanes * kLanes;  // only the last square is short
      square<T, kHoles, kMasked>(args, row, count, start, static_cast<int>(stop - start), state);
      stop = start;
    }
  }
}

template <class T>
void scan_holes(const Gae& args, int64_t begin, int64_t end) {
  switch (args.holes) {
    case Holes::kSkip:
      return args.mask ? scan<T, Holes::kSkip, true>(args, begin, end)
                       : scan<T, Holes::kSkip, false>(args, begin, end);
    case Holes::kStop:
      return args.mask ? scan<T, Holes::kStop, true>(args, begin, end)
                       : scan<T, Holes::kStop, false>(args, begin, end);
    case Holes::kZero:
      return args.mask ? scan<T, Holes::kZero, true>(args, begin, end)
                       : scan<T, Holes::kZero, false>(args, begin, end);
  }
}

}  // namespace

void gae(const Gae& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return scan_holes<float>(args, begin, end);
    case Dtype::kFloat16:
      return scan_holes<Half>(args, begin, end);
    case Dtype::kBFloat16:
      return scan_holes<BFloat>(args, begin, end);
  }
}

}  // namespace RK_ISA
}  // namespace rk
