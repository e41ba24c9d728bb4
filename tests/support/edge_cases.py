"""Inputs that break kernels: logits by class of value, by layout in memory, and rows that nobody may read."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

NEG_INF, POS_INF, NAN = float("-inf"), float("inf"), float("nan")


def _with(columns: slice, value: float) -> Callable[[Tensor], Tensor]:
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., columns] = value
        return x

    return write


def _inf_prefix(x: Tensor) -> Tensor:
    return _with(slice(0, (9 * x.shape[-1]) // 10), NEG_INF)(x)


def _inf_tail(x: Tensor) -> Tensor:
    return _with(slice(x.shape[-1] // 10 + 1, None), NEG_INF)(x)


# Class of value -> logits of that class from standard normal ones.
LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: 3 * x,
    "wide": lambda x: 30 + 2 * x,
    "huge": lambda x: 1e4 * x.sign() + 3 * x,
    "all very negative": lambda x: -1e4 + 3 * x,
    "beyond exp's range": lambda x: 200 * x,
    "one certain": _with(slice(0, 1), 60.0),
    "equal": torch.zeros_like,
    "denormal": lambda x: 1e-40 * x,
    "-inf prefix": _inf_prefix,
    "-inf tail": _inf_tail,
    "all -inf": lambda x: torch.full_like(x, NEG_INF),
    "a NaN": _with(slice(-1, None), NAN),
    "a +inf": _with(slice(0, 1), POS_INF),
}


def _padded(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), NAN)
    wide[..., :-5] = x
    return wide[..., :-5]


def _offset(x: Tensor) -> Tensor:
    flat = x.new_full((x.numel() + 3,), NAN)
    flat[3:] = x.flatten()
    return flat[3:].view(x.shape)


def _every_second_row(x: Tensor) -> Tensor:
    double = x.new_full((2 * x.shape[0], *x.shape[1:]), NAN)
    double[::2] = x
    return double[::2]


# Layout -> the same numbers as x [B, T, V] somewhere else in memory; what lies between the rows is NaN.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "padded rows": _padded,
    "offset": _offset,
    "every second row": _every_second_row,
    "shifted": lambda x: torch.cat([x, x.new_full((x.shape[0], 1, x.shape[2]), NAN)], 1)[:, :-1],
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}

MASKS: dict[str, Callable[[torch.Size], Tensor | None]] = {
    "none": lambda shape: None,
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "nothing": lambda shape: torch.zeros(shape, dtype=torch.bool),
    "holes": lambda shape: (torch.arange(shape.numel()).view(shape) * 7 % 10) > 3,
    "right padding": lambda shape: torch.arange(shape[-1]).expand(shape) < shape[-1] - shape[-1] // 2,
    "left padding": lambda shape: torch.arange(shape[-1]).expand(shape) >= shape[-1] // 3,
}


def logits_of(value_class: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[..., V] logits of one class, already rounded to `dtype`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return LOGITS[value_class](x).to(dtype)


def labels_for(shape: tuple[int, ...], vocab: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spoil(logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fill what the mask hides with NaN, infinities and labels that point far outside."""
    if mask is None:
        return logits, labels
    garbage = torch.tensor([NAN, POS_INF, NEG_INF])[torch.arange(logits.numel()) % 3].view(logits.shape)
    logits = torch.where(mask.unsqueeze(-1), logits, garbage.to(logits.dtype))
    wild = torch.tensor([-100, 2**31 - 1, -(2**31)])[torch.arange(labels.numel()) % 3].view(labels.shape)
    return logits, torch.where(mask, labels, wild.to(labels.dtype))


def hide(mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The tensors with NaN and infinities wherever the mask is false."""
    if mask is None:
        return list(tensors)
    garbage = torch.tensor([NAN, POS_INF, NEG_INF])[torch.arange(mask.numel()) % 3].view(mask.shape)
    return [torch.where(mask, x, garbage.to(x.dtype)) for x in tensors]


def covered(offsets: list[int], total: int) -> Tensor:
    """[total] how many packed sequences have each position, for offsets of any kind, each taken into [0, total]."""
    inside = [min(max(n, 0), total) for n in offsets]
    count = torch.zeros(total, dtype=torch.int64)
    for begin, end in itertools.pairwise(inside):
        count[begin:end] += 1  # none where they fall
    return count
