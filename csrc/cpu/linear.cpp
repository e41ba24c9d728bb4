// The linear family: a tile of hidden @ weight.T, still in the cache, is taken into its rows' running
// softmax, or turned into its gradient. z = softcap * tanh((x + bias) * scale / softcap).
#include "linear.h"

#include <type_traits>

#include "softmax.h"

namespace rk {
namespace RK_ISA {
namespace {

inline vf magnitude(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vu>(x) & 0x7fffffffu); }

// Odd minimax polynomial near 0 (Cephes), where 1 - exp would cancel; (1 - e) / (1 + e) elsewhere.
inline vf tanh(vf x) {
  const vf a = magnitude(x), square = x * x;
  vf p = -5.70498872745e-3f * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const vf near = x + x * square * p;
  const Exp exp(1.0);
  vf fraction, scale;
  exp.split(exp.clamp(a * -2.0f), fraction, scale);
  const vf e = fraction * scale;
  const vf far = (1.0f - e) / (1.0f + e);
  return a < 0.625f ? near : (x < 0.0f ? -far : far);
}

// The logits of a bare head are its products: nothing to do, and bfloat16 may come as even and odd columns.
struct Bare {
  explicit Bare(const HeadTile&) {}

  template <class T>
  static int slot(int column) {
    const Slot<T> place(column);
    return place.vector * kLanes + place.lane;
  }

  template <class T>
  void load(const T* x, int64_t, vf (&z)[kUnroll], vf (&)[kUnroll]) const {
    load_step(x, z);
  }

  template <class T>
  static void store(T* to, const vf (&grad)[kUnroll], const vf (&)[kUnroll]) {
    store_step(to, grad);
  }
};

// Bias, scale and softcap, columns in order.
struct Dressed {
  const HeadTile& tile;
  float slope, rate;

  explicit Dressed(const HeadTile& from)
      : tile(from), slope(from.scale), rate(from.softcap > 0 ? from.scale / from.softcap : 0) {}

  template <class T>
  static int slot(int column) {
    return column;
  }

  // Logits of kStep columns from `column` on, and dz/dx.
  template <class T>
  void load(const T* x, int64_t column, vf (&z)[kUnroll], vf (&by_x)[kUnroll]) const {
    alignas(kBytes) float bias[kStep] = {};
    const int64_t left = tile.width - column;
    if (tile.bias) memcpy(bias, tile.bias + column, (left < kStep ? left : kStep) * sizeof(float));
    for (int u = 0; u < kUnroll; ++u) {
      const vf product = rk::RK_ISA::load(x + u * kLanes) + rk::RK_ISA::load(bias + u * kLanes);
      if (tile.softcap > 0) {
        const vf t = tanh(product * rate);
        z[u] = t * tile.softcap;
        by_x[u] = (1.0f - t * t) * slope;
      } else {
        z[u] = product * slope;
        by_x[u] = splat(slope);
      }
    }
  }

  template <class T>
  static void store(T* to, const vf (&grad)[kUnroll], const vf (&by_x)[kUnroll]) {
    for (int u = 0; u < kUnroll; ++u) rk::RK_ISA::store(to + u * kLanes, grad[u] * by_x[u]);
  }
};

template <class T>
T* row_of(const HeadTile& tile, int64_t n) {
  return static_cast<T*>(tile.data) + n * tile.stride;
}

double temperature_of(const HeadTile& tile, int64_t n) {
  return tile.row_temperature ? tile.row_temperature[n] : tile.temperature;
}

// Up to kBlock logits from `start` on into z, -inf up to a whole step; how many there are then.
template <class T, class Head>
int read_block(const T* x, int64_t start, const HeadTile& tile, const Head& head, float* z, vf& max) {
  const int64_t columns = tile.width - start < kBlock ? tile.width - start : kBlock;
  const int size = static_cast<int>((columns + kStep - 1) / kStep * kStep);
  vf top[kUnroll];
  for (vf& lanes : top) lanes = splat(-kInf);
  alignas(kBytes) T tail[kStep];
  for (int i = 0; i < size; i += kStep) {
    const T* from = x + start + i;
    if (columns - i < kStep) {
      for (int k = 0; k < kStep; ++k) tail[k] = k < columns - i ? from[k] : Special<T>::kMinusInf;
      from = tail;
    }
    vf step[kUnroll], by_x[kUnroll];
    head.load(from, start + i, step, by_x);
    for (int u = 0; u < kUnroll; ++u) store(z + i + u * kLanes, step[u]);
    if (columns - i < kStep) {  // a softcap has made something finite of the padding
      for (int k = static_cast<int>(columns - i); k < kStep; ++k) z[i + Head::template slot<T>(k)] = -kInf;
      for (int u = 0; u < kUnroll; ++u) step[u] = load(z + i + u * kLanes);
    }
    for (int u = 0; u < kUnroll; ++u) top[u] = max_keep_second(step[u], top[u]);
  }
  max = max_keep_second(max_keep_second(top[0], top[1]), max_keep_second(top[2], top[3]));
  return size;
}

template <class T, class Head, bool kEntropy>
void update(const OnlineSoftmax& args, int64_t begin, int64_t end) {
  const HeadTile& tile = args.tile;
  const Head head(tile);
  alignas(kBytes) float z[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    const T* x = row_of<const T>(tile, n);
    const double temperature = temperature_of(tile, n);
    const Exp exp(temperature);
    const int64_t column = label_of(tile.labels, n) - tile.first;
    double* state = args.state + 4 * n;
    Running row;
    row.m = static_cast<float>(state[0]);
    row.s.sum[0] = state[1];
    row.w.sum[0] = state[2];
    for (int64_t start = 0; start < tile.width; start += kBlock) {
      vf top;
      const int size = read_block(x, start, tile, head, z, top);
      raise_max(row, max_lane<kLanes / 2>(top, std::make_index_sequence<kLanes>()), temperature);
      // While every logit so far is -inf, any finite reference gives exp = 0 for them, and NaN for a NaN.
      const vf m = splat(row.m == -kInf ? 0.0f : row.m);
      vf s[kUnroll] = {}, w[kUnroll] = {};
      for (int i = 0; i < size; i += kStep) add_step<kEntropy>(z + i, m, exp, s, w);
      row.s.add(s);
      if (kEntropy) row.w.add(w);
      const int64_t place = column - start;
      if (place >= 0 && place < size && column < tile.width)
        state[3] = z[place - place % kStep + Head::template slot<T>(static_cast<int>(place % kStep))];
    }
    state[0] = row.m;
    state[1] = row.s.total();
    state[2] = row.w.total();
  }
}

template <class T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

template <class T, class Head>
void store_gradient(T* to, const vf (&grad)[kUnroll], const vf (&by_x)[kUnroll]) {
  Head::store(to, grad, by_x);
}

// Of float32 logits, whose columns are in order.
template <class T, class Head, class = std::enable_if_t<kIsFloat<T>>>
void store_gradient(BFloat* to, const vf (&grad)[kUnroll], const vf (&by_x)[kUnroll]) {
  alignas(kBytes) float wide[kStep];
  Head::store(wide, grad, by_x);
  for (int u = 0; u < kUnroll; ++u)
    store_bits(to + u * kLanes, round_to_upper_half(load(wide + u * kLanes)) >> 16);
}

template <class T, class Head, class Out>
void gradient(const LinearGradient& args, int64_t begin, int64_t end) {
  const HeadTile& tile = args.tile;
  const Head head(tile);
  for (int64_t n = begin; n < end; ++n) {
    T* x = row_of<T>(tile, n);
    Out* to = reinterpret_cast<Out*>(x);  // a narrower element is written where its row has been read already
    const float *row = args.rows + 4 * n, at_label = row[2];
    const vf a = splat(row[0]), b = splat(row[1]), m = splat(row[3]);
    if (row[0] == 0 && row[1] == 0 && at_label == 0) {
      memset(to, 0, tile.width * sizeof(Out));
      continue;
    }
    if (row[0] != row[0] || row[1] != row[1]) {  // NaN
      fill(to, tile.width, Special<Out>::kNan);
      continue;
    }
    const Exp exp(temperature_of(tile, n));
    const int64_t column = label_of(tile.labels, n) - tile.first;
    const int64_t label_step = column < 0 ? -1 : column - column % kStep;
    alignas(kBytes) T tail[kStep] = {};
    alignas(kBytes) Out tail_out[kStep];
    for (int64_t i = 0; i < tile.width; i += kStep) {
      const int64_t left = tile.width - i;
      if (left < kStep) memcpy(tail, x + i, left * sizeof(T));
      vf step[kUnroll], by_x[kUnroll];
      head.load(left < kStep ? tail : x + i, i, step, by_x);
      for (vf& lanes : step) {
        const vf d = exp.clamp(lanes - m);
        vf fraction, scale;
        exp.split(d, fraction, scale);
        lanes = fraction * scale * (a + b * d);
      }
      if (i == label_step) {
        const int slot = Head::template slot<T>(static_cast<int>(column % kStep));
        step[slot / kLanes][slot % kLanes] += at_label;
      }
      store_gradient<T, Head>(left < kStep ? tail_out : to + i, step, by_x);
      if (left < kStep) memcpy(to + i, tail_out, left * sizeof(Out));
    }
  }
}

bool bare(const HeadTile& tile) { return !tile.bias && tile.softcap <= 0 && tile.scale == 1; }

template <class T>
void update_as(const OnlineSoftmax& args, int64_t begin, int64_t end) {
  if (bare(args.tile))
    return (args.entropy ? update<T, Bare, true> : update<T, Bare, false>)(args, begin, end);
  (args.entropy ? update<T, Dressed, true> : update<T, Dressed, false>)(args, begin, end);
}

template <class T>
void gradient_as(const LinearGradient& args, int64_t begin, int64_t end) {
  if constexpr (kIsFloat<T>)
    if (args.narrow)
      return (bare(args.tile) ? gradient<T, Bare, BFloat> : gradient<T, Dressed, BFloat>)(args, begin, end);
  (bare(args.tile) ? gradient<T, Bare, T> : gradient<T, Dressed, T>)(args, begin, end);
}

}  // namespace

void online_softmax_update(const OnlineSoftmax& args, int64_t begin, int64_t end) {
  with_type(args.tile.dtype, [&](auto type) { update_as<decltype(type)>(args, begin, end); });
}

void linear_gradient(const LinearGradient& args, int64_t begin, int64_t end) {
  with_type(args.tile.dtype, [&](auto type) { gradient_as<decltype(type)>(args, begin, end); });
}

}  // namespace RK_ISA
}  // namespace rk
