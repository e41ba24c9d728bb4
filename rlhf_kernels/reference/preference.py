"""Losses over preference pairs (Bradley-Terry, DPO, IPO) and advantages relative to a group of answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_kernels.reference.common import row_sum, upcast


def _as(x: float | Tensor, like: Tensor) -> float | Tensor:
    return x.to(like.dtype) if isinstance(x, Tensor) else x


def _either_way(label: float | Tensor, won: Tensor, lost: Tensor) -> Tensor:
    """The expected loss of each pair where `chosen` is the better one with probability `label`."""
    label = _as(label, won)
    return label * won + (1 - label) * lost


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else losses.sum() / max(losses.numel(), 1)


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: float | Tensor | None,
    label: float | Tensor | None,
    reduction: str,
) -> Tensor:
    """chosen, rejected [M] -> -q log sigmoid(d - margin) - (1-q) log sigmoid(-d - margin), d = chosen - rejected."""
    d = upcast(chosen) - upcast(rejected)
    margin = 0.0 if margin is None else _as(margin, d)
    losses = -logsigmoid(d - margin)
    if label is not None:
        losses = _either_way(label, losses, -logsigmoid(-d - margin))
    return _reduced(losses, reduction)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float,
    kind: str,
    label: float | Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """[M] sequence logprobs -> (loss, beta * (policy - ref) of the chosen [M], of the rejected [M])."""
    # Policy minus reference first: they are close, so that the difference of two long sums loses nothing.
    chosen = upcast(policy_chosen) - upcast(ref_chosen.detach())
    rejected = upcast(policy_rejected) - upcast(ref_rejected.detach())
    h = chosen - rejected

    def losses_of(h: Tensor) -> Tensor:
        if kind == "ipo":
            return (h - 1 / (2 * beta)).square()
        return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)

    losses = losses_of(h) if label is None else _either_way(label, losses_of(h), losses_of(-h))
    return _reduced(losses, reduction), (beta * chosen).detach(), (beta * rejected).detach()


def group_advantages(scores: Tensor, group_ids: Tensor | None, group_size: int, kind: str, eps: float) -> Tensor:
    """scores [B], group_ids [B] or None for consecutive groups of group_size -> advantages [B]. Sums are float64."""
    s = scores.double()
    if group_ids is None:
        s = s.reshape(-1, group_size)
        counts = s.new_full((1, 1), group_size)
        centred = s - row_sum(s).unsqueeze(-1) / counts
        squares = row_sum(centred.square()).unsqueeze(-1)
        return _relative(centred, squares, counts, kind, eps).reshape(-1).to(upcast(scores).dtype)

    ids, order = group_ids.sort(stable=True)
    first = torch.searchsorted(ids, ids)
    last = torch.searchsorted(ids, ids, right=True) - 1
    counts = (last - first + 1).to(s.dtype)
    s = s.gather(0, order)
    centred = s - _segment_sums(s, first, last) / counts
    squares = _segment_sums(centred.square(), first, last)
    advantages = _relative(centred, squares, counts, kind, eps)
    return torch.empty_like(advantages).scatter(0, order, advantages).to(upcast(scores).dtype)


def _relative(centred: Tensor, squares: Tensor, counts: Tensor, kind: str, eps: float) -> Tensor:
    """Advantages from score - mean, the group's sum of its squares, and the group's size."""
    others = (counts - 1).clamp(min=1)
    if kind == "grpo":
        centred = centred / ((squares / others).sqrt() + eps)
    elif kind == "rloo":  # s - (sum - s) / (n - 1) = (s - mean) n / (n - 1)
        centred = centred * (counts / others)
    return torch.where(counts > 1, centred, 0.0)


def _segment_sums(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Sum of x over [first, last], for every element of a segment, by doubling.

    A segment's sum is one fixed tree of adds over its own elements: no atomics, and no trace of the other groups.
    A scatter with `accumulate` is atomic adds once compiled, a difference of cumulative sums mixes the groups.
    """
    place = torch.arange(x.shape[0], device=x.device)
    rank = place - first
    for step in range(_doublings(x.shape[0])):
        ahead = 1 << step
        x = torch.where(rank >= ahead, x + x.gather(0, (place - ahead).clamp(min=0)), x)
    return x.gather(0, last)


def _doublings(size: int) -> int:
    """Steps until one sum may span `size` elements; in a trace a constant, so that a new size compiles nothing."""
    if torch.compiler.is_compiling():
        return 20 if size <= 1 << 20 else 40
    return max(size - 1, 0).bit_length()
