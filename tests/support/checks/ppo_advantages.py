"""One call of ppo_advantages against float64."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.reference import scan as reference
from support import edge_cases, truth
from support.backends import Backend

EPS = 1e-8


Rollout = tuple[Tensor, Tensor, Tensor, Tensor]


def rollout(batch: int, time: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Rollout:
    """logprobs, ref_logprobs [B, T], scores [B], values [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(batch, time, generator=generator) * 4
    drift, values = (torch.randn(batch, time, generator=generator) for _ in range(2))
    scores = torch.randn(batch, generator=generator)
    return logprobs.to(dtype), (logprobs + 0.3 * drift).to(dtype), scores, values.to(dtype)


def run(backend: Backend, case: Rollout, mask: Tensor, **options) -> list[Tensor]:
    moved = (x.to(backend.device) for x in (*case, mask))
    return [x.cpu() for x in rk.ppo_advantages(*moved, **{"kl_coef": 0.1, **options})]


def check(backend: Backend, case: Rollout, mask: Tensor, kl_coef=0.1, gamma=0.97, lam=0.95, whiten=True) -> None:
    got = run(backend, case, mask, kl_coef=kl_coef, gamma=gamma, lam=lam, whiten=whiten)
    clean = tuple(x if x.dim() == 1 else torch.where(mask, x, torch.zeros_like(x)) for x in case)
    expected = truth.ppo_advantages(*clean, mask, kl_coef, gamma, lam, whiten)
    errors = [0.0, 0.0, 0.0]
    for draw in range(4):  # rounding errors of slightly scaled inputs too: one draw may be lucky
        scaled = tuple((x * (1 - draw / 64)).to(x.dtype) for x in clean)
        exact = truth.ppo_advantages(*scaled, mask, kl_coef, gamma, lam, whiten)
        plain = reference.ppo_advantages(*scaled, mask, kl_coef, gamma, lam, EPS if whiten else None)
        errors = [
            max(e, truth.max_error(*pair)) for e, pair in zip(errors, zip(plain, exact, strict=True), strict=True)
        ]
    for actual, exact, error in zip(got, expected, errors, strict=True):
        assert actual.dtype == torch.float32
        truth.assert_accurate(actual, exact, error)
        assert (actual[~mask] == 0).all()


def mask_of(kind: str, batch: int, time: int) -> Tensor:
    return edge_cases.MASKS[kind](torch.Size((batch, time)))
