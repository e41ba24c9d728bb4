"""linear_logprobs under a frozen head: d logprob / d hidden formed in the forward, two GEMMs in all."""

from __future__ import annotations

import pytest
import torch
from support import edge_cases, linear_truth, truth
from support.backends import Backend
from support.checks.linear import DTYPES, SCALARS, head, noted_products, small
from support.checks.linear_unit import check, frozen
from support.linear_truth import Case

import rlhf_kernels as rk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 64, 100])
def test_sizes_and_chunks(backend: Backend, D: int, dtype: torch.dtype) -> None:
    for V in (1, 37, small(backend, 130, 1003)):
        check(backend, head(small(backend, 3, 19), D, V, dtype))
    for workspace in (0, 5_000):
        check(backend, head(5, D, small(backend, 70, 1003), dtype), workspace=workspace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [*SCALARS, {"temperature": torch.tensor([0.3, 1.7, 1.0]), "softcap": 4.0}], ids=str)
def test_options(backend: Backend, dtype: torch.dtype, options: dict) -> None:
    check(backend, head(3, 16, small(backend, 60, 300), dtype)._replace(**options), workspace=4_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_masks_over_rows_that_nobody_may_read(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    shape = torch.Size((3, 8))
    mask = edge_cases.MASKS[kind](shape)
    case = head(24, 8, 70, dtype)
    hidden, labels = edge_cases.spoil(case.hidden.view(*shape, 8), case.labels.view(shape), mask)
    for workspace in (3000, 64 << 20):
        check(backend, case._replace(hidden=hidden, labels=labels), mask, workspace=workspace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_almost_certain(kernel_backend: Backend, dtype: torch.dtype) -> None:
    """1 - p is 2 %: in the sum, p rounded to 16 bits would leave a tenth of that. Logits are exact here."""
    case = head(4, 16, 60, dtype)
    bias = torch.where(torch.arange(60) == 7, 8.0, 0.0).to(dtype)
    case = case._replace(hidden=torch.zeros_like(case.hidden), bias=bias, labels=torch.full((4,), 7))
    logprobs, hidden = frozen(kernel_backend, case)
    (found,) = torch.autograd.grad(logprobs.sum(), hidden)
    expected = linear_truth.logprobs(case, torch.ones(4), torch.zeros(4))[2]
    error = (found.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("columns", [slice(0, 45), slice(8, None)])
def test_vocabulary_masked_by_the_bias(backend: Backend, columns: slice) -> None:
    """Whole tiles of -inf before and after the others; a label there has logprob -inf and a finite gradient."""
    case = head(6, 16, 50)
    bias = case.bias.clone()
    bias[columns] = truth.NEG_INF
    open_tokens = bias.isfinite().nonzero().squeeze(-1)
    labels = open_tokens[torch.arange(6) % len(open_tokens)]
    for workspace in (0, 64 << 20):
        check(backend, case._replace(bias=bias, labels=labels), workspace=workspace)
        closed = case._replace(bias=bias, labels=torch.full((6,), int(bias.isinf().nonzero()[0])))
        logprobs, hidden = frozen(backend, closed, workspace=workspace)
        assert (logprobs == truth.NEG_INF).all()
        assert torch.autograd.grad(logprobs.sum(), hidden)[0].isfinite().all()


def test_very_negative_logits(backend: Backend) -> None:
    """A maximum that starts at 0, or a sum scaled by exp(1e4), would lose all of them."""
    for offset in (-1e4, -200.0, 1e4):
        case = head(4, 16, 131)
        check(backend, case._replace(bias=torch.full((131,), offset)), workspace=0)


def test_a_spoilt_row_stays_alone(kernel_backend: Backend) -> None:
    case = head(5, 8, 40)
    spoilt = case.hidden.clone()
    spoilt[2, 3] = truth.NEG_INF * 0
    logprobs, hidden = frozen(kernel_backend, case._replace(hidden=spoilt))
    (found,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    assert found.isnan().any(-1).tolist() == [False, False, True, False, False]
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], device=kernel_backend.device)
    assert torch.autograd.grad(logprobs, hidden, weights)[0].isfinite().all()  # nothing wants that row's


def test_layouts_of_hidden(backend: Backend) -> None:
    case = head(15, 8, 40)._replace(labels=head(15, 8, 40).labels.view(3, 5))
    for place in edge_cases.LAYOUTS.values():
        check(backend, case._replace(hidden=place(case.hidden.view(3, 5, 8))))
    for shape in ((0,), (0, 4), (3, 0)):
        check(backend, Case(torch.empty(*shape, 8), torch.ones(17, 8), torch.empty(shape, dtype=torch.int64)))


def test_two_gemms_and_none_in_the_backward(kernel_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    products = noted_products(monkeypatch)
    logprobs, hidden = frozen(kernel_backend, head(7, 8, 40))
    assert len(products) == 2
    torch.autograd.grad(logprobs.sum(), hidden)
    assert len(products) == 2
    products.clear()
    with torch.no_grad():
        frozen(kernel_backend, head(7, 8, 40))
    assert len(products) == 1


def test_a_retained_graph_can_be_used_again(kernel_backend: Backend) -> None:
    """Only a last backward writes over what the forward left."""
    for dtype in (torch.float32, torch.bfloat16):
        logprobs, hidden = frozen(kernel_backend, head(7, 8, 40, dtype))
        g = linear_truth.upstream(logprobs.shape)[0].to(logprobs.device)
        found = [torch.autograd.grad(logprobs, hidden, g, retain_graph=again)[0] for again in (True, True, False)]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        assert not torch.equal(found[0], torch.zeros_like(found[0]))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(logprobs, hidden, g)


@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_a_detached_entropy(backend: Backend, trained: str) -> None:
    """The entropy of any other call, as a statistic; what is differentiated is the logprob alone."""
    case = head(6, 8, 40, bias=False)
    found = []
    for with_entropy in (True, "detached"):
        leaves = [case.hidden, case.weight]
        leaves = [x.to(backend.device).detach().requires_grad_(i < len(trained.split())) for i, x in enumerate(leaves)]
        logprobs, entropy = rk.linear_logprobs(*leaves, case.labels.to(backend.device), with_entropy=with_entropy)
        assert entropy.requires_grad == (with_entropy is True)
        grads = torch.autograd.grad(logprobs.sum(), [x for x in leaves if x.requires_grad])
        found.append((logprobs, entropy, *grads))
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert torch.equal(a, b) if i < 2 else torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="with_entropy is 'no'; it takes False, True, 'detached'"):
        rk.linear_logprobs(*leaves, case.labels.to(backend.device), with_entropy="no")


def test_losses_from_logprobs_take_it(kernel_backend: Backend) -> None:
    """DPO and the sequence ratio differentiate logprobs, so that they gain it too, with the trained head's result."""
    case, device = head(8, 8, 40, bias=False), kernel_backend.device
    labels, old = case.labels.view(2, 4).to(device), torch.full((2, 4), -3.5, device=device)
    found = []
    for head_trained in (False, True):
        hidden = case.hidden.view(2, 4, 8).to(device).detach().requires_grad_()
        weight = case.weight.to(device).detach().requires_grad_(head_trained)
        loss, _ = rk.linear_policy_loss(hidden, weight, labels, old, -old, ratio="sequence", clip_high=9.0)
        dpo = rk.linear_dpo_loss(hidden[:1], hidden[1:], weight, labels[:1], labels[1:], old[:1, 0], old[1:, 0])[0]
        found.append(torch.autograd.grad(loss + dpo.mean(), hidden)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0].abs().max() > 1e-3
