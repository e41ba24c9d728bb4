// Every kernel there is, and the table of one ISA's copies of them.
#pragma once

#include "full_kl.h"
#include "linear.h"
#include "logits.h"
#include "losses.h"
#include "sampling.h"
#include "scan.h"
#include "tokens.h"

// X(kernel, arguments): a kernel is one line here, a definition in its family's .cpp, a function in bind/.
#define RK_KERNELS(X)                \
  X(full_kl_fwd, FullKlFwd)          \
  X(full_kl_bwd, FullKlBwd)          \
  X(linear_fold, LinearFold)         \
  X(linear_gradient, LinearGradient) \
  X(logprobs_fwd, LogprobsFwd)       \
  X(logprobs_bwd, LogprobsBwd)       \
  X(policy_loss, PolicyLoss)         \
  X(value_loss, ValueLoss)           \
  X(loss_bwd, LossBwd)               \
  X(sample_tokens, SampleTokens)     \
  X(gae, Gae)                        \
  X(ppo_advantages, Advantages)      \
  X(per_token_kl_fwd, PerTokenKlFwd) \
  X(per_token_kl_bwd, PerTokenKlBwd) \
  X(shaped_rewards, ShapedRewards)   \
  X(whiten_moments, WhitenMoments)   \
  X(whiten_apply, WhitenApply)       \
  X(whiten_sums, WhitenSums)         \
  X(whiten_bwd, WhitenBwd)

namespace rk {

// Each works on rows [begin, end) and may run on any thread.
struct Kernels {
#define RK_ENTRY(NAME, ARGS) void (*NAME)(const ARGS&, int64_t begin, int64_t end);
  RK_KERNELS(RK_ENTRY)
#undef RK_ENTRY
};

}  // namespace rk
