"""Derivatives beyond one backward: a second one raises, torch.func and forward mode are right, tensors are saved well.

torch.func and forward-mode AD go through the reference, whatever backend is forced.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.backends import Backend
from support.op_calls import OPS, WITH_KERNEL, inputs_of, outputs_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk

DIFFERENTIABLE = [name for name, op in OPS.items() if op.leaves]
WITH_BACKWARD = [name for name in DIFFERENTIABLE if name in WITH_KERNEL]
# What the registered op is called whose kernels serve it.
SERVED_BY = {
    "linear_logprobs_frozen": "linear_logprobs",
    "linear_dpo_loss": "linear_logprobs",
    "linear_cross_entropy": "linear_(policy_loss|logprobs)",
}


def _case(op: str, device: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A scalar of the op's outputs as a function of its first differentiable tensor, and that tensor, a leaf."""
    mask, labels, tensors = inputs_of(op, 3, 5, torch.float32, device)
    leaf = tensors[0]

    def scalar(x: Tensor) -> Tensor:
        return torch.stack([y.sum() for y in outputs_of(OPS[op].call(mask, labels, 0.1, x, *tensors[1:]))]).sum()

    return scalar, leaf


@pytest.mark.parametrize("op", WITH_BACKWARD)
@pytest.mark.parametrize("upstream", ["constant", "that requires a gradient"])
def test_a_second_derivative_raises(kernel_backend: Backend, op: str, upstream: str) -> None:
    """Whatever the gradient is added to, and where torch would take it for unused."""
    scalar, x = _case(op, kernel_backend.device)
    message = rf"{SERVED_BY.get(op, op)}: its kernels have no second derivative.*use_backend"
    y = scalar(x)
    loss = y if upstream == "constant" else y.square()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(grad.square().sum(), x, allow_unused=True, retain_graph=True)
    penalised = loss + grad.square().sum()
    with pytest.raises(RuntimeError, match=message):
        penalised.backward()


@pytest.mark.parametrize("op", WITH_BACKWARD)
def test_create_graph_alone_changes_no_gradient(kernel_backend: Backend, op: str) -> None:
    scalar, x = _case(op, kernel_backend.device)
    (expected,) = torch.autograd.grad(scalar(x), x)
    (grad,) = torch.autograd.grad(scalar(x), x, create_graph=True)
    assert grad.requires_grad
    assert torch.equal(grad.detach(), expected)


def test_a_gradient_in_place_has_no_second_derivative_either(kernel_backend: Backend) -> None:
    x = torch.randn(2, 5, device=kernel_backend.device, requires_grad=True)
    labels = torch.zeros(2, dtype=torch.int64, device=kernel_backend.device)
    y = rk.selected_logprobs(x * 1, labels, inplace_backward=True)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="selected_logprobs: its kernels have no second derivative"):
        torch.autograd.grad(grad.square().sum(), x)


def test_the_way_out_that_the_error_names() -> None:
    """Under the reference the second derivative is there, and right."""
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 4])
    with rk.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda z: rk.selected_logprobs(z, labels), (x,))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_func_grad_jvp_and_forward_mode(backend: Backend, op: str) -> None:
    if backend.name != "reference" and op not in WITH_KERNEL:
        pytest.skip("no kernel")
    scalar, x = _case(op, backend.device)
    (expected,) = torch.autograd.grad(scalar(x), x)
    point, tangent = x.detach(), torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.device)
    grad, value = torch.func.grad_and_value(scalar)(point)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, scalar(x).detach(), rtol=1e-4, atol=1e-5)
    slope = (expected * tangent).sum()
    _, found = torch.func.jvp(scalar, (point,), (tangent,))
    # torch's own tangent of a 0-d float32 tensor divided by a Python number is float64.
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-4, check_dtype=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(point, tangent)
        found = torch.autograd.forward_ad.unpack_dual(scalar(dual)).tangent
    assert found is not None
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_func_vmap_over_a_leading_dimension(backend: Backend, op: str) -> None:
    """Of every argument at once: the values are those of one call after the other."""
    if backend.name != "reference" and op not in WITH_KERNEL:
        pytest.skip("no kernel")
    cases = [inputs_of(op, 3, 5, torch.float32, backend.device) for _ in range(2)]
    mask, labels, _ = cases[0]
    batched = [torch.stack([x.detach(), x.detach().flip(0)]) for x in cases[0][2]]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(OPS[op].call(mask, labels, 0.1, *tensors)))

    found = torch.func.vmap(call)(*batched)
    expected = [call(*(x[i] for x in batched)) for i in range(2)]
    for i, outputs in enumerate(expected):
        for a, b in zip(found, outputs, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


class _Unpacked:
    """Counts how often each saved tensor is unpacked."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def pack(self, x: Tensor) -> tuple[int, Tensor]:
        self.counts.append(0)
        return len(self.counts) - 1, x

    def unpack(self, packed: tuple[int, Tensor]) -> Tensor:
        self.counts[packed[0]] += 1
        return packed[1]


@pytest.mark.parametrize("op", WITH_BACKWARD)
@pytest.mark.parametrize("way", ["reentrant", "non-reentrant", "save_on_cpu", "hooks"])
def test_checkpointing_and_hooks_on_saved_tensors(kernel_backend: Backend, op: str, way: str) -> None:
    scalar, x = _case(op, kernel_backend.device)
    (expected,) = torch.autograd.grad(scalar(x), x)
    leaf = x.detach().clone().requires_grad_()
    if way in ("reentrant", "non-reentrant"):
        checkpoint(scalar, leaf, use_reentrant=way == "reentrant").backward()
    elif way == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            y = scalar(leaf)
        y.backward()
    else:
        count = _Unpacked()
        with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
            y = scalar(leaf)
        y.backward()
        assert count.counts
        assert max(count.counts) == 1
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-7)
