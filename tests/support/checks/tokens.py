"""One call of shaped_rewards against its definition."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import truth
from support.backends import Backend


def check_rewards(backend: Backend, scores: Tensor, kl: Tensor, mask: Tensor, clip: float | None) -> None:
    """Against the definition, token by token; kl may hold anything where the mask is false."""
    moved = (x.to(backend.device) for x in (scores, kl, mask))
    rewards = rk.shaped_rewards(*moved, kl_coef=0.3, clip=clip)
    assert rewards.dtype == torch.float32
    assert not rewards.requires_grad
    expected = torch.zeros(kl.shape, dtype=torch.float64)
    plain = torch.zeros(kl.shape)
    for b in range(len(kl)):
        places = mask[b].nonzero().flatten()
        expected[b, places] = -0.3 * kl[b, places].double()
        plain[b, places] = -0.3 * kl[b, places].float()
        if len(places):
            score = scores[b] if clip is None else scores[b].clamp(-clip, clip)
            expected[b, places[-1]] += score.double()
            plain[b, places[-1]] += score.float()
    truth.assert_accurate(rewards, expected, truth.max_error(plain, expected))
    assert (rewards.cpu()[~mask] == 0).all()
