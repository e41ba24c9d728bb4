"""What a sweep's chunks add up to: the gradients of hidden, weight, bias and of a low-rank addition to the weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rlhf_kernels.ops.linear.call import Wanted
from rlhf_kernels.ops.linear.chunks import TILE_BYTES, ChunkedHead, RowChunk
from rlhf_kernels.ops.linear.shards import summed

PIECE_BYTES = 1 << 20  # of a float32 product that is rounded at once, for each thread


class GradAccumulator:
    """The gradient of a matrix [V, K]: a sum over chunks, tile by tile of its rows.

    A sum of several 16-bit GEMMs is accumulated in fp32 and rounded once.
    """

    def __init__(self, sweep: ChunkedHead, like: Tensor, wanted: bool, result: Tensor | None = None) -> None:
        """result: memory for it."""
        self._sweep = sweep
        allocate, shape = sweep.backend.allocate, tuple(like.shape)
        self._result = allocate(shape if wanted else (0,), like.dtype, like.device) if result is None else result
        one_product = sweep.chunks <= 1 and like.dtype == sweep.call.weight.dtype
        self._in_place = not wanted or one_product or like.dtype == torch.float32
        self._sum = self._result if self._in_place else allocate(shape, torch.float32, like.device)
        self.is_first_add = True

    def add(self, columns: slice, a: Tensor, b: Tensor) -> None:
        total = self._sum[columns]
        step = _rows_of_product(a, b, total, self._sweep.dtype == torch.float32)
        for some in (slice(start, start + step) for start in range(0, a.shape[0], step)):
            accumulate(self._sweep, total[some], a[some], b, is_first_add=self.is_first_add)

    def finish(self) -> Tensor:
        if self.is_first_add:
            return self._result.zero_()
        return self._result if self._in_place else self._result.copy_(self._sum)


class Gradients:
    """Those of the head's inputs that are wanted, summed over tiles and chunks; zero elements for one that is not."""

    def __init__(self, sweep: ChunkedHead, wanted: Wanted, weight_gradient: Tensor | None = None) -> None:
        """weight_gradient: memory for dW."""
        call = sweep.call
        hidden, weight = call.hidden, call.weight
        self._like_bias = weight if call.bias is None else call.bias
        self._sweep, self.wanted = sweep, wanted
        self.hidden = torch.zeros(hidden.shape if wanted.hidden else 0, dtype=hidden.dtype, device=hidden.device)
        self._weight = GradAccumulator(sweep, weight, wanted.weight, weight_gradient)
        self._bias = weight.new_zeros(weight.shape[0] if wanted.bias else 0, dtype=torch.float32)
        like_a, like_b = (weight[:0] if x is None else x for x in (call.lora_a, call.lora_b))
        self._lora_a = like_a.new_zeros(like_a.shape if wanted.lora_a else (0,), dtype=torch.float32)
        self._like_a, self._lora_b = like_a, GradAccumulator(sweep, like_b, wanted.lora_b)

    def add(self, chunk: RowChunk, tiles: Iterable[tuple[slice, Tensor]]) -> None:
        """Add a chunk's share: the gradient of its logits before the bias, tile by tile, and kept as a whole or not."""
        sweep, weight, wanted = self._sweep, self._sweep.call.weight, self.wanted
        by_hidden, by_low = None, None
        if wanted.hidden and (chunk.logits_before_bias is None or sweep.call.group or sweep.widens):
            by_hidden = weight.new_zeros(chunk.hidden.shape, dtype=torch.float32)
        if chunk.lora_hidden is not None and (wanted.hidden or wanted.lora_a):
            by_low = weight.new_zeros(chunk.lora_hidden.shape, dtype=torch.float32)
        for columns, grad in tiles:
            low = sweep.lora_b(columns)
            if by_hidden is not None:
                accumulate(sweep, by_hidden, grad, weight[columns])
            if by_low is not None and low is not None:
                accumulate(sweep, by_low, grad, low)
            if wanted.weight:
                self._weight.add(columns, grad.T, chunk.hidden)
            if wanted.lora_b and chunk.lora_hidden is not None:
                self._lora_b.add(columns, grad.T, chunk.lora_hidden)
            if wanted.bias:
                self._bias[columns] += grad.sum(0, dtype=torch.float32)
        self._weight.is_first_add = self._lora_b.is_first_add = False
        narrow = None if by_low is None else by_low.to(sweep.dtype)
        if wanted.lora_a and narrow is not None:
            accumulate(sweep, self._lora_a, narrow.T, chunk.hidden, round_a=False)
        if by_hidden is not None:
            self._add_hidden(chunk, by_hidden, narrow)
        elif wanted.hidden:
            self._add_hidden_at_once(chunk, narrow)

    def _add_hidden(self, chunk: RowChunk, by_hidden: Tensor, by_low: Tensor | None) -> None:
        """A chunk's dH from its sum over tiles."""
        if by_low is not None and self._sweep.lora_a is not None:
            accumulate(self._sweep, by_hidden, by_low, self._sweep.lora_a)
        if self._sweep.call.group:  # each rank has the share of its tokens
            summed(by_hidden, self._sweep.call.group)
        self.hidden.flatten(0, 1)[chunk.row_indices] = by_hidden.to(self.hidden.dtype)

    def _add_hidden_at_once(self, chunk: RowChunk, by_low: Tensor | None) -> None:
        """A chunk's dH in one GEMM from its kept products."""
        assert chunk.logits_before_bias is not None
        flat, weight = self.hidden.flatten(0, 1), self._sweep.call.weight
        to = flat[chunk.row_indices] if isinstance(chunk.row_indices, slice) else torch.empty_like(chunk.hidden)
        low = by_low is not None and self._sweep.lora_a is not None
        if by_low is not None and self._sweep.lora_a is not None:
            accumulate(self._sweep, to, by_low, self._sweep.lora_a, is_first_add=True)
        accumulate(self._sweep, to, chunk.logits_before_bias, weight, is_first_add=not low)
        if not isinstance(chunk.row_indices, slice):
            flat[chunk.row_indices] = to

    def finish(self) -> tuple[Tensor, ...]:
        if self.wanted.lora_a and self._sweep.call.group:
            summed(self._lora_a, self._sweep.call.group)
        return (
            self.hidden,
            self._weight.finish(),
            self._bias.to(self._like_bias.dtype),
            self._lora_a.to(self._like_a.dtype),
            self._lora_b.finish(),
        )


def _rows_of_product(a: Tensor, b: Tensor, total: Tensor, fp32: bool) -> int:
    """Of a @ b at a time, so that what it takes beside the sum stays within a tile's memory."""
    if fp32 and total.dtype == torch.float32:
        return max(1, a.shape[0])
    if fp32 and a.device.type == "cpu":  # the product, still in the cache when it is rounded
        return max(256, PIECE_BYTES * torch.get_num_threads() // (4 * b.shape[1]))
    # The product itself; of 16 bits torch's GEMM may hold it in fp32 too on a CPU.
    each = 4 if fp32 else a.element_size() + (4 if a.device.type == "cpu" and a.element_size() == 2 else 0)
    return max(64, TILE_BYTES // (each * b.shape[1]))


def accumulate(
    sweep: ChunkedHead, total: Tensor, a: Tensor, b: Tensor, *, is_first_add: bool = False, round_a: bool = True
) -> None:
    """total += a @ b, or = where it is fresh. round_a: a is a tile's gradient, and may be rounded to b's 16 bits."""
    if sweep.dtype == torch.float32 and total.dtype == torch.float32:
        sweep.backend.fp32_product(a, b, out=total, accumulate=not is_first_add, round_a=round_a)
    elif sweep.dtype == torch.float32:
        product = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
        sweep.backend.fp32_product(a, b, out=product, round_a=round_a)
        total.copy_(product) if is_first_add else total.add_(product)
    elif is_first_add and total.dtype == a.dtype:
        torch.mm(a, b, out=total)
    elif is_first_add:
        total.copy_(torch.mm(a, b))
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total.add_(torch.mm(a, b))
