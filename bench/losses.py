"""policy_loss and value_loss, forward and backward, beside what verl writes with the same statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Comparison, Contender, compare
from torch import Tensor

import rlhf_kernels as rk

OURS = "rlhf_kernels"
SHAPE = (64, 1024)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def policy(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """verl's clipped loss: ratio and dual clip, approximate KL and two clip fractions."""
    keep = mask.to(logprobs.dtype)
    log_ratio = (logprobs - old).clamp(-20, 20)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    larger = torch.maximum(unclipped, clipped)
    bound = -advantages * 3.0
    losses = torch.where(advantages < 0, torch.min(bound, larger), larger)
    fractions = clipped > unclipped, (larger > bound) & (advantages < 0)
    return (
        _masked_mean(losses, keep),
        _masked_mean(-log_ratio, keep),
        *(_masked_mean(x.to(ratio.dtype), keep) for x in fractions),
    )


def value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    keep = mask.to(values.dtype)
    clipped = torch.clamp(values, old - 0.2, old + 0.2)
    squared, squared_clipped = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * _masked_mean(torch.max(squared, squared_clipped), keep)
    return loss, _masked_mean((squared_clipped > squared).to(values.dtype), keep)


def contenders() -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    new, noise, advantages, values = (torch.randn(SHAPE, generator=generator) for _ in range(4))
    old = new + 0.1 * noise
    mask = torch.arange(SHAPE[1]) < torch.randint(SHAPE[1] // 2, SHAPE[1] + 1, (SHAPE[0], 1), generator=generator)
    new.requires_grad_(), values.requires_grad_()

    def step(policy_loss: Callable[..., tuple], value_loss: Callable[..., tuple]) -> Callable[[], object]:
        return lambda: (
            torch.autograd.grad(policy_loss(new, old, advantages, mask)[0], new),
            torch.autograd.grad(value_loss(values, old, advantages, mask)[0], values),
        )

    return {
        "eager": step(policy, value),
        "compiled": step(torch.compile(policy, dynamic=False), torch.compile(value, dynamic=False)),
        OURS: step(lambda *tensors: rk.policy_loss(*tensors, dual_clip=3.0), rk.value_loss),
    }


def losses(rounds: int, quiet: float) -> Comparison:
    result = compare({name: Contender(call) for name, call in contenders().items()}, rounds, calls=20, quiet=quiet)
    result.ratios = {f"faster than {name}": result.median(name) / result.median(OURS) for name in ("eager", "compiled")}
    return result
