"""16-bit heads on a CPU, whichever way this one multiplies: as torch does, and widened to float32 tile by tile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import edge_cases, linear_truth
from support.backends import Backend, require_backend
from support.checks import linear, linear_kl, linear_lora, linear_losses, linear_unit
from support.checks.linear import SCALARS, head
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch
from rlhf_kernels.ops.linear import chunks

HALVES = [torch.float16, torch.bfloat16]
WAYS = {"in 16 bits": None, "widened": torch.float32}


@pytest.fixture(params=WAYS)
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The native backend, made to multiply in one of the ways; tiles of the weight are 64 rows at most."""
    require_backend("cpu")
    monkeypatch.setattr(dispatch.backend_module("cpu"), "product_dtype", lambda dtype: WAYS[request.param] or dtype)
    monkeypatch.setattr(chunks, "WIDE_BYTES", 1)
    with rk.use_backend("cpu"):
        yield Backend("cpu", "cpu")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("D", [1, 101])
def test_logprobs(cpu: Backend, D: int, dtype: torch.dtype) -> None:
    for V in (1, 1003):
        for workspace in (5_000, 64 << 20):
            linear.check(cpu, head(19, D, V, dtype), workspace=workspace)
            linear_unit.check(cpu, head(19, D, V, dtype), workspace=workspace)


@pytest.mark.parametrize("options", SCALARS, ids=str)
def test_scalars_and_masks(cpu: Backend, options: dict) -> None:
    case, mask = head(24, 16, 300, torch.bfloat16)._replace(**options), edge_cases.MASKS["holes"](torch.Size((24,)))
    hidden, labels = edge_cases.spoil(case.hidden, case.labels, mask)
    for check in (linear.check, linear_unit.check):
        check(cpu, case._replace(hidden=hidden, labels=labels), mask)
        check(cpu, case._replace(hidden=hidden, labels=labels), mask, workspace=3000)


def test_logits_in_the_memory_of_the_weight_gradient(cpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    linear.check_logits_in_the_memory_of_the_weight_gradient(cpu, torch.bfloat16, monkeypatch)


def test_losses(cpu: Backend) -> None:
    terms = {"entropy_coef": 0.05, "kl_coef": 0.1}
    for kind in ("none", "holes"):
        data = linear_losses.rollout(torch.bfloat16, kind)
        for workspace in (1500, 64 << 20):
            linear_losses.check(cpu, data, {**terms, "ref_logprobs": data.ref}, workspace=workspace)
            linear_losses.check(cpu, data, workspace=workspace, ratio="sequence")


@pytest.mark.parametrize("direction", linear_kl.DIRECTIONS)
def test_kl(cpu: Backend, direction: str) -> None:
    case, other = head(7, 16, 200, torch.bfloat16), head(7, 12, 200, torch.bfloat16, seed=1)
    for workspace in (0, 1500, 64 << 20):
        linear_kl.check(cpu, case, other, direction, workspace=workspace)


@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_on_the_head(cpu: Backend, of_adapter: torch.dtype) -> None:
    linear_lora.check_errors_beside_peft(cpu, torch.bfloat16, of_adapter)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require_backend("cpu")
    monkeypatch.setattr(dispatch.backend_module("cpu"), "product_dtype", lambda _: torch.float32)
    with rk.use_backend("cpu"):
        yield


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_widened_logits_are_not_rounded(dtype: torch.dtype) -> None:
    """A model's own 16-bit head is off by 0.01 nats here."""
    case = head(19, 64, 1003, dtype)
    found = rk.linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias, with_entropy=True)
    exact = linear_truth.logprobs(case, torch.zeros(19), torch.zeros(19))[:2]
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("widened")
def test_no_product_is_left_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    for name in ("mm", "addmm"):
        function = getattr(torch, name)

        def noted(*args: Tensor, of=function, **options: object) -> Tensor:
            seen.extend(x.dtype for x in args)
            return of(*args, **options)

        monkeypatch.setattr(torch, name, noted)
    case = head(9, 16, 200, torch.bfloat16)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    low = [torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((4, 16), (200, 4))]
    for workspace in (0, 64 << 20):
        options = {"lora": (*low, 0.1), "workspace": workspace}
        rk.linear_logprobs(hidden, weight, case.labels, **options).sum().backward()
        rk.linear_logprobs(hidden, weight.detach(), case.labels, workspace=workspace).sum().backward()
        rk.linear_cross_entropy(hidden, weight, case.labels, **options).backward()
        rk.linear_kl(hidden, weight, hidden.detach(), 2 * weight.detach(), **options).sum().backward()
    assert seen
    assert set(seen) == {torch.float32}
