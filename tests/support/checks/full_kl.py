"""One call of full_kl in each direction against float64."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import truth
from support.backends import Backend

DIRECTIONS = ["reverse", "forward", "jsd"]


def upstream(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def run(backend: Backend, logits: Tensor, ref: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The divergence and the gradient of the logits for upstream's, on the CPU."""
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    x = logits.to(backend.device).requires_grad_()
    kl = rk.full_kl(x, ref.to(backend.device), **moved)
    (grad,) = torch.autograd.grad(kl, x, upstream(kl.shape).to(backend.device))
    assert kl.dtype == torch.float32
    assert grad.dtype == logits.dtype
    return kl.detach().cpu(), grad.cpu()


def check(
    backend: Backend,
    logits: Tensor,
    ref: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    directions: list[str] = DIRECTIONS,
) -> None:
    """Values and gradients of one call a direction against truth, masked rows exactly 0, the inputs unchanged."""
    before = logits.clone(), ref.clone()
    shape = logits.shape[:-1]
    counted = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    x, y, g = logits[counted].contiguous(), ref[counted].contiguous(), upstream(shape)[counted]
    per_row = temperature.expand(shape)[counted] if isinstance(temperature, Tensor) else temperature
    for direction in directions:
        kl, grad = run(backend, logits, ref, mask=mask, temperature=temperature, direction=direction)
        assert (kl[~counted] == 0).all()
        assert (grad[~counted] == 0).all()
        expected = truth.full_kl(x, y, per_row, direction, g)
        plain = truth.plain_kl_errors(x, y, per_row, direction, g)
        truth.assert_accurate(kl[counted], expected[0], plain[0])
        truncates = backend.interpreted and logits.dtype == torch.bfloat16
        truth.assert_accurate(grad[counted], expected[1], plain[1], truncates=truncates)
    for now, then in zip((logits, ref), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
