"""Exact KL of two rows of logits: sum over the vocabulary of p log(p / q), its reverse, and Jensen-Shannon's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_kernels.reference.common import clamp, row_sum, select, spread, upcast

NEG_INF = float("-inf")


def full_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float | Tensor, direction: str
) -> Tensor:
    """logits, ref_logits [..., V] of one dtype, mask (bool or None) and temperature [...] -> KL [...].

    A row with an infinite reverse KL has the gradient NaN.
    """
    x, y = upcast(logits), upcast(ref_logits.detach())
    if mask is not None:
        x, y = (torch.where(mask.unsqueeze(-1), row, 0.0) for row in (x, y))
    # What one side gives a chance, however small, and the other none.
    beyond = {
        "reverse": (x > NEG_INF) & (y == NEG_INF),
        "forward": (y > NEG_INF) & (x == NEG_INF),
        "jsd": torch.zeros_like(x, dtype=torch.bool),
    }[direction].any(-1)
    m, m_ref = x.detach().amax(-1), y.amax(-1)
    spoilt = ~(m.isfinite() & m_ref.isfinite())
    undefined = spoilt | beyond if direction == "reverse" else spoilt
    divisor = (temperature * torch.where(undefined, float("nan"), 1.0).to(x.dtype)).unsqueeze(-1)
    # The maximum first, then the division: at logits of 1e4 a rounded quotient would cost 5e-4 nats.
    z, z_ref = (x - m.unsqueeze(-1)) / divisor, (y - m_ref.unsqueeze(-1)) / divisor
    e, f = z.exp(), z_ref.exp()
    s, s_ref = row_sum(e), row_sum(f)
    log_ratio_of_sums = s.log() - s_ref.log()
    if direction == "reverse":
        log_ratio = (z - z_ref).masked_fill(e == 0, 0.0)
        # Any constant moves out of the mean; with the mean itself no digits cancel in the gradient of a p near 1.
        mean = (row_sum(e * log_ratio) / s).detach()
        kl = row_sum(e * (log_ratio - mean.unsqueeze(-1))) / s + mean - log_ratio_of_sums
    elif direction == "forward":
        kl = row_sum(f * (z_ref - z).masked_fill(f == 0, 0.0)) / s_ref + log_ratio_of_sums
    else:
        kl = _jsd(z - spread(s.log(), z.shape[-1]), z_ref - s_ref.log().unsqueeze(-1))
    # The gradient of a forward KL stays what it is, (p - q) / T; that of a reverse one is NaN by the divisor.
    infinite = torch.where(beyond & ~spoilt, float("inf"), 0.0).to(kl.dtype)
    kl = torch.where(beyond & ~spoilt, infinite, kl) if direction == "reverse" else kl + infinite
    return select(mask, kl)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half of sum p log(p / m) + q log(q / m), m = (p + q) / 2."""
    p, q = log_p.exp(), log_q.exp()
    log_ratio = (log_p - log_q).masked_fill((p == 0) & (q == 0), 0.0)
    return 0.5 * row_sum(p * _log_over_mixture(log_ratio) + q * _log_over_mixture(-log_ratio))


def _log_over_mixture(log_ratio: Tensor) -> Tensor:
    """log(p / m) = log(2 sigmoid(log(p / q))), m = (p + q) / 2: exactly 0 at 0.

    At -80 p is below 2e-35 q: a smaller ratio changes nothing that p weighs.
    """
    return logsigmoid(clamp(log_ratio, -80.0, math.inf)) - logsigmoid(torch.zeros_like(log_ratio))
