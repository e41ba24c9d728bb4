"""logits_dtype: products of 16-bit heads that stay float32 until the softmax, or are rounded as a model's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from support import edge_cases, linear_truth
from support.backends import Backend, require_backend
from support.checks import linear, linear_kl, linear_lora, linear_losses, linear_unit
from support.checks.linear import SCALARS, head
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch

HALVES = [torch.float16, torch.bfloat16]
WAYS = ["float32", "float32 without pairs", "in 16 bits"]


class Way(NamedTuple):
    backend: Backend
    logits_dtype: torch.dtype | None

    def head(self, *args: object, **options: object) -> linear_truth.Case:
        return head(*args, **options)._replace(logits_dtype=self.logits_dtype)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """The native backend, made to multiply in one of the ways, whatever this CPU would do."""
    require_backend("cpu")
    if request.param == "in 16 bits":
        monkeypatch.setattr(dispatch.backend_module("cpu"), "logits_dtype", lambda dtype, fp32: dtype)
    elif request.param == "float32 without pairs":
        from rlhf_kernels import _native

        monkeypatch.setattr(_native, "has_bfloat_pairs", lambda: False)
    with rk.use_backend("cpu"):
        yield Way(Backend("cpu", "cpu"), None if request.param == "in 16 bits" else torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("D", [1, 101])
def test_logprobs(way: Way, D: int, dtype: torch.dtype) -> None:
    for V in (1, 1003):
        for workspace in (5_000, 64 << 20):
            linear.check(way.backend, way.head(19, D, V, dtype), workspace=workspace)
            linear_unit.check(way.backend, way.head(19, D, V, dtype), workspace=workspace)


@pytest.mark.parametrize("options", SCALARS, ids=str)
def test_scalars_and_masks(way: Way, options: dict) -> None:
    case, mask = way.head(24, 16, 300, torch.bfloat16)._replace(**options), edge_cases.MASKS["holes"](torch.Size((24,)))
    hidden, labels = edge_cases.spoil(case.hidden, case.labels, mask)
    for check in (linear.check, linear_unit.check):
        check(way.backend, case._replace(hidden=hidden, labels=labels), mask)
        check(way.backend, case._replace(hidden=hidden, labels=labels), mask, workspace=3000)


def test_logits_in_the_memory_of_the_weight_gradient(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    linear.check_logits_in_the_memory_of_the_weight_gradient(way.backend, torch.bfloat16, monkeypatch)


def test_losses(way: Way) -> None:
    terms = {"entropy_coef": 0.05, "kl_coef": 0.1}
    for kind in ("none", "holes"):
        data = linear_losses.rollout(torch.bfloat16, kind, logits_dtype=way.logits_dtype)
        for workspace in (1500, 64 << 20):
            linear_losses.check(way.backend, data, {**terms, "ref_logprobs": data.ref}, workspace=workspace)
            linear_losses.check(way.backend, data, workspace=workspace, ratio="sequence")


@pytest.mark.parametrize("direction", linear_kl.DIRECTIONS)
def test_kl(way: Way, direction: str) -> None:
    case, other = way.head(7, 16, 200, torch.bfloat16), way.head(7, 12, 200, torch.bfloat16, seed=1)
    for workspace in (0, 1500, 64 << 20):
        linear_kl.check(way.backend, case, other, direction, workspace=workspace)


@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_on_the_head(way: Way, of_adapter: torch.dtype) -> None:
    linear_lora.check_errors_beside_peft(way.backend, torch.bfloat16, of_adapter)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0])
def test_logits_are_not_rounded(backend: Backend, spread: float, dtype: torch.dtype) -> None:
    """A model's own 16-bit head is off by 0.01 nats and more here, this by what float32 sums are."""
    case = head(19, 64, 300, dtype)
    case = case._replace(weight=(case.weight.float() * spread / 3).to(dtype))
    arguments = [x.to(backend.device) for x in (case.hidden, case.weight, case.labels)]
    found = rk.linear_logprobs(*arguments, bias=case.bias.to(backend.device), with_entropy=True)
    exact = linear_truth.logprobs(case, torch.zeros(19), torch.zeros(19))[:2]
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-5 * spread)
    plain = torch.nn.functional.linear(case.hidden, case.weight, case.bias).float().log_softmax(-1)
    error = (plain.gather(-1, case.labels.long().unsqueeze(-1)).squeeze(-1) - exact[0]).abs().max()
    assert error > 50 * 1e-5 * spread


def test_float16_products_beyond_its_range(backend: Backend) -> None:
    """Finite where logit_scale brings them back: 65504 is not in the way."""
    hidden, weight = (
        torch.full(shape, 60.0, dtype=torch.float16, device=backend.device) for shape in ((2, 64), (5, 64))
    )
    weight[1] += 1
    labels = torch.tensor([1, 0], device=backend.device)
    found = rk.linear_logprobs(hidden, weight, labels, logit_scale=1e-4)
    expected = (hidden.double() @ weight.double().T * 1e-4).log_softmax(-1)[[0, 1], labels]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float64, "float32"])
def test_other_dtypes_are_refused(logits_dtype: object) -> None:
    case = head(3, 4, 5)
    with pytest.raises(ValueError, match=r"linear_logprobs: logits_dtype is .*; it takes torch.float32, None"):
        rk.linear_logprobs(case.hidden, case.weight, case.labels, logits_dtype=logits_dtype)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_torchs_precision_of_float32_products_changes_nothing(precision: str) -> None:
    require_backend("cpu")
    case = head(40, 64, 500)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight)]
    found, before = [], torch.get_float32_matmul_precision()
    try:
        for chosen in ("highest", precision):
            torch.set_float32_matmul_precision(chosen)
            loss = rk.linear_logprobs(*leaves, case.labels)
            found.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_no_product_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 bits or of float32, whose precision is a setting of the user's."""
    require_backend("cpu")
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
    assert not seen
    rk.linear_logprobs(hidden, weight, case.labels, logits_dtype=None)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert set(seen) == {torch.bfloat16}
