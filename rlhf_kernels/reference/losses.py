"""PPO's clipped policy and value losses over [B, T], with their statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.reference.common import (
    EXPONENT_LIMIT,
    clamp,
    count,
    exp_minus_one_minus,
    masked_mean,
    saturating_upcast,
    select,
    upcast,
)


def aggregate(per_token: Tensor, mask: Tensor | None, mode: str, denominator: float | Tensor | None) -> Tensor:
    """One number from per-token losses [B, T] that are already 0 at masked places."""
    if mode == "seq-mean-token-mean":
        lengths = max(per_token.shape[-1], 1) if mask is None else mask.sum(-1).clamp(min=1)
        total = (per_token.sum(-1) / lengths).sum()
    else:
        total = per_token.sum()
    if mode == "token-sum":
        return total
    if isinstance(denominator, Tensor):
        return total / denominator.detach()
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
    log_ratio = select(mask, saturating_upcast(logprobs) - upcast(old_logprobs.detach()))
    if ratio != "token":
        length = log_ratio.shape[-1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
        mean = (log_ratio.sum(-1, keepdim=True) / length).expand_as(log_ratio)
        # Of the mean's value, and of the token's own gradient or of the mean's.
        log_ratio = mean.detach() + (log_ratio - log_ratio.detach()) if ratio == "sequence-token" else mean
    log_ratio = clamp(log_ratio, -EXPONENT_LIMIT, EXPONENT_LIMIT)
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
            "approx_kl": exp_minus_one_minus(log_ratio),
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
    value = select(mask, saturating_upcast(values))
    target = select(mask, upcast(returns.detach()))
    squared = (value - target).square()
    is_clipped = torch.zeros_like(value, dtype=torch.bool)
    if clip is not None and old_values is not None:
        old = select(mask, upcast(old_values.detach()))
        # Not old + clamp(value - old): that rounds where nothing is clipped, and one in ten would count as clipped.
        squared_clipped = (clamp(value, old - clip, old + clip) - target).square()
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
