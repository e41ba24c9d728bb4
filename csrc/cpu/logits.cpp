// selected_logprobs: logp = (x[label] - m) / T - log(s), s = sum(exp((x - m) / T)), m = max(x);
// entropy = log(s) - sum(e * (x - m) / T) / s. One read of the logits;
// the running max is raised block by block.
#include "logits.h"

#include "softmax.h"

namespace rk {
namespace RK_ISA {
namespace {

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
      const double s = row.s.total();
      const double log_sum = row.m == -kInf ? static_cast<double>(NAN) : std::log(s);
      // Difference first: m / T + log(s) would lose the digits of log(s) at logits of 1e4.
      logprob = static_cast<float>(
          (static_cast<double>(to_float(x[label_of(in.labels, n)])) - row.m) / temperature - log_sum);
      entropy = static_cast<float>(log_sum - row.w.total() / (temperature * s));
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
  return {static_cast<float>(-scale * (g + gh * (entropy - log_s))),
          static_cast<float>(-scale * gh / temperature), static_cast<float>(g / temperature),
          args.stats[2 * n]};
}

template <bool kEntropy>
inline void gradient_step(vf (&x)[kUnroll], const Exp& exp, const RowGradient& row) {
  const vf m = splat(row.m), a = splat(row.a), b = splat(row.b);
  for (vf& lanes : x) {
    const vf d = exp.clamp(lanes - m);
    vf fraction, scale;
    exp.split(d, fraction, scale);
    const vf e = fraction * scale;
    lanes = kEntropy ? e * (a + b * d) : e * a;
  }
}

template <class T, bool kEntropy>
void gradient_row(const T* x, T* out, int64_t vocab, int64_t label, const Exp& exp, const RowGradient& row) {
  const Slot<T> slot(label % kStep);
  const int64_t label_step = label - label % kStep;
  T tail[kStep] = {};
  for (int64_t i = 0; i < vocab; i += kStep) {
    const bool whole = vocab - i >= kStep;
    if (!whole) memcpy(tail, x + i, (vocab - i) * sizeof(T));
    prefetch_step(x + i + kAhead);
    vf step[kUnroll];
    load_step(whole ? x + i : tail, step);
    gradient_step<kEntropy>(step, exp, row);
    if (i == label_step) step[slot.vector][slot.lane] += row.at_label;
    store_step(whole ? out + i : tail, step);
    if (!whole) memcpy(out + i, tail, (vocab - i) * sizeof(T));
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
    const RowGradient row = row_gradient(args, n, g, gh, temperature);
    if (row.a != row.a || row.b != row.b)  // NaN
      fill(out, in.vocab, Special<T>::kNan);
    else if (row.b != 0)
      gradient_row<T, true>(x, out, in.vocab, label_of(in.labels, n), Exp(temperature), row);
    else
      gradient_row<T, false>(x, out, in.vocab, label_of(in.labels, n), Exp(temperature), row);
  }
}

}  // namespace

void logprobs_fwd(const LogprobsFwd& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto type) { forward<decltype(type)>(args, begin, end); });
}

void logprobs_bwd(const LogprobsBwd& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto type) { backward<decltype(type)>(args, begin, end); });
}

}  // namespace RK_ISA
}  // namespace rk
