"""Gradients on a bound: 1 up to the bound itself and 0 beyond it, whatever torch.clamp says of its own."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import Backend
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.reference.common import clamp

BEYOND = math.nextafter(20.0, math.inf) * (1 + 1e-6)  # of the bound of exponents, a float32 step away


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_clamp(kind: str) -> None:
    x = torch.tensor([-3.0, -2.0, -1.0, 0.5, 1.0, 1.5, math.inf, -math.inf, math.nan], requires_grad=True)
    low, high = (-2.0, 1.0) if kind == "number" else (torch.full((9,), -2.0), torch.full((9,), 1.0))
    y = clamp(x, low, high)
    torch.testing.assert_close(y, x.detach().clamp(-2, 1), equal_nan=True)
    (grad,) = torch.autograd.grad(y.nansum(), x)
    assert grad.tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0]


def _gradient(loss: Tensor, x: Tensor) -> list[float]:
    return torch.autograd.grad(loss, x)[0].tolist()


@pytest.mark.parametrize(("log_ratio", "slope"), [(20.0, 1), (-20.0, 1), (BEYOND, 0), (-BEYOND, 0)])
def test_ratio_on_the_bound_of_its_exponent(backend: Backend, log_ratio: float, slope: int) -> None:
    """With clips so wide that only the exponent's own bound is met."""
    x = torch.tensor([[log_ratio]], device=backend.device, requires_grad=True)
    zero, one = (torch.full((1, 1), value, device=backend.device) for value in (0.0, 1.0))
    loss, _ = rk.policy_loss(x, zero, one, clip_low=1.0, clip_high=1e12)
    assert _gradient(loss, x)[0] == pytest.approx([-math.exp(min(max(log_ratio, -20), 20)) * slope])


@pytest.mark.parametrize(("log_ratio", "slope"), [(-20.0, 1), (-BEYOND, 0)])
def test_k3_on_the_bound_of_its_exponent(backend: Backend, log_ratio: float, slope: int) -> None:
    x = torch.tensor([log_ratio], device=backend.device, requires_grad=True)
    kl = rk.per_token_kl(x, torch.zeros_like(x).detach(), estimator="k3")
    assert _gradient(kl.sum(), x) == pytest.approx([1 - slope * math.exp(min(-log_ratio, 20))])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_on_the_clip_is_not_clipped(backend: Backend, advantage: float) -> None:
    x = torch.zeros(1, 2, device=backend.device, requires_grad=True)
    loss, stats = rk.policy_loss(
        x, torch.zeros_like(x).detach(), torch.full_like(x, advantage).detach(), clip_low=0.0, clip_high=0.0
    )
    assert _gradient(loss, x) == [[-advantage / 2, -advantage / 2]]
    assert stats["clip_fraction_low"] == stats["clip_fraction_high"] == 0


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_value_on_the_clip_is_not_clipped(backend: Backend, clip: float) -> None:
    """Integers, so that the value stands on the bound exactly."""
    x = torch.tensor([[2.0, 2.0]], device=backend.device, requires_grad=True)
    old, returns = x.detach() - torch.tensor([[clip, -clip]], device=backend.device), torch.zeros_like(x).detach()
    loss, stats = rk.value_loss(x, old, returns, clip=clip)
    assert _gradient(loss, x) == [[1.0, 1.0]]
    assert stats["clip_fraction"] == 0
