"""The linear family: the logits ops on softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from rlhf_kernels.reference import logits as logits_family
from rlhf_kernels.reference import losses
from rlhf_kernels.reference.common import autocast_enabled, masked_mean, select, upcast
from rlhf_kernels.reference.tokens import per_token_kl


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    mask: Tensor | None,
    softcap: float | Tensor | None,
    logit_scale: float | Tensor,
) -> Tensor:
    """hidden [..., D], weight [V, D], bias [V], lora_a [r, D], lora_b [V, r] -> logits [..., V]; masked rows from 0.

    In fp32 (float64 for float64). The weight is that plus lora_b @ lora_a.
    """
    hidden = upcast(hidden)
    if mask is not None:
        hidden = torch.where(mask.unsqueeze(-1), hidden, 0.0)
    # The caller has cast what is to be cast.
    device = hidden.device
    with torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext():
        logits = hidden @ upcast(weight).T
        if lora_a is not None and lora_b is not None:
            logits = logits + hidden @ lora_a.to(hidden.dtype).T @ lora_b.to(hidden.dtype).T
    if bias is not None:
        logits = logits + upcast(bias)
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    logit_scale: float | Tensor,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """hidden [..., D]; labels, mask and temperature [...] -> logprobs and entropy [...]."""
    logits = head_logits(hidden, weight, bias, lora_a, lora_b, mask, softcap, logit_scale)
    return logits_family.selected_logprobs(logits, labels, mask, temperature, with_entropy)


def regularised(
    loss: Tensor,
    stats: dict[str, Tensor],
    logprobs: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    mode: str,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """loss - entropy_coef * entropy + kl_coef * KL(pi || ref), both aggregated as the loss, and their means."""
    if entropy is not None:
        loss = loss - entropy_coef * losses.aggregate(entropy, mask, mode, denominator)
        stats = {**stats, "entropy": masked_mean(mask, entropy.detach()).float()}
    if ref_logprobs is not None:
        kl = per_token_kl(select(mask, logprobs), select(mask, ref_logprobs.detach()), kl_estimator)
        loss = loss + kl_coef * losses.aggregate(select(mask, kl), mask, mode, denominator)
        stats = {**stats, "kl": masked_mean(mask, kl.detach()).float()}
    return loss, stats
