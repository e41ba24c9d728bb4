"""pairwise_loss against the Bradley-Terry formula."""

from __future__ import annotations

import math

import pytest
import torch
import truth
from torch.nn.functional import logsigmoid

import rlhf_kernels as rk


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _formula(chosen: float, rejected: float, margin: float = 0.0, label: float = 1.0) -> float:
    d = chosen - rejected - margin
    return label * _softplus(-d) + (1 - label) * _softplus(d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("margin", [None, 0.3, "tensor"])
@pytest.mark.parametrize("label", [None, 0.5, 0.9, "tensor"])
def test_values_and_gradients(dtype: torch.dtype, margin: float | str | None, label: float | str | None) -> None:
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = (4 * torch.randn(50, generator=generator).to(dtype) for _ in range(2))
    chosen.requires_grad_()
    rejected.requires_grad_()
    given_margin = torch.rand(50, generator=generator) if margin == "tensor" else margin
    given_label = torch.rand(50, generator=generator) if label == "tensor" else label
    margins = torch.as_tensor(0.0 if given_margin is None else given_margin, dtype=torch.float64).expand(50)
    labels = torch.as_tensor(1.0 if given_label is None else given_label, dtype=torch.float64).expand(50)

    losses = rk.pairwise_loss(chosen, rejected, margin=given_margin, label=given_label, reduction="none")
    assert losses.dtype == torch.float32
    tokens = (x.detach().double().tolist() for x in (chosen, rejected, margins, labels))
    expected = torch.tensor([_formula(*pair) for pair in zip(*tokens, strict=True)], dtype=torch.float64)
    d = chosen.detach().float() - rejected.detach().float() - margins.float()
    q = labels.float()
    plain = -q * logsigmoid(d) - (1 - q) * logsigmoid(-d)
    truth.assert_accurate(losses, expected, truth.max_error(plain, expected))

    mean = rk.pairwise_loss(chosen, rejected, margin=given_margin, label=given_label)
    assert mean.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    grad, rejected_grad = torch.autograd.grad(losses.sum(), [chosen, rejected])
    exact_d = chosen.detach().double() - rejected.detach().double() - margins
    slope = torch.sigmoid(exact_d) - labels
    truth.assert_accurate(grad, slope, truth.max_error((torch.sigmoid(d) - q).to(dtype), slope))
    assert torch.equal(grad, -rejected_grad)


def test_known_values() -> None:
    losses = rk.pairwise_loss(torch.tensor([0.0, 5.0, 0.0]), torch.tensor([10.0, 0.0, 0.0]), reduction="none")
    expected = torch.tensor([10.000045, 0.0067153, 0.6931472])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_a_tie_pulls_both_ways_alike() -> None:
    chosen = torch.tensor([2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(rk.pairwise_loss(chosen, torch.tensor([2.0]), label=0.5), chosen)
    assert grad.item() == 0


@pytest.mark.parametrize("gap", [1e4, -1e4, 3e38, -3e38])
def test_extreme_gaps_are_finite(gap: float) -> None:
    chosen = torch.tensor([gap], requires_grad=True)
    for label in (None, 0.5):
        loss = rk.pairwise_loss(chosen, torch.zeros(1), label=label)
        (grad,) = torch.autograd.grad(loss, chosen)
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_no_pairs() -> None:
    empty = torch.empty(0, requires_grad=True)
    loss = rk.pairwise_loss(empty, torch.empty(0))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, empty)[0].shape == (0,)
    assert rk.pairwise_loss(empty, torch.empty(0), reduction="none").shape == (0,)
