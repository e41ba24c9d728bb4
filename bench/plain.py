"""Every op as frameworks write it in eager PyTorch: what speed and accuracy are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def logprobs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def full_kl(logits: Tensor, ref_logits: Tensor, direction: str) -> Tensor:
    log_p, log_q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    if direction == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if direction == "forward":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (0.5 * (p + q)).log()
    return 0.5 * ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1))


def per_token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    d = logprobs - ref_logprobs
    return {"k1": lambda: d, "k2": lambda: 0.5 * d * d, "k3": lambda: torch.exp(-d) - 1 + d}[estimator]()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(logprobs - old_logprobs)
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return masked_mean(losses, mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The per-step loop of verl, masked holes skipped."""
    keep = mask.to(values.dtype)
    next_value = running = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        step = delta + gamma * lam * running
        next_value = values[:, t] * keep[:, t] + (1 - keep[:, t]) * next_value
        running = step * keep[:, t] + (1 - keep[:, t]) * running
        advantages.append(running)
    stacked = torch.stack(advantages[::-1], 1)
    return stacked * keep, (stacked + values) * keep


def ppo_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kl = (logprobs - ref_logprobs) * mask
    rewards = -kl_coef * kl
    last = mask.long().cumsum(1).argmax(1)
    rewards[torch.arange(len(rewards)), last] += scores * mask.any(1)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return whiten(advantages, mask), returns, kl


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    return -logsigmoid(beta * ((policy_chosen - policy_rejected) - (ref_chosen - ref_rejected))).mean()
