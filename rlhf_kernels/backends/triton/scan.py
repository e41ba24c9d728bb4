"""Generalised advantage estimation: an associative scan over affine maps A -> a A + b, one row a program."""

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
    """x -> a_then (a_first x + b_first) + b_then; a_then = 0 forgets what came first, NaN included."""
    return a_then * a_first, tl.where(a_then == 0.0, b_then, a_then * b_first + b_then)


@triton.jit
def _latest(found_first, value_first, found_then, value_then):
    return found_first | found_then, tl.where(found_then != 0, value_then, value_first)


@triton.jit(do_not_specialize=["stride_rewards", "stride_values", "T"])
def _gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    bootstrap_ptr,
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
    row = tl.program_id(0).to(tl.int64)
    rewards_ptr += row * stride_rewards
    values_ptr += row * stride_values
    lanes = tl.arange(0, BLOCK_T)
    beyond = 0.0 if bootstrap_ptr is None else tl.load(bootstrap_ptr + row)  # value after the chunk at hand
    running = 0.0  # advantage after the chunk at hand
    chunks = tl.cdiv(T, BLOCK_T)
    for chunk in range(chunks):
        t = (chunks - 1 - chunk) * BLOCK_T + lanes
        inside = t < T
        counted = inside
        followed = t + 1 < T  # by a counted position
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + row * T + t, mask=inside, other=0) != 0
            followed = tl.load(mask_ptr + row * T + t + 1, mask=followed, other=0) != 0
        reward = tl.load(rewards_ptr + t, mask=counted, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t, mask=counted, other=0.0).to(tl.float32)
        next_value = tl.load(values_ptr + t + 1, mask=followed, other=0.0).to(tl.float32)
        if mask_ptr is not None and MASKED == SKIP:
            found, next_value = tl.associative_scan((followed.to(tl.int32), next_value), 0, _latest, reverse=True)
            next_value = tl.where(found != 0, next_value, beyond)
            beyond = tl.sum(tl.where(lanes == 0, next_value, 0.0), 0)
        else:
            next_value = tl.where(t == T - 1, beyond, next_value)

        delta = reward + gamma * next_value - value
        if MASKED == ZERO:
            a = tl.where(inside, decay, 1.0)
            b = tl.where(inside, delta, 0.0)
        else:
            a = tl.where(counted, decay, tl.where(inside, 0.0, 1.0) if MASKED == STOP else 1.0)
            b = tl.where(counted, delta, 0.0)
        a, b = tl.associative_scan((a, b), 0, _compose, reverse=True)
        _, advantage = _compose(1.0, running, a, b)
        running = tl.sum(tl.where(lanes == 0, advantage, 0.0), 0)
        tl.store(advantages_ptr + row * T + t, tl.where(counted, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + row * T + t, tl.where(counted, advantage + value, 0.0), mask=inside)


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
    advantages = torch.empty((batch, time), dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    launch(
        _gae_kernel,
        batch if time else 0,
        *(rewards, values, contiguous(mask), contiguous(bootstrap)),
        *(advantages, returns, gamma, gamma * lam, rewards.stride(0), values.stride(0), time),
        MASKED=masked,
        BLOCK_T=BLOCK_T,
        num_warps=NUM_WARPS,
    )
    return advantages, returns
