"""Cases and plain formulations of the token family, for compare.py and test_tokens.py of this folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rlhf_kernels as rk

SHAPES = ((64, 1024), (512, 4096))
KL_COEF = 0.1


def kl_plain(logprobs: Tensor, ref: Tensor) -> Tensor:
    """k3 as TRL and verl write it; the clamp keeps exp finite."""
    d = logprobs - ref
    return torch.exp(torch.clamp(-d, -20, 20)) - 1 + d


def rewards_plain(scores: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    """The KL penalty, and the score at the last counted token of rows that are padded on the right."""
    rewards = -KL_COEF * kl * mask
    rewards[torch.arange(len(scores)), mask.sum(-1) - 1] += scores
    return rewards


def whiten_plain(x: Tensor, mask: Tensor) -> Tensor:
    """TRL's masked_whiten, with the population variance."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / count
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, ref_logprobs [B, T], mask [B, T] with padding on the right, scores [B]."""
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(shape, generator=generator) * 5
    ref = logprobs + 0.1 * torch.randn(shape, generator=generator)
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=generator)
    return logprobs, ref, torch.arange(shape[1]) < lengths, torch.randn(shape[0], generator=generator)


def _with_gradient(function: Callable[..., Tensor], upstream: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = function(leaf, *rest)
        return y.detach(), *torch.autograd.grad(y, leaf, upstream)

    return call


def contenders(op: str, shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Name -> call, for `op` one of OPS."""
    logprobs, ref, mask, scores = case(shape)
    kl = logprobs - ref
    ours: Callable[..., object]
    plain: Callable[..., object]
    if op.startswith("per_token_kl"):
        arguments: tuple[Tensor, ...] = (logprobs, ref)
        ours, plain = (lambda a, b: rk.per_token_kl(a, b, estimator="k3")), kl_plain
    elif op == "shaped_rewards":
        arguments = scores, kl, mask
        ours, plain = (lambda s, k, m: rk.shaped_rewards(s, k, m, kl_coef=KL_COEF)), rewards_plain
    else:
        arguments = logprobs, mask
        ours, plain = rk.whiten, whiten_plain
    compiled = torch.compile(plain, dynamic=False)
    named = {"eager": plain, "compiled": compiled, "rlhf_kernels": ours}
    if op.endswith("backward"):
        named = {name: _with_gradient(function, kl) for name, function in named.items()}
    return {name: lambda function=function: function(*arguments) for name, function in named.items()}


OPS = ("per_token_kl", "per_token_kl forward + backward", "shaped_rewards", "whiten", "whiten forward + backward")
