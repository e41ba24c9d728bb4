"""linear_kl against float64 on explicit logits: directions, heads, masks, workspaces, no gradient of the reference."""

from __future__ import annotations

import pytest
import torch
from support import edge_cases
from support.backends import Backend
from support.checks.linear import head
from support.checks.linear_kl import DIRECTIONS, check, truth_of

import rlhf_kernels as rk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_models_of_different_width(backend: Backend, direction: str, dtype: torch.dtype) -> None:
    case, other = head(7, 16, 60, dtype), head(7, 12, 60, dtype, seed=1)
    for workspace in (0, 1500, 64 << 20):
        check(backend, case, other, direction, workspace=workspace)


@pytest.mark.parametrize("D", [1, 64, 100])
def test_sizes(backend: Backend, D: int) -> None:
    for V in (1, 37, 60 if backend.interpreted else 1003):
        check(backend, head(5, D, V), head(5, D, V, seed=1), "forward", workspace=1500)


def test_tokens_that_a_bias_closes(backend: Backend) -> None:
    """-inf by bias on both sides: probability 0 in both policies, no part in the divergence."""
    case, other = head(5, 16, 60), head(5, 16, 60, seed=1)
    closed = torch.arange(60) % 3 == 1
    pair = [x._replace(bias=x.bias.masked_fill(closed, float("-inf"))) for x in (case, other)]
    leaves = [x.to(backend.device).requires_grad_() for x in (pair[0].hidden, pair[0].weight, pair[0].bias)]
    constants = [x.to(backend.device) for x in (other.hidden, other.weight)]
    options = {"bias": leaves[2], "ref_bias": pair[1].bias.to(backend.device)}
    opened = [x._replace(weight=x.weight[~closed], bias=x.bias[~closed]) for x in (case, other)]
    for direction in DIRECTIONS:
        kl = rk.linear_kl(*leaves[:2], *constants, direction=direction, **options)
        grads = torch.autograd.grad(kl.sum(), leaves)
        expected = truth_of(*opened, direction, torch.ones(5))
        assert (grads[1].cpu()[closed] == 0).all()
        assert (grads[2].cpu()[closed] == 0).all()
        found = [kl.detach().cpu(), grads[0].cpu(), grads[1].cpu()[~closed], grads[2].cpu()[~closed]]
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


def test_no_rows(backend: Backend) -> None:
    leaves = [torch.ones(shape, device=backend.device, requires_grad=True) for shape in ((0, 3, 8), (17, 8))]
    for direction in DIRECTIONS:
        kl = rk.linear_kl(*leaves, *(x.detach() for x in leaves), direction=direction)
        assert kl.shape == (0, 3)
        assert all((x == 0).all() for x in torch.autograd.grad(kl.sum(), leaves))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", [{"softcap": 3.0, "logit_scale": 0.6}, {"temperature": 0.7, "logit_scale": 1.5}])
def test_scalars(backend: Backend, direction: str, options: dict) -> None:
    case, other = head(5, 16, 60), head(5, 16, 60, seed=1)
    check(backend, case._replace(**options), other._replace(**options), direction, workspace=1500)


@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_masks(backend: Backend, kind: str) -> None:
    shape = torch.Size((3, 4))
    mask = edge_cases.MASKS[kind](shape)
    case, other = head(12, 8, 40), head(12, 8, 40, seed=1)
    hidden = [edge_cases.spoil(x.hidden.view(3, 4, 8), x.labels.view(3, 4), mask)[0] for x in (case, other)]
    check(backend, case._replace(hidden=hidden[0]), other._replace(hidden=hidden[1]), "reverse", mask, workspace=1000)


def test_equal_heads_are_exactly_zero(backend: Backend) -> None:
    case = head(5, 8, 40, bias=False)
    hidden, weight = case.hidden.to(backend.device), case.weight.to(backend.device)
    for direction in DIRECTIONS:
        assert (rk.linear_kl(hidden, weight, hidden, weight, direction=direction) == 0).all()


def test_errors_name_the_argument() -> None:
    hidden, weight = torch.zeros(4, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match="linear_kl: direction is 'sideways'"):
        rk.linear_kl(hidden, weight, hidden, weight, direction="sideways")
    with pytest.raises(ValueError, match=r"linear_kl: ref_hidden is \[3, 3\]"):
        rk.linear_kl(hidden, weight, hidden[:3], weight)
    with pytest.raises(ValueError, match="linear_kl: ref_weight is"):
        rk.linear_kl(hidden, weight, hidden, torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"linear_kl \(reference\): weight has shape"):
        rk.linear_kl(hidden, weight, hidden, torch.zeros(5, 4))
