"""What the ops are measured against: plain formulations, torch.compile of them, other libraries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The size of the tables: 512 tokens over the vocabulary of Llama 3; 512 sequences of 1024 steps.
ROWS, VOCAB = 512, 128256
BATCH, TIME = 512, 1024
GAMMA, LAM, KL_COEF = 0.99, 0.95, 0.05


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, V], [N] -> [N] float32, the common way: a normalised copy of the logits, then one column of it."""
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def gather_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """The same without the copy of the logits, where they are float32."""
    z = logits.float()
    return z.gather(-1, labels[:, None])[:, 0] - z.logsumexp(-1)


def row_loop(logits: Tensor, labels: Tensor) -> Tensor:
    """TRL's way for 16-bit logits: one row at a time, so that only a row is ever upcast."""
    return torch.stack([log_softmax_gather(x[None], label[None])[0] for x, label in zip(logits, labels, strict=True)])


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_softmax + gather": log_softmax_gather,
    "gather - logsumexp": gather_logsumexp,
}


def compiled() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """torch.compile of every plain formulation; the tables quote the faster one of the day."""
    return {f"compiled {name}": torch.compile(f, dynamic=False) for name, f in PLAIN.items()}


def kl_by_log_softmax(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """[N, V], [N, V] -> KL(pi || ref) [N] float32, the common way: two normalised copies."""
    log_p, log_q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_by_logsumexp(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The same without the copies, where the logits are float32."""
    x, y = logits.float(), ref_logits.float()
    log_s, log_s_ref = x.logsumexp(-1, keepdim=True), y.logsumexp(-1, keepdim=True)
    return ((x - log_s).exp() * (x - y - log_s + log_s_ref)).sum(-1)


PLAIN_KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_softmax": kl_by_log_softmax,
    "logsumexp": kl_by_logsumexp,
}


def compiled_kl() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {f"compiled {name}": torch.compile(f, dynamic=False) for name, f in PLAIN_KL.items()}


def kl_case(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Half as many rows as logits_case, of two policies near each other."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS // 2, VOCAB, generator=generator)
    ref = logits + 0.3 * torch.randn(ROWS // 2, VOCAB, generator=generator)
    return logits.to(dtype), ref.to(dtype)


def gae_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T] -> advantages, returns: the per-step loop of verl, masked holes skipped."""
    keep = mask.to(values.dtype)
    next_value = running = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        step = delta + GAMMA * LAM * running
        next_value = values[:, t] * keep[:, t] + (1 - keep[:, t]) * next_value
        running = step * keep[:, t] + (1 - keep[:, t]) * running
        advantages.append(running)
    stacked = torch.stack(advantages[::-1], 1)
    return stacked * keep, (stacked + values) * keep


def trl_advantages(
    logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T], scores [B] -> advantages, returns, kl as TRL's PPOTrainer has it: masked fills, loop, masked_whiten."""
    hidden = ~mask
    kl = (logprobs - ref_logprobs).masked_fill(hidden, 0)
    values = values.masked_fill(hidden, 0)
    rewards = -KL_COEF * kl
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
    rewards[torch.arange(len(scores)), last] += scores
    running, advantages = 0, []
    for t in reversed(range(mask.shape[1])):
        next_value = values[:, t + 1] if t < mask.shape[1] - 1 else 0.0
        running = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * running
        advantages.append(running)
    stacked = torch.stack(advantages[::-1], 1)
    returns = stacked + values
    mean = (stacked * mask).sum() / mask.sum()
    variance = ((stacked - mean) ** 2 * mask).sum() / mask.sum()
    white = (stacked - mean) * torch.rsqrt(variance + 1e-8)
    return white.masked_fill(hidden, 0), returns.masked_fill(hidden, 0), kl


def torchrl_gae(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """torchrl's vectorised estimator, which knows no mask: only its time is compared where there is one."""
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    done = torch.zeros_like(rewards, dtype=torch.bool)
    columns = (x.unsqueeze(-1) for x in (values, following, rewards, done, done))
    advantages, returns = vec_generalized_advantage_estimate(GAMMA, LAM, *columns)
    return advantages[..., 0], returns[..., 0]


def logits_case(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits [ROWS, VOCAB], labels [ROWS]."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, VOCAB, generator=generator)).to(dtype)
    return logits, torch.randint(0, VOCAB, (ROWS,), generator=generator)


def gae_case() -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values [BATCH, TIME], mask with holes and padding."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(BATCH, TIME, generator=generator) for _ in range(2))
    lengths = torch.randint(TIME // 2, TIME + 1, (BATCH, 1), generator=generator)
    mask = (torch.rand(BATCH, TIME, generator=generator) > 0.1) & (torch.arange(TIME) < lengths)
    return rewards, values, mask


def ragged_case() -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values [total] of BATCH sequences of TIME / 2 positions in the mean and a heavy tail, cu_seqlens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(BATCH, generator=generator).exp()
    lengths = (lengths / lengths.sum() * BATCH * TIME / 2).long()
    rewards, values = (torch.randn(int(lengths.sum()), generator=generator) for _ in range(2))
    return rewards, values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def rollout_case(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, ref_logprobs [batch, TIME], scores [batch], values, mask (right padding) [batch, TIME]."""
    generator = torch.Generator().manual_seed(0)
    logprobs, drift, values = (torch.randn(batch, TIME, generator=generator) for _ in range(3))
    lengths = torch.randint(TIME // 2, TIME + 1, (batch, 1), generator=generator)
    scores = torch.randn(batch, generator=generator)
    return logprobs, logprobs - 0.1 * drift, scores, values, torch.arange(TIME) < lengths
