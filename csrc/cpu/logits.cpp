// selected_logprobs: logp = (x[label] - m) / T - log(s), s = sum(exp((x - m) / T)), m = max(x);
// entropy = log(s) - sum(e * (x - m) / T) / s. One read of the logits; the running max is raised block by block.
#include "math.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int kBlock = 1024;      // columns; the fastest of 256..4096: 4 KiB stays in the first-level cache
constexpr int kUnroll = 4;        // independent accumulators hide the latency of max and add
constexpr int kStep = kUnroll * kLanes;

template <class T>
struct NegativeInfinity;
template <>
struct NegativeInfinity<float> {
  static constexpr float value = -kInf;
};
template <>
struct NegativeInfinity<Half> {
  static constexpr Half value = {0xfc00};
};
template <>
struct NegativeInfinity<BFloat> {
  static constexpr BFloat value = {0xff80};
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

// Block of up to kBlock columns as floats, padded with -inf to a multiple of kStep, which changes no result.
template <class T>
struct Block {
  alignas(kBytes) float wide[kBlock];
  alignas(kBytes) T tail[kBlock];
  const float* x;
  int size;

  void read(const T* source, int columns) {
    size = (columns + kStep - 1) / kStep * kStep;
    if (size != columns) {
      memcpy(tail, source, columns * sizeof(T));
      for (int i = columns; i < size; ++i) tail[i] = NegativeInfinity<T>::value;
      source = tail;
    }
    x = widen(source);
  }

  const float* widen(const float* source) { return source; }

  template <class U>
  const float* widen(const U* source) {
    for (int i = 0; i < size; i += kLanes) store(wide + i, load(source + i));
    return wide;
  }
};

// Largest number of the block; NaNs are passed over.
float block_max(const float* x, int size) {
  vf m[kUnroll];
  for (vf& lane : m) lane = splat(-kInf);
  for (int i = 0; i < size; i += kStep)
    for (int u = 0; u < kUnroll; ++u) m[u] = max_keep_second(load(x + i + u * kLanes), m[u]);
  const vf all = max_keep_second(max_keep_second(m[0], m[1]), max_keep_second(m[2], m[3]));
  float best = -kInf;
  for (int i = 0; i < kLanes; ++i) best = all[i] > best ? all[i] : best;
  return best;
}

double sum_lanes(const vf (&lanes)[kUnroll]) {
  double sum = 0;
  for (const vf& lane : lanes)
    for (int i = 0; i < kLanes; ++i) sum += lane[i];
  return sum;
}

struct Running {
  float m = -kInf;
  double s = 0;  // sum(exp((x - m) / T))
  double w = 0;  // sum(exp((x - m) / T) * (x - m))
};

template <bool kEntropy>
void add_block(const float* x, int size, const Exp& exp, Running& row) {
  // While every logit so far is -inf, any finite reference gives exp = 0 for them, and NaN for a NaN.
  const vf m = splat(row.m == -kInf ? 0.0f : row.m);
  vf s[kUnroll] = {}, w[kUnroll] = {};
  for (int i = 0; i < size; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) {
      const float* p = x + i + u * kLanes;
      __builtin_prefetch(p + kBlock);  // the next block arrives while this one is summed
      const vf d = exp.clamp(load(p) - m);
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
  row.s += sum_lanes(s);
  if (kEntropy) row.w += sum_lanes(w);
}

void raise_max(Running& row, float m, double temperature) {
  if (!(m > row.m)) return;
  if (row.m != -kInf) {
    const double rise = static_cast<double>(row.m) - m;
    const double scale = std::exp(rise / temperature);
    // The terms' (x - m) shift too. Where scale is 0 nothing of them is left (0 * inf would be NaN).
    row.w = scale == 0 ? row.w * 0 : (row.w + row.s * rise) * scale;
    row.s *= scale;
  }
  row.m = m;
}

template <class T, bool kEntropy>
Running sum_row(const T* x, int64_t vocab, double temperature) {
  const Exp exp(temperature);
  Block<T> block;
  Running row;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    block.read(x + start, static_cast<int>(vocab - start < kBlock ? vocab - start : kBlock));
    raise_max(row, block_max(block.x, block.size), temperature);
    add_block<kEntropy>(block.x, block.size, exp, row);
  }
  return row;
}

template <class T>
void forward(const LogprobsFwd& args, int64_t begin, int64_t end) {
  const LogprobsArgs& in = args.in;
  for (int64_t n = begin; n < end; ++n) {
    float logprob = 0, entropy = 0, m = 0, log_s = 0;
    if (!in.mask || in.mask[n]) {
      const T* x = static_cast<const T*>(in.logits.data) + offset(in.logits, n);
      const double temperature = in.row_temperature ? in.row_temperature[n] : in.temperature;
      const Running row = args.entropy ? sum_row<T, true>(x, in.vocab, temperature)
                                       : sum_row<T, false>(x, in.vocab, temperature);
      // Only -inf: no distribution. (+inf and NaN have made s NaN already.)
      const double log_sum = row.m == -kInf ? static_cast<double>(NAN) : std::log(row.s);
      // Difference first: m / T + log(s) would lose the digits of log(s) at logits of 1e4.
      logprob = static_cast<float>((static_cast<double>(to_float(x[label_of(in.labels, n)])) - row.m) / temperature - log_sum);
      entropy = static_cast<float>(log_sum - row.w / (temperature * row.s));
      m = row.m;
      log_s = static_cast<float>(log_sum);
    }
    args.logprobs[n] = logprob;
    if (args.entropy) args.entropy[n] = entropy;
    args.stats[2 * n] = m;
    args.stats[2 * n + 1] = log_s;
  }
}

// grad_j = p_j * (a + b * (x_j - m)) + onehot_j * (g / T); a and b carry 1 / s, so that p_j is the bare exp.
struct RowGradient {
  float a, b, at_label, m;
};

RowGradient row_gradient(const LogprobsBwd& args, int64_t n, double g, double gh, double temperature) {
  const double log_s = args.stats[2 * n + 1];
  const double scale = std::exp(-log_s) / temperature;
  const double entropy = gh != 0 ? args.entropy[n] : 0;
  // dH/dx_j = -p_j * (log p_j + H) / T, with log p_j = (x_j - m) / T - log_s.
  return {static_cast<float>(-scale * (g + gh * (entropy - log_s))), static_cast<float>(-scale * gh / temperature),
          static_cast<float>(g / temperature), args.stats[2 * n]};
}

template <bool kEntropy>
void gradient_block(const float* x, float* out, int size, const Exp& exp, const RowGradient& row) {
  const vf m = splat(row.m), a = splat(row.a), b = splat(row.b);
  for (int i = 0; i < size; i += kLanes) {
    const vf d = exp.clamp(load(x + i) - m);
    vf fraction, scale;
    exp.split(d, fraction, scale);
    const vf e = fraction * scale;
    store(out + i, kEntropy ? e * (a + b * d) : e * a);
  }
}

inline void narrow(const float* from, float* to, int columns) { memcpy(to, from, columns * sizeof(float)); }

template <class T>
void narrow(const float* from, T* to, int columns) {
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) store(to + i, load(from + i));
  if (i == columns) return;
  T lanes[kLanes];
  store(lanes, load(from + i));
  memcpy(to + i, lanes, (columns - i) * sizeof(T));
}

template <class T>
void gradient_row(const T* x, T* out, int64_t vocab, int64_t label, double temperature, const RowGradient& row) {
  const Exp exp(temperature);
  Block<T> block;
  alignas(kBytes) float grad[kBlock];
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int columns = static_cast<int>(vocab - start < kBlock ? vocab - start : kBlock);
    block.read(x + start, columns);
    if (row.b != 0)
      gradient_block<true>(block.x, grad, block.size, exp, row);
    else
      gradient_block<false>(block.x, grad, block.size, exp, row);
    if (label >= start && label < start + columns) grad[label - start] += row.at_label;
    narrow(grad, out + start, columns);
  }
}

template <class T>
void backward(const LogprobsBwd& args, int64_t begin, int64_t end) {
  const LogprobsArgs& in = args.in;
  for (int64_t n = begin; n < end; ++n) {
    T* out = static_cast<T*>(args.grad.data) + offset(args.grad, n);
    const double g = args.grad_logprobs ? args.grad_logprobs[n] : 0;
    const double gh = args.grad_entropy ? args.grad_entropy[n] : 0;
    if ((in.mask && !in.mask[n]) || (g == 0 && gh == 0)) {
      memset(out, 0, in.vocab * sizeof(T));
      continue;
    }
    const double temperature = in.row_temperature ? in.row_temperature[n] : in.temperature;
    const T* x = static_cast<const T*>(in.logits.data) + offset(in.logits, n);
    gradient_row(x, out, in.vocab, label_of(in.labels, n), temperature, row_gradient(args, n, g, gh, temperature));
  }
}

}  // namespace

void logprobs_fwd(const LogprobsFwd& args, int64_t begin, int64_t end) {
  switch (args.in.dtype) {
    case Dtype::kFloat32:
      return forward<float>(args, begin, end);
    case Dtype::kFloat16:
      return forward<Half>(args, begin, end);
    case Dtype::kBFloat16:
      return forward<BFloat>(args, begin, end);
  }
}

void logprobs_bwd(const LogprobsBwd& args, int64_t begin, int64_t end) {
  switch (args.in.dtype) {
    case Dtype::kFloat32:
      return backward<float>(args, begin, end);
    case Dtype::kFloat16:
      return backward<Half>(args, begin, end);
    case Dtype::kBFloat16:
      return backward<BFloat>(args, begin, end);
  }
}

}  // namespace RK_ISA
}  // namespace rk
