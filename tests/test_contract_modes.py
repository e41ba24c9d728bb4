"""Every op under what a user may have set, and where a tensor has a shape alone: meta, fake and exported.

No global state changes a bit of a result, and no op fails under one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Barrier, Thread

import pytest
import torch
from support.backends import Backend
from support.op_calls import OPS, WITH_KERNEL, inputs_of, outputs_of, with_gradients
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rlhf_kernels as rk

SERVED = [("reference", op) for op in OPS] + [(name, op) for name in ("cpu", "triton") for op in WITH_KERNEL]
every_op_and_backend = pytest.mark.parametrize(("backend", "op"), SERVED, indirect=["backend"])


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _deterministic(fill: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


STATES: dict[str, Callable[[], object]] = {
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    "default device meta": lambda: _default_device("meta"),
    "deterministic, memory filled": lambda: _deterministic(True),
    "deterministic, memory as it is": lambda: _deterministic(False),
    "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "matmul precision medium": lambda: _matmul_precision("medium"),
    "saved on the CPU": lambda: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_op_and_backend
def test_no_global_state_changes_a_bit(backend: Backend, op: str, dtype: torch.dtype) -> None:
    arguments = inputs_of(op, 3, 5, dtype, backend.device)
    expected = with_gradients(OPS[op].call, 0.1, *arguments)
    for name, state in STATES.items():
        with state():  # type: ignore[attr-defined]
            found = with_gradients(OPS[op].call, 0.1, *arguments)
        for a, b in zip(found, expected, strict=True):
            assert (a.dtype, a.device) == (b.dtype, b.device), name
            assert torch.equal(a, b), name


@every_op_and_backend
def test_inference_tensors(backend: Backend, op: str) -> None:
    mask, labels, tensors = inputs_of(op, 3, 5, torch.float32, backend.device)
    expected = outputs_of(OPS[op].call(mask, labels, 0.1, *tensors))
    with torch.inference_mode():
        frozen = [x.detach().clone() for x in (mask, labels, *tensors)]
        inside = outputs_of(OPS[op].call(*frozen[:2], 0.1, *frozen[2:]))
    outside = outputs_of(OPS[op].call(*frozen[:2], 0.1, *frozen[2:]))
    for a, b, c in zip(expected, inside, outside, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@every_op_and_backend
def test_meta_and_fake_tensors_give_shapes(backend: Backend, op: str) -> None:
    mask, labels, tensors = inputs_of(op, 3, 5, torch.bfloat16, backend.device)
    expected = with_gradients(OPS[op].call, 0.1, mask, labels, tensors)
    plain, wants = [x.detach() for x in (mask, labels, *tensors)], [False, False, *(x.requires_grad for x in tensors)]
    mode = FakeTensorMode()
    for where, convert in (("meta", lambda x: x.to("meta")), ("fake", mode.from_tensor)):
        with mode if where == "fake" else torch.enable_grad():
            some = [convert(x).requires_grad_(want) for x, want in zip(plain, wants, strict=True)]
            found = with_gradients(OPS[op].call, 0.1, *some[:2], some[2:])
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), where
            assert a.device == (b.device if where == "fake" else torch.device("meta"))


class _Call(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, mask: Tensor, labels: Tensor, *tensors: Tensor) -> list[Tensor]:
        return outputs_of(OPS[self.op].call(mask, labels, 0.1, *tensors))


@every_op_and_backend
def test_export_keeps_the_batch_dynamic(backend: Backend, op: str) -> None:
    mask, labels, tensors = inputs_of(op, 3, 5, torch.float32, backend.device)
    dynamic, kinds = torch.export.Dim.DYNAMIC, OPS[op].leaves + OPS[op].constants
    shapes = tuple({i: dynamic for i, letter in enumerate(kind) if letter in "nt"} for kind in kinds)
    exported = torch.export.export(
        _Call(op),
        (mask, labels, *(x.detach() for x in tensors)),
        dynamic_shapes={"mask": {0: dynamic, 1: dynamic}, "labels": {0: dynamic, 1: dynamic}, "tensors": shapes},
    ).module()
    mask, labels, tensors = inputs_of(op, 4, 7, torch.float32, backend.device)
    tensors = [x.detach() for x in tensors]
    for a, b in zip(
        exported(mask, labels, *tensors), outputs_of(OPS[op].call(mask, labels, 0.1, *tensors)), strict=True
    ):
        torch.testing.assert_close(a, b)


@every_op_and_backend
def test_two_threads_at_once(backend: Backend, op: str) -> None:
    """Each with its own tensors, forward and backward."""
    if backend.interpreted:
        pytest.skip("Triton's interpreter runs one kernel at a time")
    arguments = [inputs_of(op, n, 5, torch.float32, backend.device) for n in (3, 4)]
    expected = [with_gradients(OPS[op].call, 0.1, *some) for some in arguments]
    found: dict[int, list[Tensor]] = {}
    start = Barrier(2)

    def work(i: int) -> None:
        start.wait()
        with rk.use_backend(backend.name):
            found[i] = with_gradients(OPS[op].call, 0.1, *arguments[i])

    threads = [Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(found[i], want, strict=True))
