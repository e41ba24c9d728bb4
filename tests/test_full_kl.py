"""full_kl against float64, on every backend, over every kind of value on either side, layout and mask."""

from __future__ import annotations

import math

import pytest
import torch
from support import edge_cases
from support.backends import Backend
from support.checks.full_kl import DIRECTIONS, check, run, upstream
from torch import Tensor

import rlhf_kernels as rk


def _pair(value_class: str, shape: tuple[int, ...], dtype: torch.dtype, ref_class: str | None = None) -> list[Tensor]:
    classes = (value_class, ref_class or value_class)
    return [edge_cases.logits_of(name, shape, dtype, seed) for seed, name in enumerate(classes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value_class", edge_cases.LOGITS)
def test_every_class_of_value(backend: Backend, value_class: str, dtype: torch.dtype) -> None:
    check(backend, *_pair(value_class, (2, 300), dtype))


@pytest.mark.parametrize("other", edge_cases.LOGITS)
def test_every_class_beside_ordinary_rows(backend: Backend, other: str) -> None:
    """Either side: what only one of them forbids, overflows or spoils."""
    check(backend, *_pair("normal", (2, 300), torch.float32, other))
    check(backend, *_pair(other, (2, 300), torch.float32, "normal"))


@pytest.mark.parametrize("distance", [0.0, 1e-4, 1e-2])
def test_close_policies(backend: Backend, distance: float) -> None:
    """A policy near its reference, as at the start of training; equal ones differ by exactly 0."""
    logits = edge_cases.logits_of("normal", (4, 3000), torch.float32)
    ref = logits + distance * edge_cases.logits_of("normal", (4, 3000), torch.float32, 1)
    check(backend, logits, ref)
    if distance == 0:
        for direction in DIRECTIONS:
            kl, grad = run(backend, logits, ref.clone(), direction=direction, temperature=0.7)
            assert (kl == 0).all()
            if backend.name != "reference":
                assert (grad == 0).all()


@pytest.mark.parametrize("value_class", ["-inf tail", "huge", "all very negative", "beyond exp's range"])
def test_equal_rows_of_any_class_give_exactly_zero(backend: Backend, value_class: str) -> None:
    logits = edge_cases.logits_of(value_class, (3, 2500), torch.float32)
    for direction in DIRECTIONS:
        assert (run(backend, logits, logits.clone(), direction=direction)[0] == 0).all()


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 1025, 2049, 6001])
def test_every_vocabulary_size(backend: Backend, V: int) -> None:
    rows = 2 if V > 1000 else 8  # one error in few elements says little about a formulation
    value_class = "normal" if V % 2 == 0 else "all very negative"  # where padding must not count as exp(0)
    check(backend, *_pair(value_class, (rows, V), torch.float32))


@pytest.mark.parametrize("V", [32001, 50257, 128256])
def test_vocabularies_of_real_models(backend: Backend, V: int) -> None:
    directions = ["reverse"] if backend.interpreted else DIRECTIONS
    check(backend, *_pair("normal", (2, V), torch.bfloat16), directions=directions)


def test_minus_inf_prefix_longer_than_any_block(backend: Backend) -> None:
    """On both sides alike, and a longer one on either side."""
    logits, ref = _pair("normal", (3, 33_000), torch.float32)
    logits[0, :4_500] = ref[0, :4_500] = float("-inf")
    logits[1, :32_000] = ref[1, :4_500] = float("-inf")
    logits[2, :4_500] = ref[2, :32_000] = float("-inf")
    check(backend, logits, ref)


def test_what_only_one_side_allows(backend: Backend) -> None:
    x = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [-200.0, 1.0, 2.0]])
    y = torch.tensor([[0.5, 1.0, 1.5], [float("-inf"), 1.0, 1.5], [float("-inf"), 1.0, 1.5]])
    kl, grad = run(backend, x, y)
    assert kl[0].isfinite()
    assert kl[1:].tolist() == [math.inf, math.inf]  # the chance of -200 is 2e-88, not 0
    assert grad[0].isfinite().all()
    assert grad[1:].isnan().all()
    kl, grad = run(backend, y, x, direction="forward")
    assert kl[1:].tolist() == [math.inf, math.inf]
    assert grad.isfinite().all()
    assert grad[1, 0] < 0 < upstream(kl.shape)[1] or grad[1, 0] > 0 > upstream(kl.shape)[1]
    for direction in ("forward", "jsd"):
        kl, grad = run(backend, x, y, direction=direction)
        assert kl.isfinite().all()
        assert grad.isfinite().all()


def test_jsd_of_disjoint_supports_is_log_2(backend: Backend) -> None:
    x, y = _pair("normal", (4, 1000), torch.float32)
    x[:, :500] = y[:, 500:] = float("-inf")
    kl, grad = run(backend, x, y, direction="jsd")
    torch.testing.assert_close(kl, torch.full((4,), math.log(2)), rtol=3e-7, atol=0)
    assert (grad.abs() < 1e-6).all()


@pytest.mark.parametrize("layout", edge_cases.LAYOUTS)
def test_every_layout_of_either_side(backend: Backend, layout: str) -> None:
    """The same bits: each side has strides of its own."""
    placed = edge_cases.LAYOUTS[layout]
    for V, dtype, direction in ((48, torch.bfloat16, "reverse"), (37, torch.float32, "forward")):
        logits, ref = _pair("normal", (2, 3, V), dtype)
        torch.testing.assert_close(placed(logits), logits, rtol=0, atol=0)
        expected = run(backend, logits, ref, direction=direction)
        for pair in ((placed(logits), ref), (logits, placed(ref)), (placed(logits), placed(ref))):
            for a, b in zip(expected, run(backend, *pair, direction=direction), strict=True):
                assert torch.equal(a, b)
    check(backend, placed(logits), ref, directions=["jsd"])


def test_expanded_rows(backend: Backend) -> None:
    logits, ref = _pair("normal", (1, 4, 50), torch.float32)
    check(backend, logits.expand(2, 4, 50), ref.expand(2, 4, 50), directions=["reverse", "jsd"])
    check(
        backend, logits.transpose(0, 1).expand(4, 2, 50), ref.transpose(0, 1).expand(4, 2, 50), directions=["forward"]
    )


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 2), (1, 2, 1, 3)])
def test_every_leading_shape(backend: Backend, shape: tuple[int, ...]) -> None:
    check(backend, *_pair("normal", (*shape, 40), torch.float32))


def test_dtypes_that_differ_are_promoted(backend: Backend) -> None:
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
        logits, ref = (x.to(dtype) for x, dtype in zip(_pair("normal", (3, 60), torch.float32), dtypes, strict=True))
        kl, grad = run(backend, logits, ref)
        expected_kl, expected_grad = run(backend, logits.float(), ref.float())
        assert torch.equal(kl, expected_kl)
        assert torch.equal(grad, expected_grad.to(logits.dtype))


def test_the_reference_policy_is_a_constant(backend: Backend) -> None:
    logits, ref = (x.to(backend.device) for x in _pair("normal", (3, 60), torch.float32))
    assert not rk.full_kl(logits, ref.requires_grad_()).requires_grad
    kl = rk.full_kl(logits.requires_grad_(), ref)
    assert torch.autograd.grad(kl.sum(), [logits, ref], allow_unused=True)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_every_mask_over_rows_that_nobody_may_read(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    shape = torch.Size((2, 5))
    mask = edge_cases.MASKS[kind](shape)
    labels = torch.zeros(shape, dtype=torch.int64)
    logits, ref = (edge_cases.spoil(x, labels, mask)[0] for x in _pair("normal", (*shape, 70), dtype))
    check(backend, logits, ref, mask)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 2, 100.0])
def test_temperatures(backend: Backend, temperature: float) -> None:
    for value_class in ("normal", "huge", "-inf prefix"):
        check(backend, *_pair(value_class, (2, 300), torch.float32), temperature=temperature)


def test_temperature_per_row(backend: Backend) -> None:
    logits, ref = _pair("normal", (2, 3, 60), torch.float32)
    for temperature in (torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[0.3], [1.7]]), torch.tensor(0.9)):
        check(backend, logits, ref, temperature=temperature)
    # A temperature that the mask hides is not looked at by the arithmetic.
    mask = torch.tensor([[True, True, False], [True, False, False]])
    check(backend, logits, ref, mask, torch.tensor([[0.5, 1.0, 1e-30], [0.7, 2.0, 1e30]]))


def test_no_rows(backend: Backend) -> None:
    for shape in ((0,), (0, 4), (3, 0)):
        for mask in (None, torch.ones(shape, dtype=torch.bool)):
            got = run(backend, torch.empty(*shape, 17), torch.empty(*shape, 17), mask=mask)
            assert [tuple(t.shape) for t in got] == [shape, (*shape, 17)]


def test_upstream_gradient_of_zero_is_zero(kernel_backend: Backend) -> None:
    """Also in a row whose KL is infinite: what the caller drops by a weight of 0 moves nothing."""
    x, y = (row.to(kernel_backend.device) for row in _pair("normal", (3, 50), torch.float32))
    y[1, 0] = float("-inf")
    for direction in DIRECTIONS:
        kl = rk.full_kl(x.requires_grad_(), y, direction=direction)
        (grad,) = torch.autograd.grad(kl, x, torch.tensor([1.0, 0.0, 2.0], device=kernel_backend.device))
        assert (grad[1] == 0).all()
        assert (grad[[0, 2]] != 0).any(-1).all()


def test_gradients_of_a_row_sum_to_zero(backend: Backend) -> None:
    """Adding a constant to the logits changes no distribution."""
    logits, ref = _pair("normal", (4, 2000), torch.float32)
    for direction in DIRECTIONS:
        _, grad = run(backend, logits, ref, direction=direction)
        assert (grad.double().sum(-1).abs() <= 1e-6 * grad.double().abs().sum(-1)).all()


def test_backward_twice_gives_the_same(kernel_backend: Backend) -> None:
    x, y = (row.to(kernel_backend.device) for row in _pair("normal", (2, 60), torch.float32))
    kl = rk.full_kl(x.requires_grad_(), y)
    first, second = (torch.autograd.grad(kl.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first is not second
