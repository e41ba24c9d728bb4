"""One call of gae against float64."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import truth
from support.backends import Backend

MASKED = ["skip", "stop", "zero"]


def run(backend: Backend, rewards: Tensor, values: Tensor, mask: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    def move(x):
        return x.to(backend.device) if isinstance(x, Tensor) else x

    moved = {name: move(value) for name, value in options.items()}
    advantages, returns = rk.gae(move(rewards), move(values), move(mask), **moved)
    return advantages.cpu(), returns.cpu()


def check(
    backend: Backend,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    masked: str = "skip",
    gamma: float = 0.97,
    lam: float = 0.95,
) -> None:
    """One call against truth; masked places exactly 0."""
    options = {"gamma": gamma, "lam": lam, "bootstrap": bootstrap, "masked": masked}
    got = run(backend, rewards, values, mask, **options)
    if mask is not None:
        hidden = torch.zeros_like(rewards)  # neither truth nor the plain loop shall meet a NaN that the mask hides
        rewards, values = torch.where(mask, rewards, hidden), torch.where(mask, values, hidden)
    expected = truth.gae(rewards, values, mask, bootstrap, gamma, lam, masked)
    errors = truth.gae_loop_error(rewards, values, mask, bootstrap, gamma, lam, masked)
    for actual, exact, error in zip(got, expected, errors, strict=True):
        assert actual.dtype == torch.float32
        truth.assert_accurate(actual, exact, error)
        if mask is not None:
            assert (actual[~mask] == 0).all()
