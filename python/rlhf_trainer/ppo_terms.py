"""What one forward pass over a rollout yields, and the terms of PPO that are made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf_kernels import group_advantages, linear_logprobs, per_token_kl
from rlhf_trainer.forward import head_inputs
from rlhf_trainer.rollout import Rollout
from rlhf_trainer.sharding import with_weights
from rlhf_trainer.value_head import ValueHead

if TYPE_CHECKING:
    from rlhf_trainer.ppo import PPOConfig


@with_weights
def token_outputs(
    policy: PreTrainedModel,
    value_head: ValueHead | None,
    rollout: Rollout,
    rows: Tensor,
    temperature: float,
    *,
    entropy_bonus: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs, entropies and values [b, R] of the responses in `rows`, 0 at padding.

    The logprob and the value of a token read the hidden state before it; logits are never in memory. Padding is cut to
    what these rows need, and only counted positions reach the lm_head: the same rows always go through the same shapes,
    hence the same bits. Entropies have a gradient only for an entropy bonus: a frozen head then does with a GEMM less.
    """
    start, length = rollout.prompt_length, rollout.response_mask.shape[1]
    width = int(rollout.response_mask[rows].sum(-1).max())
    skip = start - int(rollout.mask[rows, :start].sum(-1).max())
    ids, mask = rollout.ids[rows, skip : start + width], rollout.mask[rows, skip : start + width]
    start -= skip
    counted = mask[:, start:]
    inputs = head_inputs(policy, ids, mask, start)
    with_entropy = True if entropy_bonus else "detached"
    logprobs, entropy = linear_logprobs(**inputs, mask=counted, temperature=temperature, with_entropy=with_entropy)
    values = torch.zeros_like(logprobs)
    if value_head is not None:
        values = torch.where(counted, value_head.values(policy, inputs["hidden"], ids, mask, start), 0.0)
    return tuple(pad(x, (0, length - width)) for x in (logprobs, entropy, values))


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The penalty at each token [B, R], nats: k1 of KL(policy || reference)."""
    return per_token_kl(logprobs, ref_logprobs, estimator="k1")


def final_scores(scores: Tensor, ended: Tensor, cfg: PPOConfig) -> Tensor:
    """Scores [B] after the penalty for responses that never ended."""
    if cfg.missing_eos_penalty is None:
        return scores
    unended = scores - cfg.missing_eos_penalty if cfg.missing_eos == "subtract" else -cfg.missing_eos_penalty
    return torch.where(ended, scores, unended)


def group_baseline(rewards: Tensor, mask: Tensor, cfg: PPOConfig) -> Tensor:
    """Advantages [B, R] from rewards [B, R]: one number a response, its reward and KL against those of its group.

    The KL is in the sum that grpo divides by the group's deviation, so that beta weighs it against the score as ever.
    """
    kind: Any = cfg.advantage
    return group_advantages(rewards.sum(-1), cfg.group_size, kind=kind).unsqueeze(-1) * mask
