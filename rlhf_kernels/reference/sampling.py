"""Drawing the next token by inverse CDF: the first column at which the running sum of exp((x - max) / T) exceeds
u times the total, over the columns that top-k and top-p keep."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_kernels.reference.common import select, upcast

# splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195): its step and its finaliser's factors, as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Of the 64 bits as an unsigned number, which torch's shift of an int64 is not."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _FACTORS[0]
    x = (x ^ _shift_right(x, 27)) * _FACTORS[1]
    return x ^ _shift_right(x, 31)


def uniforms(seed: int, count: int, device: torch.device) -> Tensor:
    """[count] float64 in [0, 1), 53 random bits each: a function of (seed, index) alone, the same on every device."""
    # The seed is mixed first: else seed + _STEP would give the same numbers moved by one.
    key = _mix(torch.full((1,), seed, dtype=torch.int64, device=device))
    bits = _mix(key + _STEP * torch.arange(1, count + 1, device=device))
    return _shift_right(bits, 11).double() * 2.0**-53


def _tree(mass: Tensor) -> list[Tensor]:
    """mass [..., V] -> itself and its sums by pairs, pairs of pairs and so on, up to the total [..., 1].

    Their bits do not depend on the batch, as those of torch.cumsum may.
    """
    levels = [mass]
    while levels[-1].shape[-1] > 1:
        if levels[-1].shape[-1] % 2:
            levels[-1] = pad(levels[-1], (0, 1))
        left, right = levels[-1].unflatten(-1, (-1, 2)).unbind(-1)
        levels.append(left + right)
    return levels


def _descend(levels: list[Tensor], target: Tensor, or_equal: bool) -> Tensor:
    """The first column at which the running sum is > (or >=) target [...].

    Never a column of mass 0 while there is another: where rounding says to go past the last one, it stays there.
    """
    place = torch.zeros_like(target, dtype=torch.int64)
    for level in reversed(levels[:-1]):
        children = 2 * place.unsqueeze(-1)
        left, right = level.gather(-1, children).squeeze(-1), level.gather(-1, children + 1).squeeze(-1)
        past = ((target > left) if or_equal else (target >= left)) & (right > 0)
        target = torch.where(past, target - left, target)
        place = 2 * place + past
    return place


def _keep(x: Tensor, mass: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """mass with 0 wherever the logits x [..., V] are below the k-th largest, and then below the nucleus."""
    if top_k is None and top_p is None:
        return mass
    ranked, order = x.sort(-1, descending=True)
    if top_k is not None:
        rank = torch.full_like(order.narrow(-1, 0, 1), top_k - 1).clamp(max=x.shape[-1] - 1)
        mass = torch.where(x >= ranked.gather(-1, rank), mass, 0.0)
    if top_p is not None:
        levels = _tree(mass.gather(-1, order))
        place = _descend(levels, top_p * levels[-1].squeeze(-1), True).unsqueeze(-1)
        mass = torch.where(x >= ranked.gather(-1, place), mass, 0.0)
    return mass


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor]:
    """logits [..., V], uniform [...] float64, temperature [...] -> tokens int64, logprobs [...]."""
    x = upcast(logits)
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0.0)
    top = x.amax(-1, keepdim=True)
    bad = ~top.isfinite().squeeze(-1)  # a NaN or +inf is the maximum, and so is -inf where there is nothing else
    z = (x - top) / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    levels = _tree(_keep(x, z.exp().double(), top_k, top_p))
    total = levels[-1].squeeze(-1)
    tokens = _descend(levels, uniform * total, False)
    chosen = z.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    logprobs = torch.where(bad, float("nan"), chosen.double() - total.log()).to(x.dtype)
    return select(mask, torch.where(bad, 0, tokens), 0), select(mask, logprobs)
