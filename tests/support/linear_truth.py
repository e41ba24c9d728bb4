"""What the linear family shall return, in float64: explicit logits, truth's logits ops, the chain rule by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from support import truth


class Case(NamedTuple):
    """Rows that count only: hidden [N, D], weight [V, D], bias [V] or None, labels [N]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    logits_dtype: torch.dtype | None = torch.float32


def upstream(shape: torch.Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def logits_and_slope(case: Case) -> tuple[Tensor, Tensor]:
    """float64 logits [N, V] and their derivative by hidden @ weight.T."""
    z = case.hidden.double() @ case.weight.double().T
    if case.bias is not None:
        z = z + case.bias.double()
    z = z * case.logit_scale
    if case.softcap is None:
        return z, torch.full_like(z, case.logit_scale)
    t = torch.tanh(z / case.softcap)
    return case.softcap * t, case.logit_scale * (1 - t * t)


def chain(case: Case, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dH, dW, db from the gradient of hidden @ weight.T, all float64."""
    return grad @ case.weight.double(), grad.T @ case.hidden.double(), grad.sum(0)


def logprobs(case: Case, g: Tensor, g_entropy: Tensor) -> list[Tensor]:
    """logprobs, entropy, dH, dW, db."""
    z, slope = logits_and_slope(case)
    values, entropy, grad = truth.selected_logprobs(z, case.labels, case.temperature, g, g_entropy)
    return [values, entropy, *chain(case, grad * slope)]


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    """As careful people write it: the head in float32; as models do with logits_dtype None: in its own dtype."""
    if case.logits_dtype is not None:
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    z = torch.nn.functional.linear(hidden, weight, bias) * case.logit_scale
    return z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)


def plain_logprobs_errors(case: Case, g: Tensor, g_entropy: Tensor) -> list[float]:
    """Largest errors of logprobs, entropy, dH, dW, db as people write them: the head as `plain_logits`, then fp32.

    Over several slightly scaled hidden states, because one draw of rounding errors in a few rows may be lucky.
    """
    worst = torch.zeros(5, dtype=torch.float64)
    # The fewer the elements, the more draws: the largest of a handful of rounding errors says little.
    size = case.hidden.shape[0] * case.weight.shape[0]
    draws = 60 if size < 500 else 16 if size < 20_000 else 3
    divisor = case.temperature.unsqueeze(-1) if isinstance(case.temperature, Tensor) else case.temperature
    chosen = case.labels.long().unsqueeze(-1)
    for step in range(draws):
        one = case._replace(hidden=(case.hidden * (1 - step / 128)).to(case.hidden.dtype))
        exact = logprobs(one, g, g_entropy)
        leaves = [one.hidden.clone().requires_grad_(), one.weight.clone().requires_grad_()]
        if one.bias is not None:
            leaves.append(one.bias.clone().requires_grad_())
        z = plain_logits(leaves[0], leaves[1], leaves[2] if one.bias is not None else None, one).float() / divisor
        log_p = z.log_softmax(-1)
        surprise = log_p.exp() * log_p.masked_fill(log_p == truth.NEG_INF, 0.0)
        outputs = [log_p.gather(-1, chosen).squeeze(-1), -surprise.sum(-1)]
        found = [*outputs, *torch.autograd.grad(outputs, leaves, [g, g_entropy])]
        errors = [truth.max_error(a, b) for a, b in zip(found, exact, strict=False)]
        worst = torch.maximum(worst, torch.tensor([*errors, 0.0][:5], dtype=torch.float64))
    return worst.tolist()
