"""Per-token KL, shaped rewards, whitening, and PPO's clipped losses over [B, T]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.reference.common import EXPONENT_LIMIT, clamp, count, masked_mean, select, upcast

# exp(u) - 1 - u = u^2 (1/2! + u/3! + u^2/4! + ...): 15 terms reach float64 at |u| <= 0.5.
_K3_SERIES = [1.0 / math.factorial(k) for k in range(2, 17)]


def _exp_minus_one_minus(u: Tensor) -> Tensor:
    """exp(u) - 1 - u without cancellation near 0; the exponent (not the linear term) is clamped to +-20."""
    small = u.abs() <= 0.5
    near = torch.where(small, u, 0.0)
    series = torch.full_like(u, _K3_SERIES[-1])
    for coefficient in reversed(_K3_SERIES[:-1]):
        series = series * near + coefficient
    far = torch.expm1(u.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)) - u
    return torch.where(small, near * near * series, far)


def per_token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """logprobs, ref_logprobs [...] -> the estimator of KL(pi || ref) at each token, nats."""
    d = upcast(logprobs) - upcast(ref_logprobs)
    largest = torch.finfo(d.dtype).max  # finite inputs never give inf: 3e38 - -3e38 and the square of 1e30 saturate
    d = d.clamp(-largest, largest)
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return (d * (d / 2)).clamp(max=largest)
    return _exp_minus_one_minus(-d)


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


def aggregate(per_token: Tensor, mask: Tensor | None, mode: str, denominator: float | Tensor | None) -> Tensor:
    """One number from per-token losses [B, T] that are already 0 at masked places."""
    if mode == "seq-mean-token-mean":
        lengths = max(per_token.shape[-1], 1) if mask is None else mask.sum(-1).clamp(min=1)
        total = (per_token.sum(-1) / lengths).sum()
    else:
        total = per_token.sum()
    if mode == "token-sum":
        return total
    if denominator is None:
        denominator = count(mask, per_token).clamp(min=1) if mode == "token-mean" else max(per_token.shape[0], 1)
    return total / denominator


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio: str,
    importance_weights: Tensor | None,
    mode: str,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All tensors [B, T] -> (loss, statistics). Gradient flows into `logprobs` only."""
    advantage = select(mask, upcast(advantages.detach()))
    log_ratio = select(mask, upcast(logprobs) - upcast(old_logprobs.detach()))
    if ratio == "sequence":
        length = log_ratio.shape[-1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(-1, keepdim=True) / length).expand_as(log_ratio)
    log_ratio = log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    rho = log_ratio.exp()
    unclipped = rho * advantage
    clipped = clamp(rho, 1 - clip_low, 1 + clip_high) * advantage
    losses = -torch.where(clipped < unclipped, clipped, unclipped)
    dual = torch.zeros_like(rho, dtype=torch.bool)
    if dual_clip is not None:
        dual = (advantage < 0) & (losses > -dual_clip * advantage)
        losses = torch.where(dual, -dual_clip * advantage, losses)
    if importance_weights is not None:
        losses = losses * select(mask, upcast(importance_weights.detach()))
    loss = aggregate(select(mask, losses), mask, mode, denominator)

    with torch.no_grad():
        is_low = (advantage < 0) & (rho < 1 - clip_low)
        is_high = (advantage > 0) & (rho > 1 + clip_high)
        peak = select(mask, rho).amax() if rho.numel() else rho.sum()
        means = {
            "approx_kl": _exp_minus_one_minus(log_ratio),
            "clip_fraction_low": is_low.to(rho.dtype),
            "clip_fraction_high": is_high.to(rho.dtype),
            "clip_fraction_dual": dual.to(rho.dtype),
            "ratio_mean": rho,
        }
        stats = {name: masked_mean(mask, value.detach()).float() for name, value in means.items()}
        stats["ratio_max"] = peak.float()
    return loss, stats


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    clip: float | None,
    mode: str,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All tensors [B, T] -> (loss, statistics). Gradient flows into `values` only."""
    value = select(mask, upcast(values))
    target = select(mask, upcast(returns.detach()))
    squared = (value - target).square()
    is_clipped = torch.zeros_like(value, dtype=torch.bool)
    if clip is not None and old_values is not None:
        old = select(mask, upcast(old_values.detach()))
        squared_clipped = (old + clamp(value - old, -clip, clip) - target).square()
        is_clipped = squared_clipped > squared
        squared = torch.where(is_clipped, squared_clipped, squared)
    loss = aggregate(select(mask, 0.5 * squared), mask, mode, denominator)

    with torch.no_grad():

        def variance(x: Tensor) -> Tensor:
            return masked_mean(mask, (x - masked_mean(mask, x)).square())

        spread = variance(target)
        explained = 1 - variance(target - value.detach()) / torch.where(spread > 0, spread, 1.0)
        stats = {
            "clip_fraction": masked_mean(mask, is_clipped.to(value.dtype)).float(),
            "explained_variance": torch.where(spread > 0, explained, 0.0).float(),
        }
    return loss, stats
