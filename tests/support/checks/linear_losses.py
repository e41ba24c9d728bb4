"""One call of linear_policy_loss against float64 on explicit logits."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import edge_cases, linear_truth
from support.backends import Backend
from support.checks.linear import head
from support.linear_truth import Case

B, T, D, V = 3, 6, 16, 70


class Rollout:
    """A head's rows as sequences, near enough to the old policy that some tokens clip and some do not."""

    def __init__(self, case: Case, mask: Tensor | None, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.case, self.mask = case, mask
        z, _ = linear_truth.logits_and_slope(case)
        logprobs = z.log_softmax(-1).gather(-1, case.labels.unsqueeze(-1)).view(B, T)
        noise = torch.randn(4, B, T, generator=generator)
        self.old = (logprobs + 0.3 * noise[0]).float()
        self.advantages = noise[1]
        self.advantages[1, 2] = 0.0
        self.ref = (logprobs + 0.2 * noise[2]).float()
        self.importance = noise[3].abs()
        self.hidden = case.hidden.view(B, T, D)
        self.labels = case.labels.view(B, T)
        if mask is not None:
            self.hidden, self.labels = edge_cases.spoil(self.hidden, self.labels, mask)
            self.old, self.advantages, self.ref = edge_cases.hide(mask, self.old, self.advantages, self.ref)


def rollout(dtype: torch.dtype = torch.float32, kind: str = "holes", **options) -> Rollout:
    return Rollout(head(B * T, D, V, dtype)._replace(**options), edge_cases.MASKS[kind](torch.Size((B, T))))


def leaves_of(backend: Backend, data: Rollout, dtype: torch.dtype | None = None) -> list[Tensor]:
    tensors = (data.hidden, data.case.weight, data.case.bias)
    return [x.to(backend.device, dtype).detach().requires_grad_() for x in tensors]


def call(backend: Backend, data: Rollout, leaves: list[Tensor], **options) -> tuple[Tensor, dict[str, Tensor]]:
    def moved(x: object) -> object:
        return x.to(backend.device) if isinstance(x, Tensor) else x

    arguments = map(moved, (data.labels, data.old, data.advantages, data.mask))
    head_options = {"bias": leaves[2], "softcap": data.case.softcap, "logit_scale": data.case.logit_scale}
    head_options["logits_dtype"] = data.case.logits_dtype
    options = {name: moved(x) for name, x in {**head_options, **options}.items()}
    return rk.linear_policy_loss(*leaves[:2], *arguments, **options)


def exact(data: Rollout, coefficients: dict, **options) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """float64: explicit logits, the token losses written out, torch's autograd."""
    leaves = leaves_of(Backend("reference", "cpu"), data, torch.float64)
    mask = torch.ones(B, T, dtype=torch.bool) if data.mask is None else data.mask
    h = torch.where(mask.unsqueeze(-1), leaves[0], 0.0)
    z = (h @ leaves[1].T + leaves[2]) * data.case.logit_scale
    if data.case.softcap is not None:
        z = data.case.softcap * torch.tanh(z / data.case.softcap)
    log_p = (z / options.pop("temperature", 1.0)).log_softmax(-1)
    labels = torch.where(mask, data.labels, 0)
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    old, advantages = (torch.where(mask, x.double(), 0.0) for x in (data.old, data.advantages))
    loss, stats = rk.policy_loss(logprobs, old, advantages, mask, **options)
    rest = {name: options[name] for name in ("aggregate", "denominator") if name in options}
    if coefficients.get("entropy_coef"):
        entropy = -(log_p.exp() * log_p).sum(-1)
        loss = loss - coefficients["entropy_coef"] * aggregated(entropy, mask, **rest)
    if coefficients.get("ref_logprobs") is not None:
        d = logprobs - torch.where(mask, data.ref.double(), 0.0)
        estimators = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d, "abs": d.abs()}
        kl = estimators[coefficients.get("kl_estimator", "k3")]
        loss = loss + coefficients["kl_coef"] * aggregated(kl, mask, **rest)
    return loss, stats, list(torch.autograd.grad(loss, leaves))


def aggregated(x: Tensor, mask: Tensor, aggregate: str = "token-mean", denominator: float | None = None) -> Tensor:
    x = torch.where(mask, x, 0.0)
    tokens = mask.sum(-1)
    if aggregate == "seq-mean-token-mean":
        return (x.sum(-1) / tokens.clamp(min=1)).sum() / (denominator or B)
    if aggregate == "seq-mean-token-sum":
        return x.sum() / (denominator or B)
    return x.sum() / (1.0 if aggregate == "token-sum" else denominator or tokens.sum())


def check(
    backend: Backend, data: Rollout, coefficients: dict | None = None, workspace: int = 64 << 20, **options
) -> None:
    coefficients = coefficients or {}
    leaves = leaves_of(backend, data)
    loss, stats = call(backend, data, leaves, workspace=workspace, **coefficients, **options)
    grads = torch.autograd.grad(loss, leaves)
    expected_loss, expected_stats, expected = exact(data, coefficients, **options)
    tolerance = 2e-5 if data.case.hidden.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=tolerance, atol=tolerance)
    for name, value in expected_stats.items():
        torch.testing.assert_close(stats[name].cpu(), value, rtol=tolerance, atol=tolerance)
    assert set(stats) - set(expected_stats) == {
        *(["entropy"] if coefficients.get("entropy_coef") else []),
        *(["kl"] if coefficients.get("ref_logprobs") is not None else []),
    }
    for got, want, leaf in zip(grads, expected, leaves, strict=True):
        assert got.dtype == leaf.dtype
        largest = want.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(got.cpu().double() / largest, want / largest, rtol=0, atol=tolerance)
        assert ((got.cpu() == 0) | (want.abs() > 0)).all()
