"""A token's share of linear_policy_loss and linear_cross_entropy, and of their gradient, from its softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.reference.common import EXPONENT_LIMIT, exp_minus_one_minus


def token_weights(mask: Tensor | None, labels: Tensor, mode: str, denominator: float | Tensor | None) -> Tensor:
    """Of labels' shape, fp32: what a counted token's loss is multiplied by in the aggregate."""
    ones = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    if mode == "token-sum":
        return ones
    if mode == "seq-mean-token-mean":
        ones = ones / (labels.shape[1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1))
    if denominator is None:
        tokens = labels.numel() if mask is None else mask.sum()
        count = tokens if mode == "token-mean" else labels.shape[0]
        denominator = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    return ones / denominator


def token_terms(
    logprobs: Tensor, entropy: Tensor, per_row: Tensor, scalars: list[float], kind: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each row's part of the loss and its gradient by the row's logprob and entropy, [R] each.

    kind "nll": per_row holds the row's weight. "policy": old logprob, advantage, weight of the clipped loss, weight of
    the other terms, and a reference logprob if an estimator of the KL follows the word.
    """
    if kind == "nll":
        return -per_row[0] * logprobs, -per_row[0], None
    old, advantage, weight, weight_rest, ref = per_row
    clip_low, clip_high, dual_clip, entropy_coef, kl_coef = scalars
    log_ratio = logprobs - old
    rho = log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    unclipped, clipped = rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage
    flat = clipped < unclipped
    loss = -torch.where(flat, clipped, unclipped)
    if dual_clip != float("inf"):
        dual = (advantage < 0) & (loss > -dual_clip * advantage)
        loss, flat = torch.where(dual, -dual_clip * advantage, loss), flat | dual
    g = torch.where(flat | (log_ratio.abs() > EXPONENT_LIMIT), 0.0, -unclipped) * weight
    loss = loss * weight
    g_entropy = None
    if entropy.numel() or entropy_coef != 0:
        loss = loss - entropy_coef * weight_rest * entropy
        g_entropy = -entropy_coef * weight_rest
    if kind != "policy":
        kl, slope = kl_and_slope(logprobs - ref, kind.removeprefix("policy "))
        loss = loss + kl_coef * weight_rest * kl
        g = g + kl_coef * weight_rest * slope
    return loss, g, g_entropy


def kl_and_slope(d: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """per_token_kl's estimator at d = logprobs - ref_logprobs, and its derivative."""
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "abs":
        return d.abs(), d.sign()
    if estimator == "k2":
        return d * (d / 2), d
    inside = d.abs() <= EXPONENT_LIMIT
    return exp_minus_one_minus(-d), torch.where(inside, -torch.expm1(-d), 1.0)
