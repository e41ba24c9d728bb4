"""selected_logprobs against float64, on every backend, over every kind of value, layout, label and mask."""

from __future__ import annotations

import pytest
import torch
from support import edge_cases, truth
from support.backends import Backend
from support.checks.logits import check, run, upstream
from torch import Tensor

import rlhf_kernels as rk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_class", edge_cases.LOGITS)
def test_every_class_of_value(backend: Backend, value_class: str, dtype: torch.dtype) -> None:
    V = 300
    logits = edge_cases.logits_of(value_class, (4, V), dtype)
    labels = torch.tensor([0, V // 2, V - 1, 1])
    check(backend, logits, labels)


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 1000, 4095, 4096, 4097, 9001])
def test_every_vocabulary_size(backend: Backend, V: int) -> None:
    rows = 3 if V > 1000 else 64  # one error in few elements says little about a formulation
    for value_class in ("normal", "all very negative"):
        logits = edge_cases.logits_of(value_class, (rows, V), torch.float32)
        check(backend, logits, edge_cases.labels_for((rows,), V))


@pytest.mark.parametrize("V", [32001, 50257, 128256])
def test_vocabularies_of_real_models(backend: Backend, V: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(backend, edge_cases.logits_of("normal", (2, V), dtype), edge_cases.labels_for((2,), V))


def test_minus_inf_prefix_longer_than_any_block(backend: Backend) -> None:
    logits = edge_cases.logits_of("normal", (2, 40_000), torch.float32)
    logits[0, :4_500] = logits[1, :39_000] = float("-inf")
    check(backend, logits, torch.tensor([4_600, 39_500]))


def test_entropy_of_wide_bf16_logits(backend: Backend) -> None:
    """Peers keep the sum in bf16 and are off by 0.015 to 0.11 nats here."""
    logits = edge_cases.logits_of("wide", (2, 50257), torch.bfloat16)
    check(backend, logits, torch.tensor([1, 2]))


def test_label_at_minus_inf(backend: Backend) -> None:
    logits = torch.tensor([[1.0, float("-inf"), 2.0]])
    logprobs, entropy, grad = run(backend, logits, torch.tensor([1]))
    assert logprobs.item() == float("-inf")
    assert entropy.isfinite().all()
    assert grad.isfinite().all()
    assert grad[0, 1] == upstream(torch.Size([1]))[0].item()  # onehot - p, and p = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", edge_cases.LAYOUTS)
@pytest.mark.parametrize("V", [48, 37])
def test_every_layout(backend: Backend, layout: str, V: int, dtype: torch.dtype) -> None:
    logits = edge_cases.logits_of("normal", (3, 5, V), dtype)
    placed = edge_cases.LAYOUTS[layout](logits)
    torch.testing.assert_close(placed, logits, rtol=0, atol=0)
    check(backend, placed, edge_cases.labels_for((3, 5), V))


def test_expanded_logits(backend: Backend) -> None:
    rows = edge_cases.logits_of("normal", (1, 9, 50), torch.float32)
    check(backend, rows.expand(3, 9, 50), edge_cases.labels_for((3, 9), 50))
    check(backend, rows.transpose(0, 1).expand(9, 3, 50), edge_cases.labels_for((9, 3), 50))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 3, 2), (1, 2, 1, 3)])
def test_every_leading_shape(backend: Backend, shape: tuple[int, ...]) -> None:
    check(backend, edge_cases.logits_of("normal", (*shape, 40), torch.float32), edge_cases.labels_for(shape, 40))


def test_labels_of_both_widths_and_any_stride(backend: Backend) -> None:
    logits = edge_cases.logits_of("normal", (6, 40), torch.float32)
    labels = edge_cases.labels_for((6,), 40)
    with_gaps = torch.full((12,), 39)
    with_gaps[::2] = labels
    for variant in (labels.int(), with_gaps[::2], with_gaps.int()[::2]):
        check(backend, logits, variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_every_mask_over_rows_that_nobody_may_read(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    shape = torch.Size((3, 8))
    mask = edge_cases.MASKS[kind](shape)
    logits, labels = edge_cases.logits_of("normal", (*shape, 70), dtype), edge_cases.labels_for(shape, 70)
    check(backend, *edge_cases.spoil(logits, labels, mask), mask)


def test_mask_of_any_dtype_and_stride(backend: Backend) -> None:
    logits, labels = edge_cases.logits_of("normal", (6, 40), torch.float32), edge_cases.labels_for((6,), 40)
    mask = torch.tensor([1, 0, 1, 1, 0, 0])
    expected = run(backend, logits, labels, mask=mask.bool())
    for variant in (mask, mask.float(), mask.repeat_interleave(2)[::2].bool()):
        for a, b in zip(run(backend, logits, labels, mask=variant), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 2, 100.0])
def test_temperatures(backend: Backend, temperature: float) -> None:
    for value_class in ("normal", "huge", "-inf prefix"):
        logits = edge_cases.logits_of(value_class, (4, 300), torch.float32)
        check(backend, logits, torch.tensor([299, 280, 290, 285]), temperature=temperature)


def test_temperature_per_row(backend: Backend) -> None:
    logits, labels = edge_cases.logits_of("normal", (2, 3, 60), torch.float32), edge_cases.labels_for((2, 3), 60)
    for temperature in (torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[0.3], [1.7]]), torch.tensor(0.9)):
        check(backend, logits, labels, temperature=temperature)
    # A temperature that the mask hides is not looked at by the arithmetic.
    mask = torch.tensor([[True, True, False], [True, False, False]])
    check(backend, logits, labels, mask, torch.tensor([[0.5, 1.0, 1e-30], [0.7, 2.0, 1e30]]))


@pytest.mark.parametrize("with_mask", [False, True])
def test_no_rows(backend: Backend, with_mask: bool) -> None:
    for shape in ((0,), (0, 4), (3, 0)):
        mask = torch.ones(shape, dtype=torch.bool) if with_mask else None
        got = run(backend, torch.empty(*shape, 17), torch.empty(shape, dtype=torch.int64), mask=mask)
        assert [tuple(t.shape) for t in got] == [shape, shape, (*shape, 17)]


def test_only_one_output_differentiated(backend: Backend) -> None:
    logits, labels = edge_cases.logits_of("-inf tail", (3, 90), torch.float32), torch.tensor([0, 1, 2])
    for which in (0, 1):
        x = logits.to(backend.device).requires_grad_()
        outputs = rk.selected_logprobs(x, labels.to(backend.device), with_entropy=True)
        (grad,) = torch.autograd.grad(outputs[which].sum(), x)  # an expanded upstream gradient
        weights = [torch.full((3,), float(which == i)) for i in (0, 1)]
        _, _, expected = truth.selected_logprobs(logits, labels, 1.0, *weights)
        _, _, plain = truth.plain_logprobs_errors(logits, labels, 1.0, *weights)
        truth.assert_accurate(grad, expected, plain)


def test_without_entropy_the_same_logprobs(backend: Backend) -> None:
    logits, labels = edge_cases.logits_of("normal", (4, 5000), torch.bfloat16), edge_cases.labels_for((4,), 5000)
    expected, _, _ = run(backend, logits, labels)
    got = rk.selected_logprobs(logits.to(backend.device), labels.to(backend.device))
    assert isinstance(got, Tensor)
    truth.assert_accurate(got, expected, 0.0)


def test_bad_labels_raise_and_name_the_first(backend: Backend) -> None:
    logits = torch.zeros(4, 5, device=backend.device)
    for bad in (-1, 5, -100, 2**31 - 1):
        labels = torch.tensor([0, 7, bad, 4], device=backend.device)
        mask = torch.tensor([True, False, True, True], device=backend.device)
        if backend.device == "cuda":  # no sync: the row is NaN
            assert rk.selected_logprobs(logits, labels, mask=mask).isnan().tolist() == [False, False, True, False]
        else:
            with pytest.raises(IndexError, match=rf"{bad} at row 2.*\[0, 5\)"):
                rk.selected_logprobs(logits, labels, mask=mask)


def test_upstream_gradient_of_zero_is_zero(backend: Backend) -> None:
    """Also where the row itself is finite only by luck of its weight: a clipped token costs and moves nothing."""
    x = edge_cases.logits_of("normal", (3, 50), torch.float32).to(backend.device).requires_grad_()
    logprobs = rk.selected_logprobs(x, torch.tensor([1, 2, 3], device=backend.device))
    (grad,) = torch.autograd.grad(logprobs, x, torch.tensor([1.0, 0.0, 2.0], device=backend.device))
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).any()
