"""What one forward pass over a rollout yields, and the terms of PPO that are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import group_advantages, per_token_kl
from rlhf_trainer.sampling.rollout import Rollout


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The penalty at each token [B, R], nats: k1 of KL(policy || reference)."""
    return per_token_kl(logprobs, ref_logprobs, estimator="k1")


def final_scores(scores: Tensor, ended: Tensor, penalty: float | None, *, replace: bool = False) -> Tensor:
    """Scores [B] after the penalty for responses that never ended: taken off the score, or in its place."""
    if penalty is None:
        return scores
    return torch.where(ended, scores, -penalty if replace else scores - penalty)


def group_baseline(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, group_size: int, kind: str) -> Tensor:
    """Advantages [B, R]: one number a response, its score and KL against those of its group.

    grpo divides the scores, and them alone, by the group's deviation; the KL comes after, at its own kl_coef. In the
    same sum, where all scores are equal, KL would be divided by its own deviation and pull as hard at any kl_coef.

    Args:
        scores: [B], reward units. kl: [B, R] penalty at each token, nats. mask: [B, R], the tokens that count.
    """
    op_kind: Any = kind
    costs = -kl_coef * kl.sum(-1)
    if kind != "grpo":
        return group_advantages(scores + costs, group_size, kind=op_kind).unsqueeze(-1) * mask
    # Equal scores may differ from their rounded mean, and a deviation as small would make 1 of that.
    equal = without_spread(scores, group_size).repeat_interleave(group_size)
    relative = torch.where(equal, 0.0, group_advantages(scores, group_size, kind="grpo"))
    return (relative + group_advantages(costs, group_size, kind="mean")).unsqueeze(-1) * mask


def without_spread(scores: Tensor, group_size: int) -> Tensor:
    """[B / group_size]: whether all scores of a group are equal, so that it teaches nothing but KL."""
    groups = scores.view(-1, group_size)
    return groups.amax(-1) == groups.amin(-1)


@dataclass
class Batch:
    """A rollout with everything the update needs; tensors [B, R], scores [B]."""

    rollout: Rollout
    scores: Tensor
    logprobs: Tensor
    values: Tensor
    kl: Tensor  # of the sampled tokens: the penalty
    exact_kl: Tensor  # over the whole vocabulary at the same states: what is reported
    advantages: Tensor
    returns: Tensor
