"""linear_kl against float64 on explicit logits: directions, heads, masks, workspaces, no gradient of the reference."""

from __future__ import annotations

import math

import edge_cases
import pytest
import torch
import truth
from conftest import Backend
from linear_truth import Case, chain, logits_and_slope, plain_logits
from test_linear import head
from torch import Tensor

import rlhf_kernels as rk

DIRECTIONS = ["reverse", "forward", "jsd"]


def truth_of(case: Case, other: Case, direction: str, g: Tensor) -> list[Tensor]:
    """KL, dH, dW, db in float64, the gradient by the textbook formulas."""
    (z, slope), (y, _) = logits_and_slope(case), logits_and_slope(other)
    log_p, log_q = (x / case.temperature for x in (z, y))
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if direction == "reverse":
        kl = (p * (log_p - log_q)).sum(-1)
        grad = p * (log_p - log_q - kl.unsqueeze(-1))
    elif direction == "forward":
        kl, grad = (q * (log_q - log_p)).sum(-1), p - q
    else:
        log_m = ((p + q) / 2).log()
        half = (p * (log_p - log_m)).sum(-1)
        kl = (half + (q * (log_q - log_m)).sum(-1)) / 2
        grad = p * (log_p - log_m - half.unsqueeze(-1)) / 2
    by_products = g.double().unsqueeze(-1) * grad / case.temperature * slope
    return [kl, *chain(case, by_products)]


def plain_errors(case: Case, other: Case, direction: str, g: Tensor) -> list[float]:
    """Largest errors of KL, dH, dW, db as people write them: heads as `plain_logits`, fp32 log_softmax, autograd."""
    worst = torch.zeros(4, dtype=torch.float64)
    for step in range(16):
        a, b = (x._replace(hidden=(x.hidden * (1 - step / 64)).to(x.hidden.dtype)) for x in (case, other))
        leaves = [x.clone().requires_grad_() for x in (a.hidden, a.weight, a.bias)]
        log_p = (plain_logits(*leaves, a).float() / a.temperature).log_softmax(-1)
        log_q = (plain_logits(b.hidden, b.weight, b.bias, b).float() / a.temperature).log_softmax(-1)
        if direction == "reverse":
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        elif direction == "forward":
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            kl = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
        found = [kl, *torch.autograd.grad(kl, leaves, g)]
        errors = [truth.max_error(x, y) for x, y in zip(found, truth_of(a, b, direction, g), strict=True)]
        worst = torch.maximum(worst, torch.tensor(errors, dtype=torch.float64))
    return worst.tolist()


def check(
    backend: Backend, case: Case, other: Case, direction: str, mask: Tensor | None = None, **options: object
) -> None:
    leaves = [x.to(backend.device).detach().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    constants = [x.to(backend.device).detach().requires_grad_() for x in (other.hidden, other.weight, other.bias)]
    kl = rk.linear_kl(
        *leaves[:2],
        *constants[:2],
        bias=leaves[2],
        ref_bias=constants[2],
        direction=direction,
        temperature=case.temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        logits_dtype=case.logits_dtype,
        mask=None if mask is None else mask.to(backend.device),
        **options,
    )
    g = torch.randn(kl.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad(kl, leaves + constants, g.to(backend.device), allow_unused=True)
    assert grads[3:] == (None, None, None)
    counted = torch.ones(kl.shape, dtype=torch.bool) if mask is None else mask
    assert (kl[~counted] == 0).all()
    assert (grads[0][~counted] == 0).all()
    rows = [x._replace(hidden=x.hidden[counted]) for x in (case, other)]
    expected = truth_of(*rows, direction, g[counted])
    plain = plain_errors(*rows, direction, g[counted])
    for i, (got, want) in enumerate(zip([kl[counted], grads[0][counted], *grads[1:3]], expected, strict=True)):
        truncates = backend.interpreted and i > 0 and case.hidden.dtype == torch.bfloat16
        truth.assert_accurate(got, want, plain[i], truncates=truncates)


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
