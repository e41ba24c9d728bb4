"""One call of linear_logprobs under a frozen head against float64."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import linear_truth, truth
from support.backends import Backend
from support.linear_truth import Case


def frozen(backend: Backend, case: Case, mask: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    """logprobs, and hidden as a leaf; the head wants no gradient."""
    hidden = case.hidden.to(backend.device).detach().requires_grad_()
    temperature = case.temperature
    logprobs = rk.linear_logprobs(
        hidden,
        case.weight.to(backend.device),
        case.labels.to(backend.device),
        bias=None if case.bias is None else case.bias.to(backend.device),
        temperature=temperature.to(backend.device) if isinstance(temperature, Tensor) else temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        logits_dtype=case.logits_dtype,
        mask=None if mask is None else mask.to(backend.device),
        **options,
    )
    return logprobs, hidden


def check(backend: Backend, case: Case, mask: Tensor | None = None, **options) -> None:
    """dH against truth, exactly 0 where masked; logprobs with the bits of a call without gradients."""
    logprobs, hidden = frozen(backend, case, mask, **options)
    shape = case.labels.shape
    counted = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    upstream = linear_truth.upstream(shape)[0]
    upstream = torch.where(counted, upstream, float("nan"))  # not looked at
    (found,) = torch.autograd.grad(logprobs, hidden, upstream.to(backend.device))
    with torch.no_grad():
        assert torch.equal(frozen(backend, case, mask, **options)[0], logprobs)
    assert found.dtype == case.hidden.dtype
    assert found.shape == case.hidden.shape
    found = found.cpu()
    assert (found[~counted] == 0).all()
    rows = case._replace(hidden=case.hidden[counted], labels=case.labels[counted])
    if isinstance(case.temperature, Tensor):
        rows = rows._replace(temperature=case.temperature.expand(shape)[counted])
    g = upstream[counted], torch.zeros(int(counted.sum()))
    plain = linear_truth.plain_logprobs_errors(rows, *g)[2]
    truncates = backend.interpreted and case.hidden.dtype == torch.bfloat16
    truth.assert_accurate(found[counted], linear_truth.logprobs(rows, *g)[2], plain, truncates=truncates)
