// gae as one affine recurrence: with u_{t+1} = gamma * V_{t+1} + gamma * lam * A_{t+1}, what the future adds,
//   A_t = r_t - V_t + u_{t+1},   u_t = a_t * u_{t+1} + b_t,   a_t = gamma * lam,
//   b_t = gamma * V_t + gamma * lam * (r_t - V_t),            u at the end = gamma * bootstrap.
// A masked hole is the map (1, 0) when the scan skips it, (0, 0) when it stops there, and r = V = 0 when it
// counts as zero. One block per sequence walks it in chunks from the end; every element is read and written
// once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "scan.h"

namespace rk {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kItems = 4;  // consecutive positions of a thread: 16 bytes of float, one access
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// u -> a * u + b
struct Affine {
  float a, b;
};

// `then` after `first`. Where then.a is 0 nothing of what came first is left, inf and NaN included.
__device__ inline Affine compose(Affine first, Affine then) {
  return {then.a * first.a, then.a == 0.0f ? then.b : fmaf(then.a, first.b, then.b)};
}

__device__ inline float apply(Affine map, float u) { return map.a == 0.0f ? map.b : fmaf(map.a, u, map.b); }

template <class T>
struct alignas(kItems * sizeof(T)) Pack {
  T item[kItems];
};

template <class T>
__device__ inline bool packs_align(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0;
}

// Positions [t, t + kItems) of a row of `time`; what lies beyond is `other`.
template <class T>
__device__ inline Pack<T> load_pack(const T* row, int64_t t, int64_t time, bool aligned, T other) {
  if (aligned && t + kItems <= time) return *reinterpret_cast<const Pack<T>*>(row + t);
  Pack<T> pack;
  for (int i = 0; i < kItems; ++i) pack.item[i] = t + i < time ? row[t + i] : other;
  return pack;
}

__device__ inline void store_pack(float* row, int64_t t, int64_t time, bool aligned,
                                  const Pack<float>& pack) {
  if (aligned && t + kItems <= time) {
    *reinterpret_cast<Pack<float>*>(row + t) = pack;
    return;
  }
  for (int i = 0; i < kItems; ++i)
    if (t + i < time) row[t + i] = pack.item[i];
}

// One sequence: its pointers, its length, and whether they allow accesses of a whole pack.
template <class T>
struct Sequence {
  const T* rewards;
  const T* values;
  const uint8_t* mask;
  float* advantages;
  float* returns;
  int64_t time;
  bool aligned_rewards, aligned_values, aligned_mask, aligned_outputs;
};

// Start of packed sequence `row`, within [low, total]: nobody on the host has looked at the offsets, and
// wrong ones must not lead outside.
__device__ inline int64_t offset_of(const Gae& args, int64_t row, int64_t low) {
  const int64_t offset = args.offset_bytes == 4 ? static_cast<const int32_t*>(args.offsets)[row]
                                                : static_cast<const int64_t*>(args.offsets)[row];
  return offset < low ? low : offset > args.time ? args.time : offset;
}

template <class T, bool kMasked>
__device__ Sequence<T> sequence_of(const Gae& args, int64_t row) {
  Sequence<T> s;
  int64_t in_rewards = row * args.stride_rewards, in_values = row * args.stride_values;
  int64_t in_mask = row * args.stride_mask, out = row * args.time;
  s.time = args.time;
  if (args.offsets) {
    const int64_t begin = offset_of(args, row, 0);
    s.time = offset_of(args, row + 1, begin) - begin;
    in_rewards = in_values = in_mask = out = begin;
  }
  s.rewards = static_cast<const T*>(args.rewards) + in_rewards;
  s.values = static_cast<const T*>(args.values) + in_values;
  s.mask = kMasked ? args.mask + in_mask : nullptr;
  s.advantages = args.advantages + out;
  s.returns = args.returns + out;
  s.aligned_rewards = packs_align(s.rewards);
  s.aligned_values = packs_align(s.values);
  s.aligned_mask = packs_align(s.mask);
  s.aligned_outputs = packs_align(s.advantages) && packs_align(s.returns);
  return s;
}

// A thread's positions of one chunk as they lie in memory: what is fetched ahead.
template <class T>
struct Raw {
  Pack<T> reward, value;
  Pack<uint8_t> keep;
};

template <class T, bool kMasked>
__device__ inline Raw<T> load_raw(const Sequence<T>& s, int64_t t) {
  Raw<T> raw = {};
  if (kMasked) raw.keep = load_pack<uint8_t>(s.mask, t, s.time, s.aligned_mask, 0);
  if (!kMasked || raw.keep.item[0] || raw.keep.item[1] || raw.keep.item[2] || raw.keep.item[3]) {
    raw.reward = load_pack(s.rewards, t, s.time, s.aligned_rewards, T(0.0f));
    raw.value = load_pack(s.values, t, s.time, s.aligned_values, T(0.0f));
  }
  return raw;
}

// The same as numbers: value and r - V, 0 where nothing counts, and the map of each position.
struct Items {
  float delta[kItems];
  float value[kItems];
  Affine map[kItems];
  bool counted[kItems];
};

template <class T, Holes kHoles, bool kMasked>
__device__ inline Items items_of(const Raw<T>& raw, int64_t t, int64_t time, float gamma, float decay) {
  Items items;
  for (int i = 0; i < kItems; ++i) {
    const bool inside = t + i < time;
    const bool counted = inside && (!kMasked || raw.keep.item[i] != 0);
    const float v = counted ? to_float(raw.value.item[i]) : 0.0f;
    const float delta = counted ? to_float(raw.reward.item[i]) - v : 0.0f;
    items.counted[i] = counted;
    items.value[i] = v;
    items.delta[i] = delta;
    const bool is_step = counted || (kHoles == Holes::kZero && inside);
    const bool stops = kHoles == Holes::kStop && inside && !counted;
    items.map[i] = {is_step ? decay : stops ? 0.0f : 1.0f, fmaf(decay, delta, gamma * v)};
  }
  return items;
}

// Maps of this lane and all lanes behind it in the warp, the last lane's first.
__device__ inline Affine warp_suffix(Affine map, int lane) {
  for (int step = 1; step < kWarp; step *= 2) {
    const Affine behind = {__shfl_down_sync(kAllLanes, map.a, step),
                           __shfl_down_sync(kAllLanes, map.b, step)};
    if (lane + step < kWarp) map = compose(behind, map);
  }
  return map;
}

// What wrong offsets leave out before the first and behind the last sequence must not stay uninitialised
// memory.
template <int kThreads>
__device__ void fill_uncovered(const Gae& args, int64_t row) {
  const int64_t first = row == 0 ? offset_of(args, 0, 0) : 0;
  const int64_t last = row == args.rows - 1 ? offset_of(args, args.rows, 0) : args.time;
  for (int64_t t = threadIdx.x; t < first; t += kThreads) args.advantages[t] = args.returns[t] = NAN;
  for (int64_t t = last + threadIdx.x; t < args.time; t += kThreads)
    args.advantages[t] = args.returns[t] = NAN;
}

template <class T, Holes kHoles, bool kMasked, int kThreads>
__global__ void __launch_bounds__(kThreads) gae_kernel(Gae args) {
  constexpr int kWarps = kThreads / kWarp;
  constexpr int64_t kChunk = int64_t{kThreads} * kItems;
  __shared__ Affine totals[2][kWarps];  // two, so that one barrier a chunk is enough
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = blockIdx.x;
  const Sequence<T> s = sequence_of<T, kMasked>(args, row);
  if (args.offsets) fill_uncovered<kThreads>(args, row);
  float carried = args.bootstrap ? args.gamma * args.bootstrap[row] : 0.0f;

  // Chunks start at 0, so that padding on the right changes no bit.
  int64_t t = (s.time + kChunk - 1) / kChunk * kChunk - kChunk + int64_t{kItems} * threadIdx.x;
  Raw<T> next = load_raw<T, kMasked>(s, t < 0 ? s.time : t);
  for (int parity = 0; t >= 0; t -= kChunk, parity ^= 1) {
    const Items items = items_of<T, kHoles, kMasked>(next, t, s.time, args.gamma, args.decay);
    if (t >= kChunk) next = load_raw<T, kMasked>(s, t - kChunk);

    Affine own = items.map[kItems - 1];
    for (int i = kItems - 2; i >= 0; --i) own = compose(own, items.map[i]);
    const Affine suffix = warp_suffix(own, lane);
    Affine behind = {__shfl_down_sync(kAllLanes, suffix.a, 1), __shfl_down_sync(kAllLanes, suffix.b, 1)};
    if (lane == kWarp - 1) behind = {1.0f, 0.0f};
    if (lane == 0) totals[parity][warp] = suffix;
    __syncthreads();

    float u = carried;
    for (int w = kWarps - 1; w >= 0; --w) {
      if (w == warp) u = apply(behind, carried);
      carried = apply(totals[parity][w], carried);
    }
    Pack<float> advantages, returns;
    for (int i = kItems - 1; i >= 0; --i) {
      const float advantage = items.delta[i] + u;
      advantages.item[i] = items.counted[i] ? advantage : 0.0f;
      returns.item[i] = items.counted[i] ? advantage + items.value[i] : 0.0f;
      u = apply(items.map[i], u);
    }
    store_pack(s.advantages, t, s.time, s.aligned_outputs, advantages);
    store_pack(s.returns, t, s.time, s.aligned_outputs, returns);
  }
}

}  // namespace cuda
}  // namespace rk
