"""Losses over preference pairs (Bradley-Terry)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_kernels.reference.common import upcast


def _as(x: float | Tensor, like: Tensor) -> float | Tensor:
    return x.to(like.dtype) if isinstance(x, Tensor) else x


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: float | Tensor | None,
    label: float | Tensor | None,
    reduction: str,
) -> Tensor:
    """chosen, rejected [M] -> -q log sigmoid(d) - (1-q) log sigmoid(-d), d = chosen - rejected - margin."""
    d = upcast(chosen) - upcast(rejected)
    if margin is not None:
        d = d - _as(margin, d)
    losses = -logsigmoid(d)
    if label is not None:
        label = _as(label, d)
        losses = label * losses - (1 - label) * logsigmoid(-d)
    return losses if reduction == "none" else losses.sum() / max(losses.numel(), 1)
