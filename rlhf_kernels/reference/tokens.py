"""Per-token KL, shaped rewards and whitening over [B, T]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.reference.common import clamp, count, exp_minus_one_minus, saturating_upcast, select, upcast


def per_token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """logprobs, ref_logprobs [...] -> the estimator of KL(pi || ref) at each token, nats."""
    d = saturating_upcast(logprobs) - saturating_upcast(ref_logprobs)
    largest = torch.finfo(d.dtype).max  # finite inputs never give inf: 3e38 - -3e38 and the square of 1e30 saturate
    d = clamp(d, -largest, largest)
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return clamp(d * (d / 2), 0.0, largest)
    return exp_minus_one_minus(-d)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, clip: float | None) -> Tensor:
    """scores [B], kl [B, T], mask [B, T] -> rewards [B, T]: -kl_coef * kl, plus the score at the last counted token."""
    scores, kl = upcast(scores), upcast(kl)
    if clip is not None:
        scores = clamp(scores, -clip, clip)
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    counted_from_here = mask.long().flip(-1).cumsum(-1).flip(-1)
    is_last = mask & (counted_from_here == 1)
    return torch.where(is_last, rewards + scores.unsqueeze(-1), rewards)


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """x float64 -> [3]: count, mean and sum of squared distances to the mean, of the counted elements."""
    counted = count(mask, x)
    mean = select(mask, x).sum() / counted.clamp(min=1)
    return torch.stack([counted, mean, select(mask, x - mean).square().sum()])


def gather_moments(own: Tensor, group: Any) -> Tensor:
    """[3] -> [ranks, 3], the moments of every rank of a torch.distributed group, in rank order: one collective."""
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, own, group=group)
    return torch.stack(parts)


def merge_moments(parts: Tensor) -> Tensor:
    """[ranks, 3] -> [3], the moments of all parts together (Chan et al. 1979)."""
    counted, means, squares = parts.unbind(-1)
    mean = (counted * means).sum() / counted.sum().clamp(min=1)
    return torch.stack([counted.sum(), mean, (squares + counted * (means - mean).square()).sum()])


def whiten(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    eps: float,
    group: Any,
    *,
    unbiased: bool = False,
    dim: tuple[int, ...] | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the counted elements of all ranks of `group`, or over `dim` alone.

    In float64: a float32 mean of 1e4 is off by 5e-4, which shows where the standard deviation is 1e-2.
    """
    wide = x.double()  # once: each use would round its part of the gradient to x's dtype
    if dim is None:
        own = moments(wide, mask)
        counted, mean, squares = (own if group is None else merge_moments(gather_moments(own, group))).unbind()
    else:
        ones = torch.ones_like(wide, requires_grad=False) if mask is None else mask.double()
        counted = ones.sum(dim, keepdim=True)
        mean = select(mask, wide).sum(dim, keepdim=True) / counted.clamp(min=1)
        squares = select(mask, wide - mean).square().sum(dim, keepdim=True)
    variance = squares / (counted - 1 if unbiased else counted).clamp(min=1)
    whitened = select(mask, wide - mean) * torch.rsqrt(variance + eps)
    return select(mask, (whitened if shift_mean else whitened + mean).to(upcast(x).dtype))
