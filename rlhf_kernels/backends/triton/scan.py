"""Generalised advantage estimation and PPO's advantages as an associative scan of affine maps, one sequence a program.

What the future adds to a step, `u_{t+1} = gamma V_{t+1} + gamma lam A_{t+1}`, is all that a step needs of it:
`A_t = r_t - V_t + u_{t+1}` and `u_t = gamma lam u_{t+1} + gamma V_t + gamma lam (r_t - V_t)`, from `gamma * bootstrap`.
A hole is another such map: the identity ("skip"), 0 ("stop"), a step with reward and value 0 ("zero"). A score at the
last counted token is what the future adds there: u starts from it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import contiguous, launch
from rlhf_kernels.backends.triton.whiten import whiten_fwd

# 512 positions over 2 warps. The same for every T, and chunks start at t = 0: padding on the right changes no bit.
BLOCK_T = 512
NUM_WARPS = 2

SKIP, STOP, ZERO = (tl.constexpr(index) for index in range(3))  # as the op's MASKED counts them


@triton.jit
def _compose(a_first, b_first, a_then, b_then):
    """u -> a_then (a_first u + b_first) + b_then; a_then = 0 forgets what came first, NaN included."""
    return a_then * a_first, tl.where(a_then == 0.0, b_then, a_then * b_first + b_then)


@triton.jit
def future_of_chunk(future, reward, value, inside, counted, gamma, decay, MASKED: tl.constexpr):
    """[BLOCK_T] u_{t+1} of a chunk, given `future`, what comes behind it, and the rest at t + 1, 0 if not counted."""
    b = gamma * value + decay * (reward - value)
    if MASKED == SKIP:
        a = tl.where(counted, decay, 1.0)
    elif MASKED == STOP:
        a = tl.where(counted, decay, tl.where(inside, 0.0, 1.0))
    else:
        a = tl.where(inside, decay, 1.0)
    a, b = tl.associative_scan((a, b), 0, _compose, reverse=True)
    _, u = _compose(1.0, future, a, b)
    return u


@triton.jit
def load_counted(mask_ptr, t, inside):
    return inside if mask_ptr is None else tl.load(mask_ptr + t, mask=inside, other=0) != 0


@triton.jit
def load_float(ptr, t, counted):
    return tl.load(ptr + t, mask=counted, other=0.0).to(tl.float32)


@triton.jit
def load_offset(ptr, total):
    return tl.minimum(tl.maximum(tl.load(ptr).to(tl.int64), 0), total)


@triton.jit
def first_lane(x, BLOCK_T: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK_T) == 0, x, 0.0), 0)


@triton.jit
def fill_nan(advantages_ptr, returns_ptr, begin, end, BLOCK_T: tl.constexpr):
    """What wrong offsets leave out at either end; nothing where they are right."""
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        tl.store(advantages_ptr + t, float("nan"), mask=t < end)
        tl.store(returns_ptr + t, float("nan"), mask=t < end)


@triton.jit(do_not_specialize=["stride_rewards", "stride_values", "T"])
def _gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    bootstrap_ptr,
    offsets_ptr,
    advantages_ptr,
    returns_ptr,
    gamma,
    decay,
    stride_rewards,
    stride_values,
    T,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    if offsets_ptr is None:
        rewards_ptr += sequence * stride_rewards
        values_ptr += sequence * stride_values
        begin = sequence * T
        length = T.to(tl.int64)
    else:  # T is the total; wrong offsets must not lead outside
        begin = load_offset(offsets_ptr + sequence, T)
        length = load_offset(offsets_ptr + sequence + 1, T) - begin
        rewards_ptr += begin
        values_ptr += begin
        if sequence == 0:
            fill_nan(advantages_ptr, returns_ptr, 0, begin, BLOCK_T)
        if sequence == tl.num_programs(0) - 1:
            fill_nan(advantages_ptr, returns_ptr, begin + length, T, BLOCK_T)
    if mask_ptr is not None:
        mask_ptr += begin
    future = 0.0 if bootstrap_ptr is None else gamma * tl.load(bootstrap_ptr + sequence)
    chunks = tl.cdiv(length, BLOCK_T)
    for chunk in range(chunks):
        t = (chunks - 1 - chunk) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = t < length
        follows = t + 1 < length
        counted = load_counted(mask_ptr, t, inside)
        counted_after = load_counted(mask_ptr, t + 1, follows)
        reward = load_float(rewards_ptr, t, counted)
        value = load_float(values_ptr, t, counted)
        reward_after = load_float(rewards_ptr, t + 1, counted_after)
        value_after = load_float(values_ptr, t + 1, counted_after)
        u = future_of_chunk(future, reward_after, value_after, follows, counted_after, gamma, decay, MASKED)
        future = first_lane(u, BLOCK_T)
        advantage = reward - value + u
        tl.store(advantages_ptr + begin + t, tl.where(counted, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + begin + t, tl.where(counted, advantage + value, 0.0), mask=inside)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    masked: int,
) -> tuple[Tensor, Tensor]:
    """rewards, values [B, T], mask [B, T] bool, bootstrap [B] fp32 -> advantages, returns [B, T] fp32.

    Rows of rewards and values may be strided; a last dimension that is not contiguous is copied once.
    masked: 0 skip, 1 stop, 2 zero.
    """
    batch, time = rewards.shape
    rewards, values = (x if x.stride(1) == 1 else x.contiguous() for x in (rewards, values))
    strides = rewards.stride(0), values.stride(0)
    return _launch(batch if time else 0, rewards, values, mask, bootstrap, None, gamma, lam, strides, time, masked)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    masked: int,
) -> tuple[Tensor, Tensor]:
    """rewards, values, mask [total], bootstrap [S] fp32, cu_seqlens [S + 1] -> advantages, returns [total] fp32.

    Offsets are clamped to [0, total]; what wrong ones leave out at either end is NaN.
    """
    total, sequences = rewards.shape[0], cu_seqlens.shape[0] - 1
    if sequences == 0:
        missing = rewards.new_full((total,), float("nan"), dtype=torch.float32)
        return missing, missing.clone()
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    return _launch(
        sequences if total else 0, rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, (0, 0), total, masked
    )


def _launch(
    programs: int,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    strides: tuple[int, int],
    time: int,
    masked: int,
) -> tuple[Tensor, Tensor]:
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    launch(
        _gae_kernel,
        programs,
        rewards,
        values,
        contiguous(mask),
        contiguous(bootstrap),
        cu_seqlens,
        advantages,
        returns,
        gamma,
        gamma * lam,
        *strides,
        time,
        MASKED=masked,
        BLOCK_T=BLOCK_T,
        num_warps=NUM_WARPS,
    )
    return advantages, returns


@triton.jit
def load_kl(logprobs_ptr, ref_logprobs_ptr, t, counted):
    kl = load_float(logprobs_ptr, t, counted) - load_float(ref_logprobs_ptr, t, counted)
    largest = 3.4028234663852886e38  # finite logprobs give a finite KL; NaN stays
    return tl.where(kl > largest, largest, tl.where(kl < -largest, -largest, kl))


@triton.jit
def merge_moments(count, mean, deviations, more, more_mean, more_deviations):
    """Chan, Golub and LeVeque 1979: count, mean and sum of squared deviations of two sets together, fp64."""
    share = more / tl.maximum(count + more, 1.0)
    shift = more_mean - mean
    return count + more, mean + shift * share, deviations + more_deviations + shift * shift * (count * share)


@triton.jit(do_not_specialize=["stride_logprobs", "stride_ref_logprobs", "stride_values", "T"])
def _ppo_advantages_kernel(
    logprobs_ptr,
    ref_logprobs_ptr,
    values_ptr,
    mask_ptr,
    scores_ptr,
    advantages_ptr,
    returns_ptr,
    kl_ptr,
    moments_ptr,
    kl_coef,
    gamma,
    decay,
    stride_logprobs,
    stride_ref_logprobs,
    stride_values,
    T,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logprobs_ptr += row * stride_logprobs
    ref_logprobs_ptr += row * stride_ref_logprobs
    values_ptr += row * stride_values
    begin = row * T
    mask_ptr += begin
    future = tl.load(scores_ptr + row)
    count = tl.zeros([], tl.float64)
    mean = tl.zeros([], tl.float64)
    deviations = tl.zeros([], tl.float64)
    chunks = tl.cdiv(T, BLOCK_T)
    for chunk in range(chunks):
        t = (chunks - 1 - chunk) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = t < T
        follows = t + 1 < T
        counted = load_counted(mask_ptr, t, inside)
        counted_after = load_counted(mask_ptr, t + 1, follows)
        kl = load_kl(logprobs_ptr, ref_logprobs_ptr, t, counted)
        value = load_float(values_ptr, t, counted)
        reward_after = -kl_coef * load_kl(logprobs_ptr, ref_logprobs_ptr, t + 1, counted_after)
        value_after = load_float(values_ptr, t + 1, counted_after)
        u = future_of_chunk(future, reward_after, value_after, follows, counted_after, gamma, decay, SKIP)
        future = first_lane(u, BLOCK_T)
        advantage = tl.where(counted, -kl_coef * kl - value + u, 0.0)
        tl.store(advantages_ptr + begin + t, advantage, mask=inside)
        tl.store(returns_ptr + begin + t, tl.where(counted, advantage + value, 0.0), mask=inside)
        tl.store(kl_ptr + begin + t, kl, mask=inside)
        if moments_ptr is not None:
            some = tl.sum(counted.to(tl.int32), 0).to(tl.float64)
            some_mean = tl.sum(advantage.to(tl.float64), 0) / tl.maximum(some, 1.0)
            off = tl.where(counted, advantage - some_mean.to(tl.float32), 0.0)
            # The mean in fp32 is off by less than an ulp; what that adds to the squares is taken out again.
            rest = tl.sum(off, 0).to(tl.float64)
            squares = tl.sum(off * off, 0).to(tl.float64) - rest * rest / tl.maximum(some, 1.0)
            count, mean, deviations = merge_moments(count, mean, deviations, some, some_mean, tl.maximum(squares, 0.0))
    if moments_ptr is not None:
        tl.store(moments_ptr + row * 3, count)
        tl.store(moments_ptr + row * 3 + 1, mean)
        tl.store(moments_ptr + row * 3 + 2, deviations)


def ppo_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, ref_logprobs, values, mask [B, T], scores [B] fp32 -> advantages, returns, kl [B, T] fp32.

    Rows may be strided; a last dimension that is not contiguous is copied once. eps: added to the variance of whitened
    advantages, None: not whitened.
    """
    batch, time = logprobs.shape
    rows = tuple(x if x.stride(1) == 1 else x.contiguous() for x in (logprobs, ref_logprobs, values))
    mask = mask.contiguous()
    advantages = torch.empty((batch, time), dtype=torch.float32, device=logprobs.device)
    returns, kl = torch.empty_like(advantages), torch.empty_like(advantages)
    moments = None if eps is None else torch.empty((batch, 3), dtype=torch.float64, device=logprobs.device)
    programs = batch if time else 0
    launch(
        _ppo_advantages_kernel,
        programs,
        *rows,
        mask,
        scores.contiguous(),
        advantages,
        returns,
        kl,
        moments,
        kl_coef,
        gamma,
        gamma * lam,
        *(x.stride(0) for x in rows),
        time,
        BLOCK_T=BLOCK_T,
        num_warps=NUM_WARPS,
    )
    if moments is not None and eps is not None and programs:
        advantages, _ = whiten_fwd(advantages, mask, moments, eps, True)
    return advantages, returns, kl
