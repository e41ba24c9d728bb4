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
    d = d.clamp(-largest, largest)
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return (d * (d / 2)).clamp(max=largest)
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


def whiten(x: Tensor, mask: Tensor | None, shift_mean: bool, eps: float, group: Any) -> Tensor:
    """(x - mean) / sqrt(population variance + eps) over the counted elements of all ranks of `group`."""
    x = upcast(x)

    def total(value: Tensor) -> Tensor:
        if group is not None:
            torch.distributed.all_reduce(value, group=group)
        return value

    counted = total(count(mask, x)).clamp(min=1)
    mean = total(select(mask, x).sum()) / counted
    centred = select(mask, x - mean)
    variance = total(centred.square().sum()) / counted
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if shift_mean else select(mask, whitened + mean)
