"""One call of selected_logprobs against float64."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import truth
from support.backends import Backend


def upstream(shape: torch.Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def run(backend: Backend, logits: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and the gradient of the logits for upstream's gradients, all on the CPU."""
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    x = logits.to(backend.device).requires_grad_()
    logprobs, entropy = rk.selected_logprobs(x, labels.to(backend.device), with_entropy=True, **moved)
    g, g_entropy = (grad.to(backend.device) for grad in upstream(labels.shape))
    (grad,) = torch.autograd.grad([logprobs, entropy], x, [g, g_entropy])
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert grad.dtype == logits.dtype
    return logprobs.detach().cpu(), entropy.detach().cpu(), grad.cpu()


def check(
    backend: Backend,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> None:
    """Values and gradients of one call against truth, masked rows exactly 0, the caller's logits unchanged."""
    before = logits.clone()
    got = run(backend, logits, labels, mask=mask, temperature=temperature)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)

    counted = torch.ones(labels.shape, dtype=torch.bool) if mask is None else mask
    for tensor in got:
        assert (tensor[~counted] == 0).all()
    x, chosen = logits[counted].contiguous(), labels[counted]
    per_row = temperature.expand(labels.shape)[counted] if isinstance(temperature, Tensor) else temperature
    g, g_entropy = (grad[counted] for grad in upstream(labels.shape))
    expected = truth.selected_logprobs(x, chosen, per_row, g, g_entropy)
    plain = truth.plain_logprobs_errors(x, chosen, per_row, g, g_entropy)
    for i in range(3):
        truncates = backend.interpreted and i == 2 and logits.dtype == torch.bfloat16
        truth.assert_accurate(got[i][counted], expected[i], plain[i], truncates=truncates)
