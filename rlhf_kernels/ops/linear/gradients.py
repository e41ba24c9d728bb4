"""What a sweep's chunks add up to: the gradients of hidden, weight, bias and of a low-rank addition to the weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rlhf_kernels.ops.linear.chunks import TILE_BYTES, Rows, Sweep
from rlhf_kernels.ops.linear.shards import summed


class _Total:
    """The gradient of a matrix [V, K]: a sum over chunks, tile by tile of its rows.

    A sum of several 16-bit GEMMs is accumulated in fp32 and rounded once.
    """

    def __init__(self, sweep: Sweep, like: Tensor, wanted: bool, result: Tensor | None = None) -> None:
        """result: memory for it."""
        allocate, shape = sweep.backend.allocate, tuple(like.shape)
        self._result = allocate(shape if wanted else (0,), like.dtype, like.device) if result is None else result
        one_product = sweep.chunks <= 1 and like.dtype == sweep.head.weight.dtype
        self._in_place = not wanted or one_product or like.dtype == torch.float32
        self._sum = self._result if self._in_place else allocate(shape, torch.float32, like.device)
        self.fresh = True

    def add(self, part: slice, a: Tensor, b: Tensor) -> None:
        total = self._sum[part]
        step = _rows_of_product(a, b, total)
        for some in (slice(start, start + step) for start in range(0, a.shape[0], step)):
            if self.fresh and total.dtype == a.dtype:
                torch.mm(a[some], b, out=total[some])
            else:
                accumulate(total[some], a[some], b, fresh=self.fresh)

    def finish(self) -> Tensor:
        if self.fresh:
            return self._result.zero_()
        return self._result if self._in_place else self._result.copy_(self._sum)


class Gradients:
    """Those of hidden, weight, bias, lora_a and lora_b that are wanted, summed over tiles and chunks.

    Zero elements stand for one that is not.
    """

    def __init__(self, sweep: Sweep, hidden: Tensor, wanted: Sequence[bool], weight: Tensor | None = None) -> None:
        """weight: memory for dW."""
        head, place = sweep.head, weight
        weight, self._like_bias = head.weight, head.weight if head.bias is None else head.bias
        self._sweep, self._wanted = sweep, wanted
        self.hidden = torch.zeros(hidden.shape if wanted[0] else 0, dtype=hidden.dtype, device=hidden.device)
        self._weight = _Total(sweep, weight, wanted[1], place)
        self._bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=torch.float32)
        like_a, like_b = (weight[:0] if x is None else x for x in (head.lora_a, head.lora_b))
        self._lora_a = like_a.new_zeros(like_a.shape if wanted[3] else (0,), dtype=torch.float32)
        self._like_a, self._lora_b = like_a, _Total(sweep, like_b, wanted[4])

    def add(self, rows: Rows, tiles: Iterable[tuple[slice, Tensor]]) -> None:
        """A chunk's share: the gradient of its products, tile by tile; rows.products, if kept, is all of it."""
        sweep, weight = self._sweep, self._sweep.head.weight
        want_hidden, want_weight, want_bias, want_a, want_b = self._wanted
        by_hidden, by_low = None, None
        if want_hidden and (rows.products is None or sweep.head.group or sweep.widens):
            by_hidden = weight.new_zeros(rows.hidden.shape, dtype=torch.float32)
        if rows.low is not None and (want_hidden or want_a):
            by_low = weight.new_zeros(rows.low.shape, dtype=torch.float32)
        for part, grad in tiles:
            low = sweep.lora_b(part)
            if by_hidden is not None:
                accumulate(by_hidden, grad, sweep.weight(part))
            if by_low is not None and low is not None:
                accumulate(by_low, grad, low)
            if want_weight:
                self._weight.add(part, grad.T, rows.hidden)
            if want_b and rows.low is not None:
                self._lora_b.add(part, grad.T, rows.low)
            if want_bias:
                self._bias[part] += grad.sum(0, dtype=torch.float32)
        self._weight.fresh = self._lora_b.fresh = False
        narrow = None if by_low is None else by_low.to(sweep.dtype)
        if want_a and narrow is not None:
            accumulate(self._lora_a, narrow.T, rows.hidden)
        if by_hidden is not None:
            self._add_hidden(rows, by_hidden, narrow)
        elif want_hidden:
            self._add_hidden_at_once(rows, narrow)

    def _add_hidden(self, rows: Rows, by_hidden: Tensor, by_low: Tensor | None) -> None:
        """A chunk's dH from its sum over tiles."""
        if by_low is not None and self._sweep.lora_a is not None:
            accumulate(by_hidden, by_low, self._sweep.lora_a)
        if self._sweep.head.group:  # each rank has the share of its tokens
            summed(by_hidden, self._sweep.head.group)
        self.hidden.flatten(0, 1)[rows.places] = by_hidden.to(self.hidden.dtype)

    def _add_hidden_at_once(self, rows: Rows, by_low: Tensor | None) -> None:
        """A chunk's dH in one GEMM from its kept products."""
        assert rows.products is not None
        flat, weight = self.hidden.flatten(0, 1), self._sweep.head.weight
        to = flat[rows.places] if isinstance(rows.places, slice) else torch.empty_like(rows.hidden)
        if by_low is not None and self._sweep.lora_a is not None:
            torch.addmm(torch.mm(by_low, self._sweep.lora_a, out=to), rows.products, weight, out=to)
        else:
            torch.mm(rows.products, weight, out=to)
        if not isinstance(rows.places, slice):
            flat[rows.places] = to

    def finish(self) -> tuple[Tensor, ...]:
        if self._wanted[3] and self._sweep.head.group:
            summed(self._lora_a, self._sweep.head.group)
        return (
            self.hidden,
            self._weight.finish(),
            self._bias.to(self._like_bias.dtype),
            self._lora_a.to(self._like_a.dtype),
            self._lora_b.finish(),
        )


def _rows_of_product(a: Tensor, b: Tensor, total: Tensor) -> int:
    """Of a @ b at a time, so that what it takes beside the sum, in 16 bits, stays within a tile's memory."""
    if a.dtype == total.dtype == torch.float32:
        return max(1, a.shape[0])
    # The product itself; of 16 bits torch's GEMM may hold it in fp32 too on a CPU.
    each = a.element_size() + (4 if a.device.type == "cpu" and a.element_size() == 2 else 0)
    return max(64, TILE_BYTES // (each * b.shape[1]))


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """total += a @ b, or = where it is fresh, in any dtype; else total is float32. a and b are of one dtype."""
    if a.dtype == total.dtype == torch.float32:
        torch.addmm(total, a, b, beta=0 if fresh else 1, out=total)
    elif fresh:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))
