"""The sweep over a head's rows: tiles of logits that fit a fixed workspace, each a GEMM by torch and our epilogue.

Rows are taken in chunks, and a chunk's vocabulary in tiles. A tile is a few megabytes, so that the epilogue finds it in
the cache.
Two plans share the code:
- recomputed: one tile of memory; the backward makes the logits again. Chunks are tall, so that dW is mostly one GEMM.
- kept: a chunk's logits stay until its gradient is formed, when that is known in the forward: one GEMM less.

A tile is float32, or of the inputs' 16 bits where the caller wants it so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops.linear.shards import gathered, merged

if TYPE_CHECKING:
    from rlhf_kernels.ops.linear.call import LinearCall

DEFAULT_WORKSPACE = 64 << 20  # bytes
# A tile beyond this gains nothing in the GEMM and leaves the cache: 1024 x 4096 to 1024 x 16384 are the fastest of
# 1024 x 1024 .. 1024 x 50257 on two AVX-512 cores, fp32 and bf16.
TILE_BYTES = 16 << 20
BLOCK = 1024  # columns: tiles are whole blocks of the epilogue
TALLEST = 4096  # rows of a recomputed chunk
# One shape of GEMM for every batch: libraries choose their blocking, and with it the order of the sums, by the shape.
INVARIANT_ROWS, INVARIANT_COLUMNS = 64, 4096


class RowChunk(NamedTuple):
    """One chunk: its rows of the call, their hidden states, labels and temperatures, and their kept products."""

    row_indices: Tensor | slice  # into [N]
    hidden: Tensor  # [R, D]
    lora_hidden: Tensor | None  # [R, r] hidden @ lora_a.T, dtype of the tile
    labels: Tensor  # [R]
    temperature: Tensor | None  # [R], None: the head's
    logits_before_bias: Tensor | None  # [R, V] hidden @ weight.T, None: made again tile by tile
    logits_buffer: Tensor | None  # [V, D], dW's memory: tile i starts at row offset i of dW


class ChunkedHead:
    """One pass over the counted rows of a call: its tiles, their softmax, and the gradient of the products."""

    def __init__(
        self,
        op: str,
        call: LinearCall,
        *,
        keep: bool = False,
        wants_weight: bool = False,
        rows: int | None = None,
        logits_buffer: Tensor | None = None,
    ) -> None:
        """call: by rows. keep: the plan of the two above. wants_weight: whether dW is wanted. rows: of a chunk, instead
        of a plan.

        logits_buffer: where the first chunk's logits are, or are to stay; see `fits_weight_gradient`.
        """
        self.logits_buffer = logits_buffer
        self.backend: ModuleType = dispatch.backend_module(dispatch.require_backend(op, call.hidden))
        self.call, self._labels, hidden = call, call.labels.contiguous(), call.hidden
        self.softcap = None if call.softcap is None else call.softcap.item()
        self.logit_scale, self.head_temperature = call.logit_scale.item(), call.temperature.item()
        self.dtype: torch.dtype = self.backend.logits_dtype(hidden.dtype, call.fp32_logits)
        self.widens = self.dtype != hidden.dtype
        self._bias = None if call.bias is None else call.bias.float().contiguous()
        self.lora_a = None if call.lora_a is None else call.lora_a.to(self.dtype)
        self._hidden = hidden.flatten(0, 1) if hidden.is_contiguous() else hidden
        # The one host sync on a GPU: how many rows count decides how many chunks there are.
        self._counted = None if call.mask is None else call.mask.nonzero().squeeze(-1)
        if self._counted is not None and self._counted.numel() == self._labels.numel():
            self._counted = None
        self.count = self._labels.numel() if self._counted is None else self._counted.numel()
        self._keep = keep
        self._plan(call.workspace, wants_weight, rows)
        columns = call.weight.shape[0] if keep else self._tile_columns
        self._tile = self.backend.allocate((min(self._rows, self.count) * columns,), self.dtype, hidden.device)

    def _plan(self, workspace: int, wants_weight: bool, rows: int | None) -> None:
        """Sets the rows of a chunk and the columns of a tile."""
        hidden_size, vocab = self.call.weight.shape[1], self.call.largest_shard_rows
        size = self.dtype.itemsize
        low = 0 if self.lora_a is None else (size + 4) * self.lora_a.shape[0]  # lora_hidden and its gradient
        if self._keep:
            dh_sum = 4 * hidden_size if self.widens else 0  # over tiles
            per_row = vocab * size + hidden_size * self.call.hidden.element_size() + low + dh_sum
            limit = max(1, workspace // per_row)
            accumulator = 4 * vocab * hidden_size if wants_weight and self.call.weight.element_size() == 2 else 0
            if self.count * per_row <= workspace + accumulator:
                # A larger chunk costs no more than the fp32 accumulator it makes unnecessary.
                limit = max(limit, self.count)
            chunks = -(-self.count // limit)
            if chunks > 1 and -(-self.count // (chunks - 1)) * per_row <= workspace + workspace // 4:
                chunks -= 1
        else:
            per_row = (
                self.call.hidden.element_size() + 4
            ) * hidden_size + low  # gathered hidden states, and dH before it is rounded
            limit = min(TALLEST, max(1, workspace // (2 * per_row)))
            chunks = -(-self.count // limit)
        self.chunks = chunks
        even = -(-self.count // max(1, chunks))
        self._rows = max(1, -(-even // 16) * 16 if chunks > 1 and even >= 64 else even)  # the GEMM's register tiles
        if rows is not None:
            self._rows, self.chunks = rows, -(-self.count // rows)
        room = TILE_BYTES if self._keep else min(TILE_BYTES, workspace - self._rows * per_row)
        columns = INVARIANT_COLUMNS if self.call.batch_invariant else room // (size * self._rows)
        columns = max(64, columns // 2 * 2)
        self._tile_columns = min(self.call.weight.shape[0], columns // BLOCK * BLOCK if columns >= BLOCK else columns)

    def fits_weight_gradient(self) -> bool:
        """Whether the first chunk's products [R, V] fit in the memory of dW [V, D]: they may wait there."""
        rows, weight = min(self._rows, self.count), self.call.weight
        return 0 < rows * self.dtype.itemsize <= weight.shape[1] * weight.element_size()

    def __iter__(self) -> Iterator[RowChunk]:
        for start in range(0, self.count, self._rows):
            stop = min(start + self._rows, self.count)
            row_indices = slice(start, stop) if self._counted is None else self._counted[start:stop]
            hidden = self._gather(row_indices, start, stop)
            temperature = self.call.row_temperature
            vocab = self.call.weight.shape[0]
            yield RowChunk(
                row_indices,
                hidden,
                None if self.lora_a is None else self._product(hidden, self.lora_a),
                self._labels[row_indices],
                None if temperature is None else temperature[row_indices].contiguous(),
                self._tile[: (stop - start) * vocab].view(-1, vocab) if self._keep else None,
                None if start else self.logits_buffer,
            )

    def _gather(self, row_indices: Tensor | slice, start: int, stop: int) -> Tensor:
        if self._hidden.dim() == 2:
            return self._hidden[row_indices]
        rows = torch.arange(start, stop, device=self._hidden.device) if isinstance(row_indices, slice) else row_indices
        inner = self._hidden.shape[1]
        return self._hidden[rows // inner, rows % inner]

    def column_tiles(self) -> Iterator[slice]:
        """The vocabulary, tile by tile."""
        vocab = self.call.weight.shape[0]
        for start in range(0, vocab, self._tile_columns):
            yield slice(start, min(start + self._tile_columns, vocab))

    def _products(self, chunk: RowChunk, columns: slice) -> Tensor:
        """hidden @ weight.T for a tile of columns, fresh."""
        count = chunk.hidden.shape[0]
        if chunk.logits_before_bias is not None:
            tile = chunk.logits_before_bias[:, columns]
        else:
            buffer = chunk.logits_buffer
            tile = self._place(self._tile, count, columns) if buffer is None else self._stored(buffer, count, columns)
        weight, low = self.call.weight[columns], self.lora_b(columns)
        if low is None or chunk.lora_hidden is None:
            return self._product(chunk.hidden, weight, out=tile)
        # The small product first: in 16 bits it is the one to be rounded twice.
        return self._product(chunk.hidden, weight, out=self._product(chunk.lora_hidden, low, out=tile), beta=1)

    @staticmethod
    def _place(memory: Tensor, count: int, columns: slice) -> Tensor:
        """A tile [count, W] at the beginning of flat memory."""
        return memory[: count * (columns.stop - columns.start)].view(count, -1)

    def _stored(self, buffer: Tensor, count: int, columns: slice) -> Tensor:
        """The same in the memory of dW, at the beginning of the tile's own rows."""
        memory = buffer[columns].view(-1)
        if self.widens:
            memory = memory[: memory.numel() // 2 * 2].view(self.dtype)
        return self._place(memory, count, columns)

    def lora_b(self, columns: slice) -> Tensor | None:
        """Its rows of a tile, in the dtype of the products."""
        return None if self.call.lora_b is None else self.call.lora_b[columns].to(self.dtype)

    def _product(self, x: Tensor, y: Tensor, *, out: Tensor | None = None, beta: int = 0) -> Tensor:
        """x [R, K] @ y [W, K].T over out, or added to it, in the tile's dtype."""
        out = x.new_empty(x.shape[0], y.shape[0], dtype=self.dtype) if out is None else out
        if self.call.batch_invariant and not (self.dtype == torch.float32 and self.backend.products_are_invariant()):
            self._product_in_pieces(x, y, out=out, beta=beta)
        elif self.dtype == torch.float32:
            self.backend.fp32_product(x, y.T, out=out, accumulate=beta != 0)
        elif beta:
            torch.addmm(out, x, y.T, out=out)
        else:
            torch.mm(x, y.T, out=out)
        return out

    def _product_in_pieces(self, x: Tensor, y: Tensor, *, out: Tensor, beta: int) -> None:
        """The same in pieces of one shape, for bits that do not depend on R."""
        for start in range(0, x.shape[0], INVARIANT_ROWS):
            some, to = x[start : start + INVARIANT_ROWS], out[start : start + INVARIANT_ROWS]
            padded = some.new_zeros(INVARIANT_ROWS, some.shape[1])
            padded[: len(some)] = some
            product = x.new_empty(INVARIANT_ROWS, y.shape[0], dtype=self.dtype)
            if self.dtype == torch.float32:
                self.backend.fp32_product(padded, y.T, out=product)
            else:
                torch.mm(padded, y.T, out=product)
            to.add_(product[: len(some)]) if beta else to.copy_(product[: len(some)])

    def logits(self, chunk: RowChunk) -> Tensor:
        """The kept chunk's logits [R, V], over its products."""
        assert chunk.logits_before_bias is not None
        for columns in self.column_tiles():
            tile = self._products(chunk, columns)
            if self._bias is not None:
                tile += self._bias[columns]
            if self.softcap is not None:
                tile.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap)
        return chunk.logits_before_bias

    def epilogue(self, chunk: RowChunk, columns: slice) -> tuple[object, ...]:
        """What both epilogues take besides the tile."""
        bias = None if self._bias is None else self._bias[columns]
        softcap = 0.0 if self.softcap is None else self.softcap
        offset = self.call.vocab_offset + columns.start
        return offset, bias, softcap, self.logit_scale, chunk.labels, self.head_temperature, chunk.temperature

    def softmax(
        self, chunk: RowChunk, with_entropy: bool, folded: Callable[[slice, Tensor, Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logprobs [R], entropy [R] or [0] float32, and stats [R, 2] float64: maximum, log sum exp((z - max) / T).

        folded: is given each tile after its turn, with its columns and this rank's softmax [R, 4] so far.
        """
        state = chunk.hidden.new_zeros((chunk.hidden.shape[0], 4), dtype=torch.float64)
        state[:, 0], state[:, 3] = float("-inf"), float("nan")  # no label seen: NaN
        for columns in self.column_tiles():
            tile = self._products(chunk, columns)
            self.backend.online_softmax_update(tile, *self.epilogue(chunk, columns), state, with_entropy)
            if folded is not None:
                folded(columns, tile, state)
        temperature = self.temperature(chunk)
        if self.call.group:
            state = merged(gathered(state, self.call.group), temperature)
        m, s, w, label = state.unbind(1)
        # Only -inf: no distribution. (+inf and NaN have made s NaN already.)
        log_s = torch.where((m == float("-inf")) | label.isnan(), float("nan"), s.log())
        # Difference first: m / T + log(s) would lose the digits of log(s) at logits of 1e4.
        logprobs = ((label - m) / temperature - log_s).float()
        entropy = (log_s - w / (temperature * s)).float() if with_entropy else logprobs[:0]
        return logprobs, entropy, torch.stack([m, log_s], 1)

    def coefficients(
        self, chunk: RowChunk, g: Tensor | None, g_entropy: Tensor | None, stats: Tensor, entropy: Tensor
    ) -> Tensor:
        """[R, 4] float32 of the gradient's epilogue, for upstream gradients of logprobs and entropy [R].

        d logprob_label / dz_j = (onehot - p) / T; dH / dz_j = -p (log p + H) / T, log p = (z - m) / T - log_s.
        """
        m, log_s = stats.unbind(1)
        temperature = self.temperature(chunk)
        g, h = (torch.zeros_like(m) if x is None else x.double() for x in (g, g_entropy))
        scale = torch.exp(-log_s) / temperature
        mean = 0.0 if g_entropy is None else entropy - log_s
        a, b, c = -scale * (g + h * mean), -scale * h / temperature, g / temperature
        still = (g == 0) & (h == 0)
        return torch.stack([*(torch.where(still, 0.0, x) for x in (a, b, c)), m], 1).float()

    def temperature(self, chunk: RowChunk) -> float | Tensor:
        return self.head_temperature if chunk.temperature is None else chunk.temperature.double()

    def gradient_tiles(self, chunk: RowChunk, coefficients: Tensor, *, exact: bool) -> Iterator[tuple[slice, Tensor]]:
        """The gradient of hidden @ weight.T, tile by tile; over the products where they were kept.

        exact: in the tile's dtype. Else it may come in 16 bits, in which the products with it are made anyway.
        """
        narrow = not exact and self.widens and self.backend.multiplies_narrow(self.call.hidden.dtype)
        for columns in self.column_tiles():
            if chunk.logits_before_bias is not None:
                tile = chunk.logits_before_bias[:, columns]
            elif chunk.logits_buffer is not None:  # a copy, because dW will be written over it
                count = chunk.hidden.shape[0]
                tile = self._place(self._tile, count, columns).copy_(self._stored(chunk.logits_buffer, count, columns))
            else:
                tile = self._products(chunk, columns)
            yield columns, self.backend.linear_gradient(tile, *self.epilogue(chunk, columns), coefficients, narrow)

    def compacted(self, chunk: RowChunk, kept: Tensor) -> RowChunk:
        """The chunk's rows `kept` (ascending) alone, their products moved together inside the workspace."""
        if chunk.logits_before_bias is not None:
            for to, row in enumerate(kept.tolist()):
                if to != row:
                    chunk.logits_before_bias[to].copy_(chunk.logits_before_bias[row])
        row_indices = chunk.row_indices
        if isinstance(row_indices, slice):
            row_indices = torch.arange(row_indices.start, row_indices.stop, device=kept.device)
        return RowChunk(
            row_indices[kept],
            chunk.hidden[kept],
            None if chunk.lora_hidden is None else chunk.lora_hidden[kept],
            chunk.labels[kept],
            None if chunk.temperature is None else chunk.temperature[kept],
            None if chunk.logits_before_bias is None else chunk.logits_before_bias[: kept.numel()],
            None,
        )
