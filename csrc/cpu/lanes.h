// A reverse scan with one lane per sequence: a step of the scan is one vector operation and a sequence's bits
// never depend on its neighbours. Squares of kLanes sequences and steps are transposed in registers. A lane
// that is through takes the next sequence from the queue, so that lanes do not idle where lengths differ. For
// math.h's reason everything here has internal linkage; a family includes it after math.h.
#pragma once

#include "math.h"
#include "scan.h"

namespace rk {
namespace RK_ISA {
namespace {

// Positions, towards the beginning, that are fetched ahead: five streams a lane are more than the hardware
// follows, and those of unequal sequences lie in as many pages. Fastest of 64 and 256 on an AVX-512 core, a
// third faster than none where lengths differ and nothing is in cache.
constexpr int kAhead = 64;

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

// count < kLanes elements, in pieces of a size the compiler knows: calling memcpy costs more than the move.
template <class T>
inline void copy_few(T* to, const T* from, int count) {
  for (int piece = kLanes / 2; piece > 0; piece /= 2)
    if (count & piece) {
      __builtin_memcpy(to, from, piece * sizeof(T));
      to += piece, from += piece;
    }
}

// `steps` elements as the upper lanes, 0 in the lower ones.
template <class T>
inline vf load_upper(const T* p, int steps) {
  if (steps == kLanes) return load(p);
  T lanes[kLanes] = {};
  copy_few(lanes + kLanes - steps, p, steps);
  return load(lanes);
}

// All bits set where the position counts.
inline vi load_mask_upper(const uint8_t* p, int steps) {
  vb mask;
  if (steps == kLanes) {
    memcpy(&mask, p, sizeof mask);
  } else {
    uint8_t bytes[kLanes] = {};
    copy_few(bytes + kLanes - steps, p, steps);
    memcpy(&mask, bytes, sizeof mask);
  }
  return __builtin_convertvector(mask, vi) != 0;
}

inline void store_upper(float* p, vf x, int steps) {
  if (steps == kLanes) return store(p, x);
  float lanes[kLanes];
  store(lanes, x);
  copy_few(p, lanes + kLanes - steps, steps);
}

inline vf select(vi counts, vf x) { return reinterpret_cast<vf>(counts & reinterpret_cast<vi>(x)); }

// Carried from one square to the one before it.
struct State {
  vf next_value = {};
  vf sum = {};
};

// What a Source is:
//   kHoles, kMasked    semantics of the mask, and whether there is one
//   Lane               where one sequence lies; `left`: its positions that are not scanned yet
//   Carry              a State `scan` and whatever else it carries from step to step
//   open(slot, i, lane, carry)   the slot-th sequence of the queue into lane i
//   load(lane, steps, reward, value, counts)   `steps` positions from lane.left on, 0 where they do not count
//   shape(carry, reward, counts) -> reward     by step, all lanes
//   collect(carry, advantage, counts)          by step, all lanes
//   store(lane, steps, advantage, value)       0 where they do not count
//   close(lane, i, carry)                      lane i has scanned its sequence

// On entry rewards, values and counts by time; on exit the advantages in place of the rewards.
template <class Source>
inline void scan_square(const Source& source, vf (&rewards)[kLanes], const vf (&values)[kLanes],
                        const vf (&keep)[kLanes], typename Source::Carry& carried) {
  typename Source::Carry carry = carried;
  State& state = carry.scan;
  const vf gamma = splat(source.gamma), decay = splat(source.gamma * source.lam);
  for (int t = kLanes - 1; t >= 0; --t) {
    const vi counts = Source::kMasked ? reinterpret_cast<vi>(keep[t]) != 0 : vi{} - 1;
    const vf reward = source.shape(carry, rewards[t], counts);
    const vf delta = reward + gamma * state.next_value - values[t];
    const vf sum = delta + decay * state.sum;
    if (Source::kMasked && Source::kHoles != Holes::kZero) {
      if (Source::kHoles == Holes::kSkip) {
        state.next_value = counts ? values[t] : state.next_value;
        state.sum = counts ? sum : state.sum;
      } else {
        state.next_value = values[t];
        state.sum = counts ? sum : vf{};
      }
    } else {  // reward and value of a hole are 0 already
      state = {values[t], sum};
    }
    source.collect(carry, state.sum, counts);
    rewards[t] = state.sum;
  }
  carried = carry;
}

// Scans the sequences at slots begin, begin + stride, ... below end of the source's queue.
template <class Source>
void scan_lanes(const Source& source, int64_t begin, int64_t end, int64_t stride) {
  typename Source::Lane lanes[kLanes];
  typename Source::Carry carry;
  int64_t next = begin;
  for (;;) {
    int steps[kLanes], active = 0;
    vf rewards[kLanes] = {}, values[kLanes] = {}, keep[kLanes] = {}, kept_values[kLanes];
    vi counts[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) {
      auto& lane = lanes[i];
      steps[i] = 0;
      if (lane.left == 0) {
        if (next >= end) continue;
        source.open(next, i, lane, carry);
        next += stride;
      }
      ++active;
      // From the end: only the square that holds a sequence's beginning is short.
      steps[i] = static_cast<int>(lane.left < kLanes ? lane.left : kLanes);
      lane.left -= steps[i];
      source.load(lane, steps[i], rewards[i], values[i], counts[i]);
      keep[i] = reinterpret_cast<vf>(counts[i]);
      kept_values[i] = values[i];
    }
    if (!active) return;
    transpose(rewards);
    transpose(values);
    if (Source::kMasked && Source::kHoles != Holes::kZero) transpose(keep);
    scan_square(source, rewards, values, keep, carry);
    transpose(rewards);
    for (int i = 0; i < kLanes; ++i) {
      if (!steps[i]) continue;
      const vf advantage = Source::kMasked ? select(counts[i], rewards[i]) : rewards[i];
      source.store(lanes[i], steps[i], advantage, kept_values[i]);
      if (lanes[i].left == 0) source.close(lanes[i], i, carry);
    }
  }
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
