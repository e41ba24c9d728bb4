// The online softmax of a row that is read once, block by block: blocks of columns as floats, their maximum,
// the row's sums. Internal linkage, as math.h.
#pragma once

#include <type_traits>

#include "math.h"

namespace rk {
namespace RK_ISA {
namespace {

// Columns: two blocks fit the first-level cache; 512 and 2048 are as fast within 5 %.
constexpr int kBlock = 1024;
// Columns between the one that is read and the one that is prefetched; 1024 is 3 % slower, 0 is 45 % slower.
constexpr int kAhead = 4096;
constexpr int kUnroll = 4;  // independent accumulators hide the latency of max and add
constexpr int kStep = kUnroll * kLanes;

template <class T>
struct Special;
template <>
struct Special<float> {
  static constexpr float kMinusInf = -kInf, kNan = NAN;
};
template <>
struct Special<Half> {
  static constexpr Half kMinusInf = {0xfc00}, kNan = {0x7e00};
};
template <>
struct Special<BFloat> {
  static constexpr BFloat kMinusInf = {0xff80}, kNan = {0x7fc0};
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_float(Half x) {
  Half lanes[kLanes] = {x};
  return load(lanes)[0];
}

// kStep columns as floats. bfloat16 comes as even and odd columns in turn: sums and maxima do not mind.
template <class T>
inline void load_step(const T* from, vf (&x)[kUnroll]) {
  for (int u = 0; u < kUnroll; ++u) x[u] = load(from + u * kLanes);
}

inline void load_step(const BFloat* from, vf (&x)[kUnroll]) {
  for (int u = 0; u < kUnroll; u += 2) load_pairs(from + u * kLanes, x[u], x[u + 1]);
}

template <class T>
inline void store_step(T* to, const vf (&x)[kUnroll]) {
  for (int u = 0; u < kUnroll; ++u) store(to + u * kLanes, x[u]);
}

inline void store_step(BFloat* to, const vf (&x)[kUnroll]) {
  for (int u = 0; u < kUnroll; u += 2) store_pairs(to + u * kLanes, x[u], x[u + 1]);
}

// Where load_step puts a column of the step: x[vector][lane].
template <class T>
struct Slot {
  int vector, lane;
  explicit Slot(int column) : vector(column / kLanes), lane(column % kLanes) {}
};
template <>
struct Slot<BFloat> {
  int vector, lane;
  explicit Slot(int column)
      : vector(column / (2 * kLanes) * 2 + column % 2), lane(column % (2 * kLanes) / 2) {}
};

template <class T>
inline void prefetch_step(const T* p) {
  for (size_t byte = 0; byte < kStep * sizeof(T); byte += 64)
    prefetch(reinterpret_cast<const char*>(p) + byte);
}

// Up to kBlock columns, padded with -inf to a multiple of kStep, which changes no result. Read step by step.
template <class T>
class Block {
 public:
  int size = 0;

  void open(const T* row, int64_t columns) {
    size = columns <= 0        ? 0
           : columns >= kBlock ? kBlock
                               : static_cast<int>(columns + kStep - 1) / kStep * kStep;
    source_ = row;
    for (vf& lane : max_) lane = splat(-kInf);
    if (size <= columns || size == 0) return;
    memcpy(tail_, row, columns * sizeof(T));
    for (int64_t i = columns; i < size; ++i) tail_[i] = Special<T>::kMinusInf;
    source_ = tail_;
  }

  void read_step(int i) {
    prefetch_step(source_ + i + kAhead);
    vf x[kUnroll];
    load_step(source_ + i, x);
    for (int u = 0; u < kUnroll; ++u) {
      max_[u] = max_keep_second(x[u], max_[u]);
      if (!std::is_same<T, float>::value) store(wide_ + i + u * kLanes, x[u]);
    }
  }

  void read() {
    for (int i = 0; i < size; i += kStep) read_step(i);
  }

  const float* columns() const { return columns(source_); }

  // Largest number read; NaNs are passed over.
  float max() const {
    const vf all = max_keep_second(max_keep_second(max_[0], max_[1]), max_keep_second(max_[2], max_[3]));
    return max_lane<kLanes / 2>(all, std::make_index_sequence<kLanes>());
  }

 private:
  const float* columns(const float*) const { return source_; }
  const float* columns(const void*) const { return wide_; }

  alignas(kBytes) float wide_[kBlock];
  alignas(kBytes) T tail_[kBlock];
  vf max_[kUnroll];
  const T* source_ = nullptr;
};

// A row's sums, in float within a block and in double, lane by lane, across blocks.
struct LaneSums {
  double sum[kLanes] = {};

  void add(const vf (&x)[kUnroll]) {
    const vf block = (x[0] + x[1]) + (x[2] + x[3]);
    for (int i = 0; i < kLanes; ++i) sum[i] += static_cast<double>(block[i]);
  }

  double total() const {
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    return total;
  }
};

struct Running {
  float m = -kInf;
  LaneSums s;  // sum(exp((x - m) / T))
  LaneSums w;  // sum(exp((x - m) / T) * (x - m))
};

template <bool kEntropy>
inline void add_step(const float* x, vf m, const Exp& exp, vf (&s)[kUnroll], vf (&w)[kUnroll]) {
  for (int u = 0; u < kUnroll; ++u) {
    const vf d = exp.clamp(load(x + u * kLanes) - m);
    vf fraction, scale;
    exp.split(d, fraction, scale);
    if (kEntropy) {
      const vf e = fraction * scale;
      s[u] += e;
      w[u] += e * d;
    } else {
      s[u] += fraction * scale;
    }
  }
}

// Sums one block while reading the next, so that memory and arithmetic work at the same time.
template <class T, bool kEntropy>
void add_block(const Block<T>& block, Block<T>& next, const Exp& exp, Running& row) {
  // While every logit so far is -inf, any finite reference gives exp = 0 for them, and NaN for a NaN.
  const vf m = splat(row.m == -kInf ? 0.0f : row.m);
  const float* x = block.columns();
  vf s[kUnroll] = {}, w[kUnroll] = {};
  int i = 0;
  for (; i < next.size; i += kStep) {
    next.read_step(i);
    add_step<kEntropy>(x + i, m, exp, s, w);
  }
  for (; i < block.size; i += kStep) add_step<kEntropy>(x + i, m, exp, s, w);
  row.s.add(s);
  if (kEntropy) row.w.add(w);
}

void raise_max(Running& row, float m, double temperature) {
  if (!(m > row.m)) return;
  if (row.m != -kInf) {
    const double rise = static_cast<double>(row.m) - m;
    const double scale = std::exp(rise / temperature);
    // The terms' (x - m) shift too. Where scale is 0 nothing of them is left (0 * inf would be NaN).
    for (int i = 0; i < kLanes; ++i) {
      row.w.sum[i] = scale == 0 ? row.w.sum[i] * 0 : (row.w.sum[i] + row.s.sum[i] * rise) * scale;
      row.s.sum[i] *= scale;
    }
  }
  row.m = m;
}

template <class T, bool kEntropy>
Running sum_row(const T* x, int64_t vocab, double temperature) {
  const Exp exp(temperature);
  Block<T> blocks[2];
  Running row;
  blocks[0].open(x, vocab);
  blocks[0].read();
  for (int64_t start = 0, now = 0; start < vocab; start += kBlock, now = 1 - now) {
    Block<T>&block = blocks[now], &next = blocks[1 - now];
    next.open(x + start + kBlock, vocab - start - kBlock);
    raise_max(row, block.max(), temperature);
    add_block<T, kEntropy>(block, next, exp, row);
  }
  return row;
}

template <class T>
void fill(T* out, int64_t size, T value) {
  for (int64_t i = 0; i < size; ++i) out[i] = value;
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
