"""gae, padded and packed, and ppo_advantages on the native module (csrc/cpu/scan.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, contiguous, last_contiguous
from rlhf_kernels.backends.cpu.whiten import whiten_into


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    masked: int,
) -> tuple[Tensor, Tensor]:
    """rewards, values, mask [B, T], bootstrap [B] -> advantages, returns [B, T] float32.

    masked: 0 skip, 1 stop, 2 zero.
    """
    batch, time = rewards.shape
    advantages = torch.empty((batch, time), dtype=torch.float32, device="cpu")
    returns = torch.empty((batch, time), dtype=torch.float32, device="cpu")
    rewards, values, bootstrap = last_contiguous(rewards), last_contiguous(values), contiguous(bootstrap)
    mask = None if mask is None else last_contiguous(mask)
    _native.gae(
        rewards.data_ptr(),
        values.data_ptr(),
        DTYPES[rewards.dtype],
        address(mask),
        address(bootstrap),
        batch,
        time,
        rewards.stride(0),
        values.stride(0),
        0 if mask is None else mask.stride(0),
        gamma,
        lam,
        masked,
        advantages.data_ptr(),
        returns.data_ptr(),
        torch.get_num_threads(),
    )
    return advantages, returns


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
    """rewards, values, mask [total], bootstrap [S], cu_seqlens [S + 1] -> advantages, returns [total] float32.

    Raises ValueError where cu_seqlens does not run from 0 to total or falls. masked: 0 skip, 1 stop, 2 zero.
    """
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device="cpu")
    returns = torch.empty(rewards.shape, dtype=torch.float32, device="cpu")
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    mask, bootstrap = contiguous(mask), contiguous(bootstrap)
    total, sequences = rewards.numel(), cu_seqlens.numel() - 1
    bad = _native.gae_packed(
        rewards.data_ptr(),
        values.data_ptr(),
        DTYPES[rewards.dtype],
        address(mask),
        address(bootstrap),
        total,
        cu_seqlens.data_ptr(),
        cu_seqlens.element_size(),
        sequences,
        gamma,
        lam,
        masked,
        advantages.data_ptr(),
        returns.data_ptr(),
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise ValueError(
            f"gae: cu_seqlens holds {int(cu_seqlens[bad])} at {bad}; it takes offsets that start at 0, never fall and "
            f"end at {total}"
        )
    return advantages, returns


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
    """logprobs, ref_logprobs, values [B, T] of one dtype, scores [B] float32 -> advantages, returns, kl [B, T] float32.

    eps: added to the variance of whitened advantages, None: not whitened.
    """
    batch, time = logprobs.shape
    advantages, returns, kl = (torch.empty((batch, time), dtype=torch.float32, device="cpu") for _ in range(3))
    moments = None if eps is None else torch.empty((batch, 3), dtype=torch.float64, device="cpu")
    logprobs, ref_logprobs, scores = last_contiguous(logprobs), last_contiguous(ref_logprobs), scores.contiguous()
    values, mask = last_contiguous(values), last_contiguous(mask)
    _native.ppo_advantages(
        logprobs.data_ptr(),
        ref_logprobs.data_ptr(),
        scores.data_ptr(),
        values.data_ptr(),
        DTYPES[logprobs.dtype],
        mask.data_ptr(),
        batch,
        time,
        logprobs.stride(0),
        ref_logprobs.stride(0),
        values.stride(0),
        mask.stride(0),
        kl_coef,
        gamma,
        lam,
        advantages.data_ptr(),
        returns.data_ptr(),
        kl.data_ptr(),
        address(moments),
        torch.get_num_threads(),
    )
    if moments is not None and eps is not None:
        merged = torch.empty(3, dtype=torch.float64, device="cpu")
        whiten_into(advantages, mask=mask, parts=moments, moments=merged, eps=eps, keep_mean=False, y=advantages)
    return advantages, returns, kl
