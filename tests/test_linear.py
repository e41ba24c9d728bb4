"""linear_logprobs against float64 on explicit logits, on every backend: shapes, heads, masks, chunks, edge cases."""

from __future__ import annotations

import pytest
import torch
from support import edge_cases, linear_truth, truth
from support.backends import Backend
from support.checks.linear import (
    DTYPES,
    SCALARS,
    check,
    check_logits_in_the_memory_of_the_weight_gradient,
    head,
    noted_products,
    run,
    small,
)
from support.linear_truth import Case
from torch import Tensor

import rlhf_kernels as rk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 64, 100])
def test_sizes(backend: Backend, D: int, dtype: torch.dtype) -> None:
    for V in (1, 37, small(backend, 130, 1003)):
        check(backend, head(small(backend, 3, 19), D, V, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SCALARS, ids=str)
def test_scalars(backend: Backend, dtype: torch.dtype, options: dict) -> None:
    check(backend, head(small(backend, 3, 9), 16, small(backend, 60, 300), dtype)._replace(**options))


def test_temperature_per_row(backend: Backend) -> None:
    case = head(6, 16, 60)
    shaped = case._replace(hidden=case.hidden.view(2, 3, 16), labels=case.labels.view(2, 3))
    for temperature in (torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[0.3], [1.7]]), torch.tensor(0.9)):
        flat = temperature.expand(2, 3).reshape(-1)
        got = run(backend, shaped._replace(temperature=temperature))
        expected = run(backend, case._replace(temperature=flat))
        upstream_differs = got[0].flatten(), expected[0]
        torch.testing.assert_close(*upstream_differs)
        check(backend, case._replace(temperature=flat, softcap=4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_masks_over_rows_that_nobody_may_read(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    shape = torch.Size((3, 8))
    mask = edge_cases.MASKS[kind](shape)
    case = head(24, 8, 70, dtype)
    hidden, labels = edge_cases.spoil(case.hidden.view(*shape, 8), case.labels.view(shape), mask)
    check(backend, case._replace(hidden=hidden, labels=labels), mask)
    check(backend, case._replace(hidden=hidden, labels=labels), mask, workspace=3000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [0, 5_000, 64 << 20])
def test_any_workspace(backend: Backend, workspace: int, dtype: torch.dtype) -> None:
    check(backend, head(small(backend, 5, 40), 32, small(backend, 60, 333), dtype), workspace=workspace)
    check(backend, head(5, 32, 60, dtype)._replace(softcap=5.0), workspace=workspace)


@pytest.mark.parametrize("columns", [slice(0, 45), slice(8, None)])
def test_vocabulary_masked_by_the_bias(backend: Backend, columns: slice) -> None:
    """-inf by bias: probability 0, no gradient; its label's logprob is -inf."""
    case = head(6, 16, 50)
    bias = case.bias.clone()
    bias[columns] = truth.NEG_INF
    open_tokens = bias.isfinite().nonzero().squeeze(-1)
    check(backend, case._replace(bias=bias, labels=open_tokens[torch.arange(6) % len(open_tokens)]))
    closed = case._replace(bias=bias, labels=torch.full((6,), int(bias.isinf().nonzero()[0])))
    logprobs, entropy, dH, dW, db = run(backend, closed)
    assert (logprobs == truth.NEG_INF).all()
    for tensor in (entropy, dH, dW, db):
        assert tensor.isfinite().all()


def test_very_negative_logits(backend: Backend) -> None:
    """A row maximum that starts at 0 would lose every one of them."""
    for offset in (-1e4, -200.0, 1e4):
        case = head(4, 16, 131)
        check(backend, case._replace(bias=torch.full((131,), offset)))


def test_a_spoilt_row_stays_alone(backend: Backend) -> None:
    case = head(5, 8, 40)
    hidden = case.hidden.clone()
    hidden[2, 3] = truth.NEG_INF * 0
    logprobs, entropy, dH, _, _ = run(backend, case._replace(hidden=hidden))
    for tensor in (logprobs.unsqueeze(-1), entropy.unsqueeze(-1), dH):
        assert tensor.isnan().any(-1).tolist() == [False, False, True, False, False]


def test_layouts_of_hidden_and_weight(backend: Backend) -> None:
    case = head(15, 8, 40)
    hidden = case.hidden.view(3, 5, 8)
    labels = case.labels.view(3, 5)
    expected = run(backend, case._replace(hidden=hidden, labels=labels))
    for place in edge_cases.LAYOUTS.values():
        got = run(backend, case._replace(hidden=place(hidden), labels=labels))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    transposed = case.weight.T.contiguous().T
    for a, b in zip(run(backend, case._replace(weight=transposed)), run(backend, case), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 3, 2)])
def test_every_leading_shape(backend: Backend, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    case = head(count, 8, 40)
    check(backend, case._replace(hidden=case.hidden.view(*shape, 8), labels=case.labels.view(shape)))


@pytest.mark.parametrize("with_mask", [False, True])
def test_no_rows(backend: Backend, with_mask: bool) -> None:
    for shape in ((0,), (0, 4), (3, 0)):
        case = Case(torch.empty(*shape, 8), torch.ones(17, 8), torch.empty(shape, dtype=torch.int64), torch.ones(17))
        got = run(backend, case, torch.ones(shape, dtype=torch.bool) if with_mask else None)
        assert [tuple(t.shape) for t in got] == [shape, shape, (*shape, 8), (17, 8), (17,)]
        assert (got[3] == 0).all()
        assert (got[4] == 0).all()


def test_labels_of_both_widths_and_any_stride(backend: Backend) -> None:
    case = head(6, 8, 40)
    with_gaps = case.labels.repeat_interleave(2)[::2]
    expected = run(backend, case)
    for labels in (case.labels.int(), with_gaps, with_gaps.int()):
        for a, b in zip(run(backend, case._replace(labels=labels)), expected, strict=True):
            assert torch.equal(a, b)


def test_bad_labels_raise_and_name_the_first(backend: Backend) -> None:
    hidden, weight = torch.zeros(4, 3, device=backend.device), torch.zeros(5, 3, device=backend.device)
    for bad in (-1, 5, -100, 2**31 - 1):
        labels = torch.tensor([0, 7, bad, 4], device=backend.device)
        mask = torch.tensor([True, False, True, True], device=backend.device)
        if backend.device == "cuda":  # no sync: the row is NaN
            assert rk.linear_logprobs(hidden, weight, labels, mask=mask).isnan().tolist() == [False, False, True, False]
        else:
            with pytest.raises(IndexError, match=rf"{bad} at row 2.*\[0, 5\)"):
                rk.linear_logprobs(hidden, weight, labels, mask=mask)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "weight and bias"])
def test_no_gemm_for_a_gradient_nobody_asked_for(
    kernel_backend: Backend, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen head costs no weight gradient, a frozen backbone no hidden gradient.

    Seven rows fit the memory of the weight's gradient: where it is wanted, the logits are not made again.
    Where only hidden's is, the forward has formed it.
    """
    tensors, logprobs = _seven_rows(kernel_backend, wanted)
    products = noted_products(monkeypatch)
    torch.autograd.grad(logprobs.sum(), [x for x in tensors.values() if x.requires_grad])
    assert len(products) == {"hidden": 0, "weight": 1, "bias": 1, "weight and bias": 1}[wanted]


def _seven_rows(backend: Backend, wanted: str, rows: int = 7) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves of a head of width 8, those named in `wanted` with a gradient, and logprobs of seven of the rows."""
    case = head(rows, 8, 40)
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    tensors = {name: x.to(backend.device).requires_grad_(name in wanted) for name, x in tensors.items()}
    mask = (torch.arange(rows) * 7 % rows < 7).to(backend.device)
    labels = case.labels.to(backend.device)
    return tensors, rk.linear_logprobs(tensors["hidden"], tensors["weight"], labels, bias=tensors["bias"], mask=mask)


def test_rows_that_count_decide_whether_logits_are_kept(
    kernel_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven of 40 rows fit the memory of a gradient of width 8, nine do not; a retained graph reads them there too."""
    tensors, logprobs = _seven_rows(kernel_backend, "hidden weight", rows=40)
    leaves = [tensors["hidden"], tensors["weight"]]
    products = noted_products(monkeypatch)
    first = torch.autograd.grad(logprobs.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(logprobs.sum(), leaves, retain_graph=True)
    assert len(products) == 4
    last = torch.autograd.grad(logprobs.sum(), leaves)
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(logprobs.sum(), leaves)
    case = head(9, 8, 40, bias=False)
    leaves = [x.to(kernel_backend.device).requires_grad_() for x in (case.hidden, case.weight)]
    logprobs = rk.linear_logprobs(*leaves, case.labels.to(kernel_backend.device))
    products.clear()
    torch.autograd.grad(logprobs.sum(), leaves)
    assert len(products) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_kept_in_the_memory_of_the_weight_gradient(
    kernel_backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_logits_in_the_memory_of_the_weight_gradient(kernel_backend, dtype, monkeypatch)


def test_upstream_gradient_of_one_output(backend: Backend) -> None:
    case = head(5, 8, 40, bias=False)
    for which in (0, 1):
        leaves = [x.to(backend.device).requires_grad_() for x in (case.hidden, case.weight)]
        outputs = rk.linear_logprobs(*leaves, case.labels.to(backend.device), with_entropy=True)
        grads = torch.autograd.grad(outputs[which].sum(), leaves)
        weights = [torch.full((5,), float(which == i)) for i in (0, 1)]
        expected = linear_truth.logprobs(case, *weights)
        plain = linear_truth.plain_logprobs_errors(case, *weights)
        for i, grad in enumerate(grads):
            truth.assert_accurate(grad, expected[2 + i], plain[2 + i])


def test_errors_name_the_argument() -> None:
    hidden, weight, labels = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
    for message, error, call in (
        ("hidden is torch.int64", TypeError, lambda: rk.linear_logprobs(labels, weight, labels)),
        ("weight has shape", ValueError, lambda: rk.linear_logprobs(hidden, weight.T, labels)),
        ("weight is torch.bfloat16", TypeError, lambda: rk.linear_logprobs(hidden, weight.bfloat16(), labels)),
        ("bias has shape", ValueError, lambda: rk.linear_logprobs(hidden, weight, labels, bias=torch.zeros(4))),
        ("labels is torch.float32", TypeError, lambda: rk.linear_logprobs(hidden, weight, labels.float())),
        ("labels has shape", ValueError, lambda: rk.linear_logprobs(hidden, weight, labels[:3])),
        ("temperature is 0", ValueError, lambda: rk.linear_logprobs(hidden, weight, labels, temperature=0)),
        ("softcap is -1", ValueError, lambda: rk.linear_logprobs(hidden, weight, labels, softcap=-1)),
        ("logit_scale is 0", ValueError, lambda: rk.linear_logprobs(hidden, weight, labels, logit_scale=0)),
        ("workspace is -5", ValueError, lambda: rk.linear_logprobs(hidden, weight, labels, workspace=-5)),
    ):
        with pytest.raises(error, match=f"linear_logprobs: {message}"):
            call()
