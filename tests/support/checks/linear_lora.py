"""One call of linear_logprobs with a low-rank addition to the head, its errors beside PEFT's."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import linear_truth, truth
from support.backends import Backend
from support.checks.linear import head
from support.linear_truth import Case

D, V, N = 16, 61, 8


Adapters = list[tuple[Tensor, Tensor, float]]


def adapters(dtype: torch.dtype = torch.float32, width: int = D) -> Adapters:
    """Two of different rank; their products are about as large as the weight."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [(normal(r, width).to(dtype), (normal(V, r) / 3).to(dtype), scale) for r, scale in ((3, 0.5), (2, -0.7))]


NORMAL = torch.randn(3, N, generator=torch.Generator().manual_seed(2))


def peft_errors(case: Case, low: Adapters, g: Tensor) -> list[float]:
    """Largest errors of logprobs, dH, dA, dB where the adapter's product is added to the logits, as PEFT does."""
    worst = torch.zeros(4, dtype=torch.float64)
    for step in range(16):
        hidden = (case.hidden * (1 - step / 128)).to(case.hidden.dtype)
        leaves = [x.clone().requires_grad_() for x in (hidden, *low[0][:2])]
        logits = torch.nn.functional.linear(leaves[0], case.weight)
        logits = (logits + leaves[0].to(leaves[1].dtype) @ leaves[1].T @ leaves[2].T * low[0][2]).to(logits.dtype)
        found = logits.float().log_softmax(-1).gather(-1, case.labels.unsqueeze(-1)).squeeze(-1)
        values = [found, *torch.autograd.grad(found, leaves, g)]
        exact = low_rank_truth(case._replace(hidden=hidden), low, g)
        errors = [truth.max_error(a, b) for a, b in zip(values, exact, strict=True)]
        worst = torch.maximum(worst, torch.tensor(errors, dtype=torch.float64))
    return worst.tolist()


def low_rank_truth(case: Case, low: Adapters, g: Tensor) -> list[Tensor]:
    """logprobs, dH, dA, dB in float64 of one adapter: the chain rule through the merged weight's gradient."""
    a, b, scale = low[0][0].double(), low[0][1].double(), low[0][2]
    whole = case._replace(weight=case.weight.double() + scale * b @ a)
    values, _, by_hidden, by_weight, _ = linear_truth.logprobs(whole, g, torch.zeros_like(g))
    return [values, by_hidden, scale * b.T @ by_weight, scale * by_weight @ a.T]


def check_errors_beside_peft(backend: Backend, dtype: torch.dtype, of_adapter: torch.dtype) -> None:
    """At most twice PEFT's, also with its float32 adapters beside a 16-bit base; each gradient in its own dtype."""
    device, case, low = backend.device, head(N, D, V, dtype, bias=False), adapters(of_adapter)[:1]
    g = NORMAL[0]
    expected, plain = low_rank_truth(case, low, g), peft_errors(case, low, g)
    for workspace in (1500, 64 << 20):
        leaves = [x.to(device).detach().requires_grad_() for x in (case.hidden, *low[0][:2])]
        values = rk.linear_logprobs(
            leaves[0],
            case.weight.to(device),
            case.labels.to(device),
            lora=(leaves[1], leaves[2], low[0][2]),
            workspace=workspace,
        )
        found = torch.autograd.grad(values, leaves, g.to(device))
        assert [x.dtype for x in found] == [dtype, of_adapter, of_adapter]
        for i, got in enumerate([values.detach(), *found]):
            truncates = backend.interpreted and i > 0 and dtype == torch.bfloat16
            truth.assert_accurate(got.cpu(), expected[i], plain[i], truncates=truncates)
