// full_kl of rows p = softmax(x / T) and q = softmax(y / T), with d = x - max(x) and d' = y - max(y):
// KL(p || q) = sum(e^(d/T) * (d - d')) / (T s) - (log(s) - log(s')), and with the rows exchanged KL(q || p);
// jsd = (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2. KL reads both rows once,
// jsd a second time from the cache.
#include "full_kl.h"

#include "softmax.h"

namespace rk {
namespace RK_ISA {
namespace {

// The running sums of two rows and of what KL(first || second) needs of both.
struct Pair {
  float m[2] = {-kInf, -kInf};
  LaneSums s[2];
  LaneSums w;  // sum(exp(d / T) * (d - d')); infinite or NaN where only the second row is -inf
};

inline void add_pair_step(const float* x, const float* y, vf m, vf m_second, const Exp& exp, vf (&s)[kUnroll],
                          vf (&s_second)[kUnroll], vf (&w)[kUnroll]) {
  for (int u = 0; u < kUnroll; ++u) {
    const vf logit = load(x + u * kLanes);
    const vf d = exp.clamp(logit - m), d_second = load(y + u * kLanes) - m_second;
    vf fraction, scale;
    exp.split(d, fraction, scale);
    const vf e = fraction * scale;
    s[u] += e;
    w[u] += logit > -kInf ? e * (d - d_second) : vf{};
    exp.split(exp.clamp(d_second), fraction, scale);
    s_second[u] += fraction * scale;
  }
}

inline vf pivot(float m) { return splat(m == -kInf ? 0.0f : m); }

// Sums one block of each row while reading the next.
template <class T>
void add_pair_block(const Block<T> (&block)[2], Block<T> (&next)[2], const Exp& exp, Pair& pair) {
  const vf m = pivot(pair.m[0]), m_second = pivot(pair.m[1]);
  const float *x = block[0].columns(), *y = block[1].columns();
  vf s[kUnroll] = {}, s_second[kUnroll] = {}, w[kUnroll] = {};
  int i = 0;
  for (; i < next[0].size; i += kStep) {
    next[0].read_step(i);
    next[1].read_step(i);
    add_pair_step(x + i, y + i, m, m_second, exp, s, s_second, w);
  }
  for (; i < block[0].size; i += kStep) add_pair_step(x + i, y + i, m, m_second, exp, s, s_second, w);
  pair.s[0].add(s);
  pair.s[1].add(s_second);
  pair.w.add(w);
}

void raise_maxima(Pair& pair, float m, float m_second, double temperature) {
  // A row that was only -inf so far has no sums to shift.
  const double rise[2] = {
      pair.m[0] != -kInf && m > pair.m[0] ? static_cast<double>(pair.m[0]) - m : 0,
      pair.m[1] != -kInf && m_second > pair.m[1] ? static_cast<double>(pair.m[1]) - m_second : 0};
  if (rise[0] != 0 || rise[1] != 0) {
    const double scale[2] = {std::exp(rise[0] / temperature), std::exp(rise[1] / temperature)};
    for (int i = 0; i < kLanes; ++i) {
      // Where scale is 0 nothing is left of the terms but an infinity. Equal rows rise alike, and w stays 0.
      pair.w.sum[i] = scale[0] == 0 ? pair.w.sum[i] * 0
                                    : (pair.w.sum[i] + pair.s[0].sum[i] * (rise[0] - rise[1])) * scale[0];
      for (int side = 0; side < 2; ++side) pair.s[side].sum[i] *= scale[side];
    }
  }
  if (m > pair.m[0]) pair.m[0] = m;
  if (m_second > pair.m[1]) pair.m[1] = m_second;
}

template <class T>
Pair sum_pair(const T* x, const T* y, int64_t vocab, double temperature) {
  const Exp exp(temperature);
  Block<T> blocks[2][2];
  Pair pair;
  blocks[0][0].open(x, vocab);
  blocks[0][1].open(y, vocab);
  blocks[0][0].read();
  blocks[0][1].read();
  for (int64_t start = 0, now = 0; start < vocab; start += kBlock, now = 1 - now) {
    const int64_t ahead = start + kBlock;
    blocks[1 - now][0].open(x + ahead, vocab - ahead);
    blocks[1 - now][1].open(y + ahead, vocab - ahead);
    raise_maxima(pair, blocks[now][0].max(), blocks[now][1].max(), temperature);
    add_pair_block<T>(blocks[now], blocks[1 - now], exp, pair);
  }
  return pair;
}

// Only -inf: no distribution. (+inf and NaN have made s NaN already.)
double log_of_sum(float m, const LaneSums& s) {
  return m == -kInf ? static_cast<double>(NAN) : std::log(s.total());
}

// A row's numbers in stats.
struct RowStats {
  float m, log_s, m_ref, log_s_ref, mean_log_ratio;
};

// KL(first || second). What stats hold of each: maximum and log of the sum;
// the mean of d - d' over the first.
struct PairResult {
  float kl;
  float m[2];
  float log_s[2];
  float mean;
};

template <class T>
PairResult kl_of_row(const T* first, const T* second, int64_t vocab, double temperature) {
  const Pair pair = sum_pair(first, second, vocab, temperature);
  const double log_s[2] = {log_of_sum(pair.m[0], pair.s[0]), log_of_sum(pair.m[1], pair.s[1])};
  const double difference = log_s[0] - log_s[1];
  double mean = pair.w.total() / pair.s[0].total();
  // Two proper rows, and yet no finite mean: the first gives a chance, however small,
  // where the second has none.
  if (difference == difference && !std::isfinite(mean)) mean = static_cast<double>(kInf);
  return {static_cast<float>(mean / temperature - difference),
          {pair.m[0], pair.m[1]},
          {static_cast<float>(log_s[0]), static_cast<float>(log_s[1])},
          static_cast<float>(mean)};
}

// One step of columns of both rows at a time, padded with -inf: f(column, x, y, columns of the step).
template <class T, class F>
inline void for_each_step(const T* x, const T* y, int64_t begin, int64_t end, F&& f) {
  for (int64_t i = begin; i < end; i += kStep) {
    const int64_t left = end - i;
    vf a[kUnroll], b[kUnroll];
    if (left >= kStep) {
      prefetch_step(x + i + kAhead);
      prefetch_step(y + i + kAhead);
      load_step(x + i, a);
      load_step(y + i, b);
    } else {
      T tail[2][kStep];
      fill(tail[0], 2 * kStep, Special<T>::kMinusInf);
      memcpy(tail[0], x + i, left * sizeof(T));
      memcpy(tail[1], y + i, left * sizeof(T));
      load_step(tail[0], a);
      load_step(tail[1], b);
    }
    f(i, a, b, left < kStep ? left : int64_t{kStep});
  }
}

inline vf magnitude(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vu>(x) & 0x7fffffffu); }

// log(1 + f) for f in [0, 1], exactly 0 at 0: minimax of log(1 + f) / f, relative error 5e-9, 1.7e-7 rounded.
inline vf log_one_plus(vf f) {
  vf p = -3.2440254e-3f * f + 1.98514648e-2f;
  p = p * f - 5.69595434e-2f;
  p = p * f + 1.06036566e-1f;
  p = p * f - 1.53055936e-1f;
  p = p * f + 1.96759403e-1f;
  p = p * f - 2.49541342e-1f;
  p = p * f + 3.33299637e-1f;
  p = p * f - 4.99999017e-1f;
  return (p * f + 1.0f) * f;
}

// What both passes over a jsd row need: e = exp(d / T), q s, and log(p / m), log(q / m), where p = e / s.
// Against a common factor p and q are e and f * s / s'. In equal rows that factor is exactly 1 and the
// difference exactly 0, also where it becomes an fma.
struct Mixture {
  Exp exp;
  vf m, m_ref, ratio_of_sums, log_ratio_of_sums, per_temperature;

  Mixture(const RowStats& row, double temperature)
      : exp(temperature),
        m(splat(row.m)),
        m_ref(splat(row.m_ref)),
        ratio_of_sums(splat(static_cast<float>(std::exp(static_cast<double>(row.log_s) - row.log_s_ref)))),
        log_ratio_of_sums(splat(static_cast<float>(static_cast<double>(row.log_s) - row.log_s_ref))),
        per_temperature(splat(static_cast<float>(1 / temperature))) {}

  // log(larger / m) = log(1 + |p - q| / (p + q)), from which the smaller one's differs by log(p / q): nothing
  // is lost where p / q is far from 1. Clamped, log(p / q) is finite where p or q is 0.
  void split(vf x, vf y, vf& e, vf& f, vf& log_p_m, vf& log_q_m) const {
    const vf d = exp.clamp(x - m), d_ref = exp.clamp(y - m_ref);
    vf fraction, scale;
    exp.split(d, fraction, scale);
    e = fraction * scale;
    exp.split(d_ref, fraction, scale);
    f = fraction * scale;
    const vf q = f * ratio_of_sums;
    // Both logs from one difference where it rounds to 0: else their sum would be negative there.
    const vf log_ratio = e == q ? vf{} : (d - d_ref) * per_temperature - log_ratio_of_sums;
    const vf larger = log_one_plus(magnitude(e - q) / (e + q + 1.17549435e-38f));  // 0 where both are 0
    log_p_m = larger + (log_ratio < 0.0f ? log_ratio : vf{});
    log_q_m = larger - (log_ratio > 0.0f ? log_ratio : vf{});
  }
};

// Half of both divergences from the mixture; row.mean_log_ratio becomes that of p.
template <class T>
float jsd_of_row(const T* x, const T* y, int64_t vocab, double temperature, RowStats& row) {
  const Running sums[2] = {sum_row<T, false>(x, vocab, temperature),
                           sum_row<T, false>(y, vocab, temperature)};
  row.m = sums[0].m, row.log_s = static_cast<float>(log_of_sum(sums[0].m, sums[0].s));
  row.m_ref = sums[1].m, row.log_s_ref = static_cast<float>(log_of_sum(sums[1].m, sums[1].s));
  row.mean_log_ratio = NAN;
  if (row.log_s != row.log_s || row.log_s_ref != row.log_s_ref) return NAN;
  const Mixture mixture(row, temperature);
  LaneSums total[2];
  for (int64_t start = 0; start < vocab; start += kBlock) {
    vf sum[2][kUnroll] = {};
    const int64_t end = vocab - start < kBlock ? vocab : start + kBlock;
    for_each_step(x, y, start, end, [&](int64_t, const vf(&a)[kUnroll], const vf(&b)[kUnroll], int64_t) {
      for (int u = 0; u < kUnroll; ++u) {
        vf e, f, log_p_m, log_q_m;
        mixture.split(a[u], b[u], e, f, log_p_m, log_q_m);
        sum[0][u] += e * log_p_m;
        sum[1][u] += f * log_q_m;
      }
    });
    total[0].add(sum[0]);
    total[1].add(sum[1]);
  }
  const double of_p = total[0].total() / sums[0].s.total(), of_q = total[1].total() / sums[1].s.total();
  row.mean_log_ratio = static_cast<float>(of_p);
  return static_cast<float>(0.5 * (of_p + of_q));
}

template <class T>
void forward(const FullKlFwd& args, int64_t begin, int64_t end) {
  const FullKlArgs& in = args.in;
  for (int64_t n = begin; n < end; ++n) {
    float kl = 0;
    RowStats row = {};
    if (!in.mask || in.mask[n]) {
      const T* x = static_cast<const T*>(in.logits.data) + offset(in.logits, n);
      const T* y = static_cast<const T*>(in.ref.data) + offset(in.ref, n);
      const double temperature = in.row_temperature ? in.row_temperature[n] : in.temperature;
      if (in.direction == Divergence::kJsd) {
        kl = jsd_of_row(x, y, in.vocab, temperature, row);
      } else {
        const bool reverse = in.direction == Divergence::kReverse;
        const PairResult pair =
            reverse ? kl_of_row(x, y, in.vocab, temperature) : kl_of_row(y, x, in.vocab, temperature);
        const int of_x = reverse ? 0 : 1, of_y = 1 - of_x;
        kl = pair.kl;
        row = {pair.m[of_x], pair.log_s[of_x], pair.m[of_y], pair.log_s[of_y], pair.mean};
      }
    }
    args.kl[n] = kl;
    const float stats[5] = {row.m, row.log_s, row.m_ref, row.log_s_ref, row.mean_log_ratio};
    memcpy(args.stats + 5 * n, stats, sizeof stats);
  }
}

template <class T>
inline void write_step(T* out, const vf (&step)[kUnroll], int64_t columns) {
  if (columns == kStep) return store_step(out, step);
  T tail[kStep];
  store_step(tail, step);
  memcpy(out, tail, columns * sizeof(T));
}

// grad_j = (g / T) * p_j * (log(p_j / q_j) - KL), which is (g / T^2) * p_j * (d_j - d'_j - their mean): that
// difference first, because where one p is almost 1 it cancels.
template <class T>
void reverse_gradient(const T* x, const T* y, T* out, int64_t vocab, double temperature, double g,
                      const RowStats& row) {
  const Exp exp(temperature);
  const double per_s = std::exp(-static_cast<double>(row.log_s));
  const vf weight = splat(static_cast<float>(g * per_s / (temperature * temperature)));
  const vf m = splat(row.m), m_ref = splat(row.m_ref), mean = splat(row.mean_log_ratio);
  for_each_step(x, y, 0, vocab, [&](int64_t i, vf(&step)[kUnroll], const vf(&ref)[kUnroll], int64_t columns) {
    for (int u = 0; u < kUnroll; ++u) {
      const vf d = exp.clamp(step[u] - m);
      vf fraction, scale;
      exp.split(d, fraction, scale);
      const vf e = fraction * scale;
      const vf above = d - (ref[u] - m_ref) - mean;
      step[u] = e > 0.0f ? e * weight * above : vf{};  // 0 * inf where both are -inf
    }
    write_step(out + i, step, columns);
  });
}

// grad_j = (g / T) * (p_j - q_j), as a multiple of e_j - f_j * s / s': exactly 0 in equal rows.
template <class T>
void forward_gradient(const T* x, const T* y, T* out, int64_t vocab, double temperature, double g,
                      const RowStats& row) {
  const Exp exp(temperature);
  const double log_s = row.log_s;
  const vf m = splat(row.m), m_ref = splat(row.m_ref);
  const vf weight = splat(static_cast<float>(g * std::exp(-log_s) / temperature));
  const vf ratio_of_sums = splat(static_cast<float>(std::exp(log_s - row.log_s_ref)));
  for_each_step(x, y, 0, vocab, [&](int64_t i, vf(&step)[kUnroll], const vf(&ref)[kUnroll], int64_t columns) {
    for (int u = 0; u < kUnroll; ++u) {
      vf fraction, scale;
      exp.split(exp.clamp(ref[u] - m_ref), fraction, scale);
      const vf f = fraction * scale;
      exp.split(exp.clamp(step[u] - m), fraction, scale);
      step[u] = (fraction * scale - f * ratio_of_sums) * weight;
    }
    write_step(out + i, step, columns);
  });
}

// grad_j = (g / (2 T)) * p_j * (log(p_j / m_j) - KL(p || m)).
template <class T>
void jsd_gradient(const T* x, const T* y, T* out, int64_t vocab, double temperature, double g,
                  const RowStats& row) {
  const Mixture mixture(row, temperature);
  const double per_s = std::exp(-static_cast<double>(row.log_s));
  const vf weight = splat(static_cast<float>(0.5 * g * per_s / temperature)),
           inner = splat(row.mean_log_ratio);
  for_each_step(x, y, 0, vocab, [&](int64_t i, vf(&step)[kUnroll], const vf(&ref)[kUnroll], int64_t columns) {
    for (int u = 0; u < kUnroll; ++u) {
      vf e, f, log_p_m, log_q_m;
      mixture.split(step[u], ref[u], e, f, log_p_m, log_q_m);
      step[u] = weight * e * (log_p_m - inner);
    }
    write_step(out + i, step, columns);
  });
}

template <class T>
void backward(const FullKlBwd& args, int64_t begin, int64_t end) {
  const FullKlArgs& in = args.in;
  for (int64_t n = begin; n < end; ++n) {
    T* out = static_cast<T*>(args.grad.data) + offset(args.grad, n);
    const double g = args.grad_kl[n];
    if ((in.mask && !in.mask[n]) || g == 0) {
      memset(out, 0, in.vocab * sizeof(T));
      continue;
    }
    const double temperature = in.row_temperature ? in.row_temperature[n] : in.temperature;
    const float* stats = args.stats + 5 * n;
    const RowStats row = {stats[0], stats[1], stats[2], stats[3], stats[4]};
    const T* x = static_cast<const T*>(in.logits.data) + offset(in.logits, n);
    const T* y = static_cast<const T*>(in.ref.data) + offset(in.ref, n);
    // Reverse, jsd: where the KL is infinite the gradient is NaN. Forward: its formula has no KL term.
    const double needed = in.direction == Divergence::kForward ? 0 : row.mean_log_ratio;
    if (!std::isfinite(g * (row.log_s + row.log_s_ref + needed)))
      fill(out, in.vocab, Special<T>::kNan);
    else if (in.direction == Divergence::kReverse)
      reverse_gradient(x, y, out, in.vocab, temperature, g, row);
    else if (in.direction == Divergence::kForward)
      forward_gradient(x, y, out, in.vocab, temperature, g, row);
    else
      jsd_gradient(x, y, out, in.vocab, temperature, g, row);
  }
}

}  // namespace

void full_kl_fwd(const FullKlFwd& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto type) { forward<decltype(type)>(args, begin, end); });
}

void full_kl_bwd(const FullKlBwd& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto type) { backward<decltype(type)>(args, begin, end); });
}

}  // namespace RK_ISA
}  // namespace rk
