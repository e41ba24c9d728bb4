"""One call of linear_kl against float64 on explicit logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import truth
from support.backends import Backend
from support.linear_truth import Case, chain, logits_and_slope, plain_logits

DIRECTIONS = ["reverse", "forward", "jsd"]


def truth_of(case: Case, other: Case, direction: str, g: Tensor) -> list[Tensor]:
    """KL, dH, dW, db in float64, the gradient by the textbook formulas."""
    (z, slope), (y, _) = logits_and_slope(case), logits_and_slope(other)
    log_p, log_q = (x / case.temperature for x in (z, y))
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if direction == "reverse":
        kl = (p * (log_p - log_q)).sum(-1)
        grad = p * (log_p - log_q - kl.unsqueeze(-1))
    elif direction == "forward":
        kl, grad = (q * (log_q - log_p)).sum(-1), p - q
    else:
        log_m = ((p + q) / 2).log()
        half = (p * (log_p - log_m)).sum(-1)
        kl = (half + (q * (log_q - log_m)).sum(-1)) / 2
        grad = p * (log_p - log_m - half.unsqueeze(-1)) / 2
    by_products = g.double().unsqueeze(-1) * grad / case.temperature * slope
    return [kl, *chain(case, by_products)]


def plain_errors(case: Case, other: Case, direction: str, g: Tensor) -> list[float]:
    """Largest errors of KL, dH, dW, db as people write them: heads as `plain_logits`, fp32 log_softmax, autograd."""
    worst = torch.zeros(4, dtype=torch.float64)
    for step in range(16):
        a, b = (x._replace(hidden=(x.hidden * (1 - step / 64)).to(x.hidden.dtype)) for x in (case, other))
        leaves = [x.clone().requires_grad_() for x in (a.hidden, a.weight, a.bias)]
        log_p = (plain_logits(*leaves, a).float() / a.temperature).log_softmax(-1)
        log_q = (plain_logits(b.hidden, b.weight, b.bias, b).float() / a.temperature).log_softmax(-1)
        if direction == "reverse":
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        elif direction == "forward":
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            kl = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
        found = [kl, *torch.autograd.grad(kl, leaves, g)]
        errors = [truth.max_error(x, y) for x, y in zip(found, truth_of(a, b, direction, g), strict=True)]
        worst = torch.maximum(worst, torch.tensor(errors, dtype=torch.float64))
    return worst.tolist()


def check(
    backend: Backend, case: Case, other: Case, direction: str, mask: Tensor | None = None, **options: object
) -> None:
    leaves = [x.to(backend.device).detach().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    constants = [x.to(backend.device).detach().requires_grad_() for x in (other.hidden, other.weight, other.bias)]
    kl = rk.linear_kl(
        *leaves[:2],
        *constants[:2],
        bias=leaves[2],
        ref_bias=constants[2],
        direction=direction,
        temperature=case.temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        logits_dtype=case.logits_dtype,
        mask=None if mask is None else mask.to(backend.device),
        **options,
    )
    g = torch.randn(kl.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad(kl, leaves + constants, g.to(backend.device), allow_unused=True)
    assert grads[3:] == (None, None, None)
    counted = torch.ones(kl.shape, dtype=torch.bool) if mask is None else mask
    assert (kl[~counted] == 0).all()
    assert (grads[0][~counted] == 0).all()
    rows = [x._replace(hidden=x.hidden[counted]) for x in (case, other)]
    expected = truth_of(*rows, direction, g[counted])
    plain = plain_errors(*rows, direction, g[counted])
    for i, (got, want) in enumerate(zip([kl[counted], grads[0][counted], *grads[1:3]], expected, strict=True)):
        truncates = backend.interpreted and i > 0 and case.hidden.dtype == torch.bfloat16
        truth.assert_accurate(got, want, plain[i], truncates=truncates)
