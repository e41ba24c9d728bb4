"""The linear family against the GEMMs it cannot do without, eager code, and torch's own chunked cross-entropy.

On a CPU without 16-bit arithmetic a 16-bit product takes torch minutes at these sizes. There the bare GEMMs are of
float32 copies, made outside the clock, and torch's own code is compared at a few rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Comparison, Contender, compare
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch

ROWS, WIDTH, VOCAB = 1024, 1024, 50257  # a GPT-2 vocabulary: 105 GFLOP a GEMM
FEW = 64  # rows, for what takes minutes with all
OURS = "rlhf_kernels"


def widened(dtype: torch.dtype) -> bool:
    """Whether this CPU has no arithmetic for it."""
    return dispatch.backend_module("cpu").logits_dtype(dtype, False) != dtype


def _case(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden and weight as leaves, labels, upstream gradient, a mask with a quarter of the rows."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(VOCAB, WIDTH, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (rows,), generator=generator)
    return hidden, weight, labels, torch.randn(rows, generator=generator), torch.arange(rows) % 4 == 0


def _torchs_own(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward for those of hidden and weight that want a gradient; the second is of torch 2.13."""
    leaves = [x for x in (hidden, weight) if x.requires_grad]

    def eager() -> tuple[Tensor, ...]:
        found = (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        return torch.autograd.grad(found, leaves, upstream)

    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {"eager logprobs": eager}
    if fused:
        calls["F.linear_cross_entropy"] = lambda: torch.autograd.grad(fused(hidden, weight, labels), leaves)
    return calls


def _compared(calls: dict[str, Callable[[], object]], rounds: int, quiet: float) -> Comparison:
    """Each after an untimed call of its own: what another has freed just before decides how fast fresh pages come."""
    return compare({name: Contender(call, prepare=call) for name, call in calls.items()}, rounds, quiet=quiet)


def _against_torch(result: Comparison) -> None:
    pairs = {"eager logprobs": "linear_logprobs", "F.linear_cross_entropy": "linear_cross_entropy"}
    for theirs, ours in pairs.items():
        if theirs in result.timings and f"{OURS} {ours}" in result.timings:
            name = f"{theirs.removesuffix(' logprobs')} / {ours}"
            result.ratios[name] = result.median(theirs) / result.median(f"{OURS} {ours}")


def linear(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    """Forward and backward of one call; every contender makes its own outputs, as training does."""
    hidden, weight, labels, upstream, mask = _case(dtype)
    leaves = (hidden, weight)
    h, w = (x.detach().to(dispatch.backend_module("cpu").logits_dtype(dtype, False)) for x in leaves)

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

    calls: dict[str, Callable[[], object]] = {
        "three GEMMs": lambda: gemms(3),
        "four GEMMs": lambda: gemms(4),
        f"{OURS} linear_policy_loss": policy,
        f"{OURS} linear_policy_loss, 25 % counted": lambda: policy(mask=mask),
        f"{OURS} linear_logprobs": logprobs,
        f"{OURS} linear_logprobs, 25 % counted": lambda: logprobs(mask=mask),
        f"{OURS} linear_logprobs, logits_dtype=None": lambda: logprobs(logits_dtype=None),
        f"{OURS} linear_logprobs, batch-invariant": lambda: logprobs(batch_invariant=True),
        f"{OURS} linear_cross_entropy": lambda: torch.autograd.grad(
            rk.linear_cross_entropy(hidden, weight, labels), leaves
        ),
    }
    if not widened(dtype):
        calls |= _torchs_own(hidden, weight, labels, upstream)
    result = _compared(calls, rounds, quiet)
    three, m = result.median("three GEMMs"), result.median
    for op in ("linear_policy_loss", "linear_logprobs", "linear_cross_entropy"):
        result.ratios[f"{op} / three GEMMs"] = m(f"{OURS} {op}") / three
    for op in ("linear_policy_loss", "linear_logprobs"):
        result.ratios[f"{op}, 25 % counted / all"] = m(f"{OURS} {op}, 25 % counted") / m(f"{OURS} {op}")
    exact, rounded = m(f"{OURS} linear_logprobs"), m(f"{OURS} linear_logprobs, logits_dtype=None")
    result.ratios["linear_logprobs, float32 logits / logits_dtype=None"] = exact / rounded
    _against_torch(result)
    result.ratios["batch-invariant / not"] = m(f"{OURS} linear_logprobs, batch-invariant") / m(
        f"{OURS} linear_logprobs"
    )
    return result


def few_rows(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    """Forward and backward beside torch's own code, where all rows would take that minutes."""
    hidden, weight, labels, upstream, _ = _case(dtype, FEW)
    leaves = (hidden, weight)
    calls: dict[str, Callable[[], object]] = {
        f"{OURS} linear_logprobs": lambda: torch.autograd.grad(
            rk.linear_logprobs(hidden, weight, labels), leaves, upstream
        ),
        f"{OURS} linear_cross_entropy": lambda: torch.autograd.grad(
            rk.linear_cross_entropy(hidden, weight, labels), leaves
        ),
    }
    result = _compared(calls | _torchs_own(hidden, weight, labels, upstream), rounds, quiet)
    _against_torch(result)
    return result


def frozen_head(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    """linear_logprobs where hidden alone wants a gradient, as under LoRA."""
    hidden, weight, labels, upstream, _ = _case(dtype)
    h, w = (x.detach().to(dispatch.backend_module("cpu").logits_dtype(dtype, False)) for x in (hidden, weight))
    weight.requires_grad_(False)

    def logprobs(with_entropy: bool) -> tuple[Tensor, ...]:
        found = rk.linear_logprobs(hidden, weight, labels, with_entropy=with_entropy)
        return torch.autograd.grad(found[0] if with_entropy else found, hidden, upstream)

    ours, three = f"{OURS} linear_logprobs", f"{OURS} linear_logprobs, entropy differentiable"
    calls: dict[str, Callable[[], object]] = {
        "two GEMMs": lambda: h @ w.T @ w,
        ours: lambda: logprobs(False),
        three: lambda: logprobs(True),
    }
    if not widened(dtype):
        calls["eager logprobs"] = _torchs_own(hidden, weight, labels, upstream)["eager logprobs"]
    result = _compared(calls, rounds, quiet)
    result.ratios["linear_logprobs / two GEMMs"] = result.median(ours) / result.median("two GEMMs")
    _against_torch(result)
    result.ratios["entropy differentiable / not"] = result.median(three) / result.median(ours)
    return result
