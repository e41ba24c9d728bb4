"""One call of gae over packed sequences against each of them alone."""

from __future__ import annotations

import torch
from torch import Tensor

from support.backends import Backend
from support.checks import scan


def offsets_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed_case(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values [total], bootstrap [S]."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return tuple(torch.randn(size, generator=generator) for size in (total, total, len(lengths)))


def check(
    backend: Backend,
    lengths: list[int],
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    masked: str = "skip",
    gamma: float = 0.97,
    lam: float = 0.95,
    dtype: torch.dtype = torch.int64,
) -> None:
    """One packed call: the bits of a padded call on each sequence, which others compare with float64."""
    options = {"gamma": gamma, "lam": lam, "masked": masked}
    offsets = offsets_of(lengths, dtype)
    got = scan.run(backend, rewards, values, mask, bootstrap=bootstrap, cu_seqlens=offsets, **options)
    pieces = [None if x is None else x.split(lengths) for x in (rewards, values, mask)]
    for s in range(len(lengths)):
        r, v, m = (None if piece is None else piece[s] for piece in pieces)
        end = None if bootstrap is None else bootstrap[s]
        alone = scan.run(backend, r, v, m, bootstrap=end, **options)
        for packed, one in zip(got, alone, strict=True):
            assert torch.equal(packed[offsets[s] : offsets[s + 1]].nan_to_num(7.0), one.nan_to_num(7.0)), s
