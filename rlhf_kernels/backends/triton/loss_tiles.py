"""What the two losses' kernels share: which tile of which row a program has, and its partial results merged."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import launch

# 1024 positions over 4 warps; a tile is several blocks, so that partial results stay few. Both fixed: the order of the
# sums depends on them.
BLOCK_T = 1024
TILE = 4096
NUM_WARPS = 4
_FIELDS = 8  # partial results of a program, each a row of the workspace


@triton.jit
def tile_of_program(T, tile):
    """Row, first position and end of what this program has of [R, T]."""
    program = tl.program_id(0)
    tiles = tl.cdiv(T, tile)
    begin = (program % tiles) * tile
    return (program // tiles).to(tl.int64), begin, tl.minimum(begin + tile, T)


@triton.jit
def counted(mask_ptr, t, end):
    inside = t < end
    if mask_ptr is not None:
        inside = tl.load(mask_ptr + t, mask=inside, other=0) != 0
    return inside


@triton.jit
def counted_length(mask_ptr, begin, end, BLOCK_T: tl.constexpr):
    """Counted positions of a tile, at least 1."""
    kept = tl.zeros([BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_T):
        kept += counted(mask_ptr, start + tl.arange(0, BLOCK_T), end).to(tl.float32)
    return tl.maximum(tl.sum(kept, 0), 1.0)


@triton.jit
def total_of(partials_ptr, programs, BLOCK: tl.constexpr):
    """Sum of one field over the programs, in float64 and in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + i, mask=i < programs, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def largest_of(partials_ptr, programs, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(partials_ptr + i, mask=i < programs, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def divisor_of(denominator_ptr, denominator, tokens):
    """What the sum of losses is divided by: a tensor's number, a number, or where that is NaN the count."""
    if denominator_ptr is not None:
        divisor = tl.load(denominator_ptr).to(tl.float64)
    else:
        number = denominator + 0.0 * tokens  # as float64
        divisor = tl.where(number == number, number, tokens)
    return divisor


def as_rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def outputs(x: Tensor, tile: int, stats: int, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """loss, stats, gradient, workspace of partial results, number of programs."""
    rows, T = x.shape
    programs = rows * triton.cdiv(T, tile)

    def new(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    return new(()), new((stats,)), new((rows, T) if with_grad else (0,)), new((_FIELDS, programs)), programs


def finish(
    kernel: object, partials: Tensor, denominator: float | Tensor, loss: Tensor, stats: Tensor, programs: int
) -> None:
    given = denominator if isinstance(denominator, Tensor) else None
    number = math.nan if isinstance(denominator, Tensor) else denominator
    launch(kernel, 1, partials, given, loss, stats, number, programs, BLOCK=BLOCK_T, num_warps=NUM_WARPS)
