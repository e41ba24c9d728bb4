// gae: delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}; returns = A + V, from the end.
// One lane per row, so that a step of the scan is one vector operation; tiles are transposed in registers.
#include "math.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int kTile = 64;  // time steps; kLanes rows of them, five arrays, stay in the first-level cache

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

// to[j * stride_to + i] = from[i * stride_from + j] for i, j < kLanes.
inline void transpose(const float* from, int stride_from, float* to, int stride_to) {
  vf rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load(from + i * stride_from);
  transpose_stages<kLanes / 2>(rows);
  for (int i = 0; i < kLanes; ++i) store(to + i * stride_to, rows[i]);
}

typedef float ByRow[kLanes][kTile];
typedef float ByTime[kTile][kLanes];

void to_time(const ByRow& from, ByTime& to) {
  for (int t = 0; t < kTile; t += kLanes) transpose(&from[0][t], kTile, to[t], kLanes);
}

void to_rows(const ByTime& from, ByRow& to) {
  for (int t = 0; t < kTile; t += kLanes) transpose(from[t], kLanes, &to[0][t], kTile);
}

// Carried from one tile to the one before it.
struct State {
  vf next_value;
  vf sum;
};

struct Tile {
  alignas(kBytes) ByRow rewards = {}, values = {}, keep = {}, advantages;
  alignas(kBytes) ByTime by_time[4];
};

template <class T>
void read_row(const void* source, int64_t offset, int steps, const float* keep, float* to) {
  T raw[kTile] = {};
  memcpy(raw, static_cast<const T*>(source) + offset, steps * sizeof(T));
  for (int t = 0; t < kTile; t += kLanes) store(to + t, load(keep + t) != 0.0f ? load(raw + t) : vf{});
}

// Rows [row, row + count), time [start, start + steps). Where a position does not count, reward and value become 0.
template <class T>
void read_tile(const Gae& args, int64_t row, int count, int64_t start, int steps, Tile& tile) {
  for (int i = 0; i < count; ++i) {
    const uint8_t* mask = args.mask ? args.mask + (row + i) * args.stride_mask + start : nullptr;
    for (int t = 0; t < kTile; ++t) tile.keep[i][t] = t < steps && (!mask || mask[t]) ? 1.0f : 0.0f;
    read_row<T>(args.rewards, (row + i) * args.stride_rewards + start, steps, tile.keep[i], tile.rewards[i]);
    read_row<T>(args.values, (row + i) * args.stride_values + start, steps, tile.keep[i], tile.values[i]);
  }
}

template <Holes kHoles>
void scan_tile(const Gae& args, int steps, Tile& tile, State& state) {
  const vf gamma = splat(args.gamma), decay = splat(args.gamma * args.lam);
  auto& [rewards, values, keep, advantages] = tile.by_time;
  to_time(tile.rewards, rewards);
  to_time(tile.values, values);
  to_time(tile.keep, keep);
  for (int t = steps - 1; t >= 0; --t) {
    const vf value = load(values[t]);
    const vf delta = load(rewards[t]) + gamma * state.next_value - value;
    const vf sum = delta + decay * state.sum;
    if (kHoles == Holes::kZero) {  // reward and value of a hole are 0 already
      state = {value, sum};
    } else {
      const auto counts = load(keep[t]) != 0.0f;
      state.next_value = kHoles == Holes::kSkip ? (counts ? value : state.next_value) : value;
      state.sum = counts ? sum : (kHoles == Holes::kSkip ? state.sum : vf{});
    }
    store(advantages[t], state.sum);
  }
  to_rows(advantages, tile.advantages);
}

void write_tile(const Gae& args, int64_t row, int count, int64_t start, int steps, const Tile& tile) {
  for (int i = 0; i < count; ++i) {
    float* advantages = args.advantages + (row + i) * args.time + start;
    float* returns = args.returns + (row + i) * args.time + start;
    for (int t = 0; t < steps; ++t) {
      const float advantage = tile.keep[i][t] != 0.0f ? tile.advantages[i][t] : 0.0f;
      advantages[t] = advantage;
      returns[t] = advantage + tile.values[i][t];
    }
  }
}

template <class T, Holes kHoles>
void scan(const Gae& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kLanes) {
    const int count = static_cast<int>(end - row < kLanes ? end - row : kLanes);
    Tile tile;
    State state = {};
    if (args.bootstrap)
      for (int i = 0; i < count; ++i) state.next_value[i] = args.bootstrap[row + i];
    for (int64_t stop = args.time; stop > 0;) {
      // Tiles end at multiples of kTile: only the last one is short.
      const int64_t start = (stop - 1) / kTile * kTile;
      const int steps = static_cast<int>(stop - start);
      read_tile<T>(args, row, count, start, steps, tile);
      scan_tile<kHoles>(args, steps, tile, state);
      write_tile(args, row, count, start, steps, tile);
      stop = start;
    }
  }
}

template <class T>
void scan_holes(const Gae& args, int64_t begin, int64_t end) {
  switch (args.holes) {
    case Holes::kSkip:
      return scan<T, Holes::kSkip>(args, begin, end);
    case Holes::kStop:
      return scan<T, Holes::kStop>(args, begin, end);
    case Holes::kZero:
      return scan<T, Holes::kZero>(args, begin, end);
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
