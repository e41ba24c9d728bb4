"""Generalised advantage estimation as one associative scan over affine maps, one sequence a program.

What the future adds to a step, `u_{t+1} = gamma V_{t+1} + gamma lam A_{t+1}`, is all that a step needs of it:
`A_t = r_t - V_t + u_{t+1}` and `u_t = gamma lam u_{t+1} + gamma V_t + gamma lam (r_t - V_t)`, from `gamma * bootstrap`.
A hole is another such map: the identity ("skip"), 0 ("stop"), a step with reward and value 0 ("zero").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import contiguous, launch

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
    """rewards, values, mask [total], bootstrap [S] fp32, cu_seqlens [S + 1] -> advantages, returns [total] fp32."""
    total, sequences = rewards.shape[0], cu_seqlens.shape[0] - 1
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
        *(rewards, values, contiguous(mask), contiguous(bootstrap), cu_seqlens),
        *(advantages, returns, gamma, gamma * lam, *strides, time),
        MASKED=masked,
        BLOCK_T=BLOCK_T,
        num_warps=NUM_WARPS,
    )
    return advantages, returns
