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


def group_baseline(rewards: Tensor, mask: Tensor, *, group_size: int, kind: str) -> Tensor:
    """Advantages [B, R] from rewards [B, R]: one number a response, its reward and KL against those of its group.

    The KL is in the sum that grpo divides by the group's deviation, so that beta weighs it against the score as ever.
    """
    op_kind: Any = kind
    return group_advantages(rewards.sum(-1), group_size, kind=op_kind).unsqueeze(-1) * mask


@dataclass
class Batch:
    """A rollout with everything the update needs; tensors [B, R], scores [B]."""

    rollout: Rollout
    scores: Tensor
    logprobs: Tensor
    values: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
