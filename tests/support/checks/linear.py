"""One call of linear_logprobs against float64 on explicit logits."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch
from rlhf_kernels.ops.linear.chunks import ChunkedHead
from support import edge_cases, linear_truth, truth
from support.backends import Backend
from support.linear_truth import Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


SCALARS = [
    {"softcap": 4.0},
    {"softcap": 30.0, "logit_scale": 0.3},
    {"logit_scale": 2.5},
    {"temperature": 0.7},
    {"temperature": 1.7, "softcap": 4.0, "logit_scale": 0.3},
]


def head(N: int, D: int, V: int, dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 0) -> Case:
    """A head whose logits have a spread of about 3."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = (3 * torch.randn(V, D, generator=generator) / D**0.5).to(dtype)
    offset = torch.randn(V, generator=generator).to(dtype) if bias else None
    return Case(hidden, weight, edge_cases.labels_for((N,), V, seed), offset)


def run(backend: Backend, case: Case, mask: Tensor | None = None, **options) -> list[Tensor]:
    """logprobs, entropy, dH, dW, db (or without db) for linear_truth.upstream's gradients, all on the CPU."""
    leaves = [case.hidden, case.weight, *([] if case.bias is None else [case.bias])]
    leaves = [x.to(backend.device).detach().requires_grad_() for x in leaves]
    if mask is not None:
        options["mask"] = mask.to(backend.device)
    temperature = case.temperature
    logprobs, entropy = rk.linear_logprobs(
        leaves[0],
        leaves[1],
        case.labels.to(backend.device),
        bias=leaves[2] if case.bias is not None else None,
        temperature=temperature.to(backend.device) if isinstance(temperature, Tensor) else temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        logits_dtype=case.logits_dtype,
        with_entropy=True,
        **options,
    )
    upstream = [g.to(backend.device) for g in linear_truth.upstream(case.labels.shape)]
    grads = torch.autograd.grad([logprobs, entropy], leaves, upstream)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    return [x.detach().cpu() for x in (logprobs, entropy, *grads)]


def check(backend: Backend, case: Case, mask: Tensor | None = None, **options) -> None:
    """Values and gradients of one call against truth; what the mask hides is exactly 0."""
    got = run(backend, case, mask, **options)
    shape = case.labels.shape
    counted = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    for tensor in got[:3]:
        assert (tensor[~counted] == 0).all()
    rows = case._replace(hidden=case.hidden[counted], labels=case.labels[counted])
    if isinstance(case.temperature, Tensor):
        rows = rows._replace(temperature=case.temperature.expand(shape)[counted])
    g = [x[counted] for x in linear_truth.upstream(shape)]
    expected = linear_truth.logprobs(rows, *g)
    plain = linear_truth.plain_logprobs_errors(rows, *g)
    for i, tensor in enumerate(got):
        actual = tensor[counted] if i < 3 else tensor
        truncates = backend.interpreted and i >= 2 and case.hidden.dtype == torch.bfloat16
        truth.assert_accurate(actual, expected[i], plain[i], truncates=truncates)


def small(backend: Backend, few: int, many: int) -> int:
    return few if backend.interpreted else many


def noted_products(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    products: list[object] = []
    for module, name in product_functions():
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function, **kwargs: products.append(f) or f(*args, **kwargs))
    return products


def product_functions() -> list[tuple[Any, str]]:
    """What multiplies matrices in the linear family: torch, and the native module."""
    found: list[tuple[Any, str]] = [(torch, "mm"), (torch, "addmm")]
    if dispatch.available()["cpu"] is None:
        found.append((importlib.import_module("rlhf_kernels._native"), "matmul"))
    return found


def check_logits_in_the_memory_of_the_weight_gradient(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as from logits made again, in a first backward and in a last; also in a first chunk of several."""
    case, device = head(40, 32, 200, dtype), backend.device
    mask = (torch.arange(40) % 5 != 2).to(device)
    for workspace in (2 * 16 * (case.hidden.element_size() + 4) * 32, 64 << 20):  # 16 rows a chunk; one chunk
        upstream = [g.to(device) for g in linear_truth.upstream(case.labels.shape)]
        found = []
        for kept in (False, True):
            leaves = [x.to(device).detach().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
            with monkeypatch.context() as patch:
                if not kept:
                    patch.setattr(ChunkedHead, "fits_weight_gradient", lambda _: False)
                outputs = rk.linear_logprobs(
                    leaves[0],
                    leaves[1],
                    case.labels.to(device),
                    bias=leaves[2],
                    mask=mask,
                    softcap=5.0,
                    with_entropy=True,
                    workspace=workspace,
                )
            found += [torch.autograd.grad(outputs, leaves, upstream, retain_graph=again) for again in (True, False)]
        for grads in zip(*found, strict=True):
            assert all(torch.equal(x, grads[0]) for x in grads)
