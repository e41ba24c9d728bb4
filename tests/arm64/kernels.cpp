// Runs every native kernel once on made-up rows and prints what it wrote, a number a line. Built for this
// machine and, by tests/test_arm64.py, for arm64: the two must print the same to within rounding.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/full_kl.h"
#include "../../csrc/cpu/linear.h"
#include "../../csrc/cpu/logits.h"
#include "../../csrc/cpu/losses.h"
#include "../../csrc/cpu/sampling.h"
#include "../../csrc/cpu/scan.h"
#include "../../csrc/cpu/tokens.h"

namespace rk {
namespace RK_ISA {
#define RK_FUNCTION(NAME, ARGS) void NAME(const ARGS&, int64_t, int64_t);
RK_FULL_KL_KERNELS(RK_FUNCTION)
RK_LINEAR_KERNELS(RK_FUNCTION)
RK_LOGITS_KERNELS(RK_FUNCTION)
RK_LOSSES_KERNELS(RK_FUNCTION)
RK_SAMPLING_KERNELS(RK_FUNCTION)
RK_SCAN_KERNELS(RK_FUNCTION)
RK_TOKENS_KERNELS(RK_FUNCTION)
}  // namespace RK_ISA
}  // namespace rk

namespace {

using namespace rk;
namespace isa = rk::RK_ISA;

constexpr int64_t kRows = 3, kWidth = 37, kSize = kRows * kWidth;  // a width of whole vectors and a rest

uint16_t to_bits16(float x, Dtype dtype) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (dtype == Dtype::kBFloat16) return static_cast<uint16_t>(bits >> 16);
  if (x == 0.0f) return 0;
  const uint32_t exponent = (bits >> 23 & 255) - 112;  // |x| in [2^-14, 65504): neither denormal nor infinite
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (exponent << 10) | (bits >> 13 & 1023));
}

float from_bits16(uint16_t half, Dtype dtype) {
  uint32_t bits = uint32_t{half} << 16;
  if (dtype == Dtype::kFloat16) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float x =
        exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return half & 0x8000 ? -x : x;
  }
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// [kRows, kWidth] numbers of one dtype; different ones for every `seed`.
struct Tensor {
  Dtype dtype;
  std::vector<unsigned char> bytes;

  Tensor(Dtype dtype, int seed) : dtype(dtype), bytes(4 * kSize) {
    uint32_t state = 12345u + 7919u * static_cast<uint32_t>(seed);
    for (int64_t i = 0; i < kSize; ++i) {
      state = state * 1664525u + 1013904223u;
      const float x =
          std::ldexp(static_cast<float>(state >> 16) - 32768.0f, -13);  // (-4, 4) in steps of 2^-13
      put(i, std::fabs(x) < 0.01f ? 0.0f : x);
    }
  }
  void put(int64_t i, float x) {
    const uint16_t half = to_bits16(x, dtype);
    if (dtype == Dtype::kFloat32)
      memcpy(&bytes[4 * i], &x, 4);
    else
      memcpy(&bytes[2 * i], &half, 2);
  }
  void print(const char* name) const {
    for (int64_t i = 0; i < kSize; ++i) {
      float x;
      uint16_t half;
      if (dtype == Dtype::kFloat32)
        memcpy(&x, &bytes[4 * i], 4);
      else
        memcpy(&half, &bytes[2 * i], 2), x = from_bits16(half, dtype);
      printf("%s %d %.9g\n", name, static_cast<int>(dtype), x);
    }
  }
  Rows rows() { return {bytes.data(), 1, kWidth, kWidth}; }
  Flat flat() const { return {bytes.data(), dtype, kWidth, kWidth}; }
  Matrix matrix() const { return {bytes.data(), dtype, kWidth}; }
};

template <class T>
void print(const char* name, Dtype dtype, const std::vector<T>& values) {
  for (T x : values) printf("%s %d %.9g\n", name, static_cast<int>(dtype), static_cast<double>(x));
}

const float kTemperature[kRows] = {0.5f, 1.0f, 2.0f}, kOnes[kRows] = {1.0f, -0.5f, 2.0f};
const int64_t kLabels[kRows] = {0, 17, kWidth - 1};

std::vector<uint8_t> mask() {
  std::vector<uint8_t> counts(kSize);
  for (int64_t i = 0; i < kSize; ++i) counts[i] = i * 7 % 10 > 3;
  return counts;
}

void logits(Dtype dtype) {
  Tensor x(dtype, 0), ref(dtype, 1), grad(dtype, 2);
  std::vector<float> logprobs(kRows), entropy(kRows), stats(2 * kRows), kl(kRows), moments(5 * kRows);
  const LogprobsArgs in = {x.rows(), dtype, kWidth, {kLabels, 8}, nullptr, kTemperature, 1.0};
  isa::logprobs_fwd({in, logprobs.data(), entropy.data(), stats.data()}, 0, kRows);
  print("logprobs", dtype, logprobs), print("entropy", dtype, entropy);
  isa::logprobs_bwd({in, kOnes, kOnes, stats.data(), entropy.data(), grad.rows()}, 0, kRows);
  grad.print("logprobs_bwd");
  for (int direction = 0; direction < 3; ++direction) {
    const FullKlArgs pair = {x.rows(), ref.rows(), dtype,        static_cast<Divergence>(direction),
                             kWidth,   nullptr,    kTemperature, 1.0};
    isa::full_kl_fwd({pair, kl.data(), moments.data()}, 0, kRows);
    print("full_kl", dtype, kl);
    isa::full_kl_bwd({pair, kOnes, moments.data(), grad.rows()}, 0, kRows);
    grad.print("full_kl_bwd");
  }
  std::vector<int64_t> tokens(kRows);
  const double uniform[kRows] = {0.1, 0.5, 0.9};
  for (int64_t top_k : {0, 5})
    for (double top_p : {1.0, 0.8}) {
      isa::sample_tokens({x.rows(), dtype, kWidth, uniform, nullptr, kTemperature, 1.0, top_k, top_p,
                          tokens.data(), logprobs.data()},
                         0, kRows);
      print("tokens", dtype, tokens), print("sampled", dtype, logprobs);
    }
  std::vector<double> state(4 * kRows, 0.0);
  for (int64_t row = 0; row < kRows; ++row) state[4 * row] = -INFINITY;
  const std::vector<float> bias(kWidth, 0.25f), coefficients(4 * kRows, 0.5f);
  const HeadTile tile = {x.rows().data, dtype, kWidth,       kWidth,       0,  bias.data(),
                         3.0f,          0.7f,  {kLabels, 8}, kTemperature, 1.0};
  isa::online_softmax_update({tile, state.data(), true}, 0, kRows);
  print("online_softmax_update", dtype, state);
  isa::linear_gradient({tile, coefficients.data()}, 0, kRows);
  x.print("linear_gradient");
}

void scans(Dtype dtype) {
  const Tensor rewards(dtype, 3), values(dtype, 4), logprobs(dtype, 5);
  const std::vector<uint8_t> counts = mask();
  std::vector<float> advantages(kSize), returns(kSize), kl(kSize);
  std::vector<double> moments(3 * kRows);
  Gae args = {};
  args.rewards = rewards.bytes.data(), args.values = values.bytes.data(), args.mask = counts.data();
  args.bootstrap = kOnes, args.advantages = advantages.data(), args.returns = returns.data();
  args.stride_rewards = args.stride_values = args.stride_mask = args.time = kWidth;
  args.dtype = dtype, args.gamma = 0.97f, args.lam = 0.9f;
  for (int holes = 0; holes < 3; ++holes) {
    args.holes = static_cast<Holes>(holes);
    isa::gae(args, 0, kRows);
    print("gae", dtype, advantages), print("gae", dtype, returns);
  }
  isa::ppo_advantages({logprobs.bytes.data(), rewards.bytes.data(), values.bytes.data(), counts.data(), kOnes,
                       advantages.data(), returns.data(), kl.data(), moments.data(), kWidth, kWidth, kWidth,
                       kWidth, kWidth, dtype, 0.1f, 0.97f, 0.9f},
                      0, kRows);
  print("ppo_advantages", dtype, advantages), print("ppo_advantages", dtype, returns), print("kl", dtype, kl);
  print("moments", dtype, moments);
}

void tokens(Dtype dtype) {
  const Tensor x(dtype, 6), ref(dtype, 7), grad(Dtype::kFloat32, 8);
  Tensor grad_x(dtype, 0), grad_ref(dtype, 0);
  const std::vector<uint8_t> counts = mask();
  std::vector<float> kl(kSize), slope(kSize), rewards(kSize);
  const Flat slopes = {slope.data(), Dtype::kFloat32, kSize, kSize};
  for (int estimator = 0; estimator < 4; ++estimator) {
    isa::per_token_kl_fwd(
        {x.flat(), ref.flat(), kl.data(), slope.data(), static_cast<Estimator>(estimator), kSize}, 0, 1);
    print("per_token_kl", dtype, kl);
    isa::per_token_kl_bwd(
        {grad.flat(), slopes, grad_x.bytes.data(), grad_ref.bytes.data(), dtype, dtype, kSize}, 0, 1);
    grad_x.print("per_token_kl_bwd"), grad_ref.print("per_token_kl_bwd");
  }
  isa::shaped_rewards({x.flat(), counts.data(), kWidth, kOnes, rewards.data(), kWidth, 0.1f, 1.5f}, 0, kRows);
  print("shaped_rewards", dtype, rewards);
  const Whitening in = {x.flat(), {counts.data(), kWidth, kWidth}, kSize, 0.5f, 1e-9f, 0.7f};
  std::vector<double> partials(3), sums(2);
  isa::whiten_moments({in, partials.data()}, 0, 1);
  print("whiten_moments", dtype, partials);
  isa::whiten_apply({in, rewards.data(), true}, 0, 1);
  print("whiten_apply", dtype, rewards);
  isa::whiten_sums({in, grad.flat(), sums.data()}, 0, 1);
  print("whiten_sums", dtype, sums);
  isa::whiten_bwd({in, grad.flat(), grad_x.bytes.data(), dtype, false, 0.1f, 0.2f}, 0, 1);
  grad_x.print("whiten_bwd");
}

void losses(Dtype dtype) {
  const Tensor x(dtype, 9), old(dtype, 10), third(dtype, 11), weights(dtype, 12);
  const std::vector<uint8_t> counts = mask();
  Tensor grad_x(dtype, 0);
  std::vector<float> grad(kSize);
  const Tiles tiles = {kWidth, kWidth, counts.data(), kWidth, grad.data()};
  for (bool sequence : {false, true}) {
    std::vector<PolicyPartial> parts(kRows);
    isa::policy_loss({x.matrix(), old.matrix(), third.matrix(), weights.matrix(), tiles, 0.8f, 1.2f, 3.0f,
                      sequence, true, parts.data()},
                     0, kRows);
    print("policy_loss", dtype, grad);
    isa::loss_bwd({grad.data(), 0.3f, grad_x.bytes.data(), dtype}, 0, kSize);
    grad_x.print("loss_bwd");
    for (const PolicyPartial& p : parts)
      print("policy_loss", dtype,
            std::vector<double>{p.loss, p.count, p.kl, p.low, p.high, p.dual, p.ratio, p.ratio_max});
  }
  std::vector<ValuePartial> parts(kRows);
  isa::value_loss({x.matrix(), old.matrix(), third.matrix(), tiles, 0.2f, false, parts.data()}, 0, kRows);
  print("value_loss", dtype, grad);
  for (const ValuePartial& p : parts)
    print("value_loss", dtype,
          std::vector<double>{p.loss, p.count, p.clipped, p.mean_return, p.m2_return, p.mean_d, p.m2_d});
}

}  // namespace

int main() {
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
    logits(dtype);
    scans(dtype);
    tokens(dtype);
    losses(dtype);
  }
}
