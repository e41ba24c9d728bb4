"""The linear family against the GEMMs it cannot do without, eager code, and torch's own chunked cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Comparison, Contender, compare
from torch import Tensor

import rlhf_kernels as rk

ROWS, WIDTH, VOCAB = 1024, 1024, 50257  # a GPT-2 vocabulary: 105 GFLOP a GEMM
OURS = "rlhf_kernels"


def _case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden and weight as leaves, labels, upstream gradient, a mask with a quarter of the rows."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(VOCAB, WIDTH, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden, weight, labels, torch.randn(ROWS, generator=generator), torch.arange(ROWS) % 4 == 0


def linear(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    """Forward and backward of one call; every contender makes its own outputs, as training does.

    Each after an untimed call of its own: what another has freed just before decides how fast fresh pages come.
    """
    hidden, weight, labels, upstream, mask = _case(dtype)
    leaves = (hidden, weight)
    h, w = hidden.detach(), weight.detach()

    def gemms(count: int) -> tuple[Tensor, ...]:
        logits = h @ w.T
        found = logits, logits.T @ h, logits @ w
        return (*found, h @ w.T) if count == 4 else found

    def policy(**options: Tensor) -> tuple[Tensor, ...]:
        loss, _ = rk.linear_policy_loss(
            hidden, weight, labels, upstream - 11, upstream, clip_low=1e9, clip_high=1e9, **options
        )
        return torch.autograd.grad(loss, leaves)

    def logprobs(**options: object) -> tuple[Tensor, ...]:
        return torch.autograd.grad(rk.linear_logprobs(hidden, weight, labels, **options), leaves, upstream)

    def eager() -> tuple[Tensor, ...]:
        found = (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        return torch.autograd.grad(found, leaves, upstream)

    calls: dict[str, Callable[[], object]] = {
        "three GEMMs": lambda: gemms(3),
        "four GEMMs": lambda: gemms(4),
        "eager logprobs": eager,
        f"{OURS} linear_policy_loss": policy,
        f"{OURS} linear_policy_loss, 25 % counted": lambda: policy(mask=mask),
        f"{OURS} linear_logprobs": logprobs,
        f"{OURS} linear_logprobs, 25 % counted": lambda: logprobs(mask=mask),
        f"{OURS} linear_logprobs, batch-invariant": lambda: logprobs(batch_invariant=True),
        f"{OURS} linear_cross_entropy": lambda: torch.autograd.grad(
            rk.linear_cross_entropy(hidden, weight, labels), leaves
        ),
    }
    theirs = getattr(torch.nn.functional, "linear_cross_entropy", None)  # torch 2.13
    if theirs:
        calls["F.linear_cross_entropy"] = lambda: torch.autograd.grad(theirs(hidden, weight, labels), leaves)
    result = compare({name: Contender(call, prepare=call) for name, call in calls.items()}, rounds, quiet=quiet)
    three, m = result.median("three GEMMs"), result.median
    for op in ("linear_policy_loss", "linear_logprobs", "linear_cross_entropy"):
        result.ratios[f"{op} / three GEMMs"] = m(f"{OURS} {op}") / three
    for op in ("linear_policy_loss", "linear_logprobs"):
        result.ratios[f"{op}, 25 % counted / all"] = m(f"{OURS} {op}, 25 % counted") / m(f"{OURS} {op}")
    result.ratios["eager / linear_logprobs"] = m("eager logprobs") / m(f"{OURS} linear_logprobs")
    result.ratios["batch-invariant / not"] = m(f"{OURS} linear_logprobs, batch-invariant") / m(
        f"{OURS} linear_logprobs"
    )
    if theirs:
        result.ratios["F.linear_cross_entropy / ours"] = m("F.linear_cross_entropy") / m(f"{OURS} linear_cross_entropy")
    return result


def frozen_head(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    """linear_logprobs where hidden alone wants a gradient, as under LoRA."""
    hidden, weight, labels, upstream, _ = _case(dtype)
    h, w = hidden.detach(), weight.detach()

    def logprobs(with_entropy: bool) -> tuple[Tensor, ...]:
        found = rk.linear_logprobs(hidden, w, labels, with_entropy=with_entropy)
        return torch.autograd.grad(found[0] if with_entropy else found, hidden, upstream)

    def eager() -> tuple[Tensor, ...]:
        found = (hidden @ w.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        return torch.autograd.grad(found, hidden, upstream)

    ours, three = f"{OURS} linear_logprobs", f"{OURS} linear_logprobs, entropy differentiable"
    calls: dict[str, Callable[[], object]] = {
        "two GEMMs": lambda: h @ w.T @ w,
        "eager logprobs": eager,
        ours: lambda: logprobs(False),
        three: lambda: logprobs(True),
    }
    result = compare({name: Contender(call, prepare=call) for name, call in calls.items()}, rounds, quiet=quiet)
    result.ratios["linear_logprobs / two GEMMs"] = result.median(ours) / result.median("two GEMMs")
    result.ratios["eager / linear_logprobs"] = result.median("eager logprobs") / result.median(ours)
    result.ratios["entropy differentiable / not"] = result.median(three) / result.median(ours)
    return result
