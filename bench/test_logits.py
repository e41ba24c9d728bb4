"""selected_logprobs and its peers under pytest-benchmark: `pytest bench --benchmark-group-by=group`."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

ROUNDS = {"rounds": 7, "warmup_rounds": 2}
FORMULATIONS = {**peers.PLAIN, "row loop": peers.row_loop, **peers.compiled(), "rlhf_kernels": rk.selected_logprobs}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=DTYPES)
def case(request: pytest.FixtureRequest) -> tuple[str, Tensor, Tensor]:
    return (request.param, *peers.logits_case(DTYPES[request.param]))


@pytest.mark.parametrize("name", FORMULATIONS)
def test_forward(benchmark, case: tuple[str, Tensor, Tensor], name: str) -> None:
    dtype, logits, labels = case
    benchmark.group = f"forward {dtype}"
    with torch.no_grad():
        logprobs = benchmark.pedantic(FORMULATIONS[name], (logits, labels), **ROUNDS)
    torch.testing.assert_close(logprobs, rk.selected_logprobs(logits, labels), rtol=1e-5, atol=1e-5)


def _gradient(formulation: Callable[[Tensor, Tensor], Tensor], leaf: Tensor, labels: Tensor) -> Tensor:
    return torch.autograd.grad(formulation(leaf, labels).sum(), leaf)[0]


@pytest.mark.parametrize("name", [name for name in FORMULATIONS if name != "row loop"])
def test_forward_and_backward(benchmark, case: tuple[str, Tensor, Tensor], name: str) -> None:
    dtype, logits, labels = case
    benchmark.group = f"forward + backward {dtype}"
    leaf = logits.clone().requires_grad_()
    grad = benchmark.pedantic(_gradient, (FORMULATIONS[name], leaf, labels), **ROUNDS)
    rows = torch.arange(len(labels))
    expected = 1 - rk.selected_logprobs(logits, labels).exp()
    torch.testing.assert_close(grad[rows, labels].float(), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"with_entropy": True}, {"mask": True}], ids=["plain", "entropy", "half masked"]
)
def test_options(benchmark, case: tuple[str, Tensor, Tensor], options: dict[str, bool]) -> None:
    dtype, logits, labels = case
    benchmark.group = f"options {dtype}"
    if "mask" in options:
        options = {"mask": torch.arange(len(labels)) % 2 == 0}
    outputs = benchmark.pedantic(rk.selected_logprobs, (logits, labels), options, **ROUNDS)
    logprobs = outputs[0] if isinstance(outputs, tuple) else outputs
    assert logprobs.isfinite().all()
