"""The sweep over a head's rows: chunks whose logits fit a fixed workspace, each a GEMM by torch and our row kernels.

A chunk holds every column of its rows, so that a row's softmax is whole before its gradient is formed, and dH of a row
is one GEMM. Peak memory beyond inputs and gradients is the workspace, and for a 16-bit weight whose gradient several
chunks add to, an fp32 accumulator of its shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import dispatch

DEFAULT_WORKSPACE = 64 << 20  # bytes


class Head(NamedTuple):
    """logits = softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap), sampled at a temperature.

    Without a softcap logit_scale is 1: it has gone into the temperature.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperature: float
    row_temperature: Tensor | None  # [N], replaces temperature
    softcap: float | None
    logit_scale: float


class Rows(NamedTuple):
    """One chunk: its rows of the call, their hidden states, labels and temperatures, and their capped logits."""

    places: Tensor | slice  # into [N]
    hidden: Tensor  # [R, D]
    labels: Tensor  # [R]
    temperature: Tensor | None  # [R], None: the head's
    logits: Tensor  # [R, V], in the workspace
    slope: Tensor | None  # [R, V], d logits / d (hidden @ weight.T); None without a softcap: 1


class Gradients:
    """dH, dW and db of the inputs that want one, summed over chunks; a zero-element tensor stands for none.

    A 16-bit dW is accumulated in fp32 once a second chunk adds to it.
    """

    def __init__(self, hidden: Tensor, head: Head, wanted: tuple[bool, bool, bool], several: bool) -> None:
        weight, bias = head.weight, head.bias
        self.hidden = torch.zeros(hidden.shape if wanted[0] else 0, dtype=hidden.dtype, device=hidden.device)
        self.weight = torch.empty(weight.shape if wanted[1] else 0, dtype=weight.dtype, device=weight.device)
        self.bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=torch.float32)
        self._head, self._wanted, self._untouched = head, wanted, True
        self._sum = self.weight
        if wanted[1] and several and weight.dtype != torch.float32:
            self._sum = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        self._bias_dtype = weight.dtype if bias is None else bias.dtype

    def add(self, rows: Rows, grad: Tensor) -> None:
        """grad [R, V]: the gradient of the chunk's products hidden @ weight.T."""
        if self._wanted[0]:
            flat = self.hidden.flatten(0, 1)
            if isinstance(rows.places, slice):
                torch.mm(grad, self._head.weight, out=flat[rows.places])
            else:
                flat[rows.places] = torch.mm(grad, self._head.weight)
        if self._wanted[1]:
            self._add_weight(grad, rows.hidden)
        if self._wanted[2]:
            self.bias += grad.sum(0, dtype=torch.float32)
        self._untouched = False

    def _add_weight(self, grad: Tensor, hidden: Tensor) -> None:
        if self._untouched and self._sum is self.weight:
            torch.mm(grad.T, hidden, out=self._sum)
        elif self._sum.dtype == grad.dtype:
            self._sum.addmm_(grad.T, hidden)
        else:
            # By slices of the vocabulary, so that the 16-bit product stays small.
            width = max(1, (4 << 20) // (2 * hidden.shape[1]))
            for start in range(0, grad.shape[1], width):
                part = slice(start, start + width)
                product = torch.mm(grad[:, part].T, hidden)
                if self._untouched:
                    self._sum[part].copy_(product)
                else:
                    self._sum[part].add_(product)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._untouched:
            self.weight.zero_()
        elif self._sum is not self.weight:
            self.weight.copy_(self._sum)
        return self.hidden, self.weight, self.bias.to(self._bias_dtype)


class Sweep:
    """One pass over the counted rows of hidden [O, I, D] under a head."""

    def __init__(
        self, op: str, hidden: Tensor, head: Head, labels: Tensor, mask: Tensor | None, workspace: int, capped: bool
    ) -> None:
        """capped: the chunks' slopes are wanted too (a gradient under a softcap)."""
        self.backend: ModuleType = dispatch.load(dispatch.required(op, hidden))
        self.head, self._labels = head, labels
        self._hidden = hidden.flatten(0, 1) if hidden.is_contiguous() else hidden
        # The one host sync on a GPU: how many rows count decides how many chunks there are.
        self._counted = None if mask is None else mask.nonzero().squeeze(-1)
        if self._counted is not None and self._counted.numel() == labels.numel():
            self._counted = None
        self.count = labels.numel() if self._counted is None else self._counted.numel()
        vocab = head.weight.shape[0]
        self._slopes = capped and head.softcap is not None
        per_row = vocab * hidden.element_size() * (2 if self._slopes else 1) + hidden.shape[-1] * hidden.element_size()
        limit = max(1, workspace // per_row)
        self.chunks = -(-self.count // limit)
        even = -(-self.count // max(1, self.chunks))
        self._rows = max(1, min(limit, -(-even // 16) * 16))  # whole register tiles of the GEMM
        self._tile = torch.empty(
            (2 if self._slopes else 1) * min(self._rows, self.count) * vocab, dtype=hidden.dtype, device=hidden.device
        )

    def __iter__(self) -> Iterator[Rows]:
        for start in range(0, self.count, self._rows):
            stop = min(start + self._rows, self.count)
            index = slice(start, stop) if self._counted is None else self._counted[start:stop]
            hidden = self._gather(index, start, stop)
            logits, slope = self._logits(hidden)
            temperature = self.head.row_temperature
            yield Rows(
                index, hidden, self._labels[index], None if temperature is None else temperature[index], logits, slope
            )

    def _gather(self, index: Tensor | slice, start: int, stop: int) -> Tensor:
        if self._hidden.dim() == 2:
            return self._hidden[index]
        rows = torch.arange(start, stop, device=self._hidden.device) if isinstance(index, slice) else index
        inner = self._hidden.shape[1]
        return self._hidden[rows // inner, rows % inner]

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        head, count = self.head, hidden.shape[0]
        tiles = self._tile[: (2 if self._slopes else 1) * count * head.weight.shape[0]].view(
            -1, count, head.weight.shape[0]
        )
        logits = tiles[0]
        if head.bias is None:
            torch.mm(hidden, head.weight.T, out=logits)
        else:
            torch.addmm(head.bias, hidden, head.weight.T, out=logits)
        if head.softcap is None:
            return logits, None
        logits.mul_(head.logit_scale / head.softcap).tanh_()
        slope = None
        if self._slopes:  # of softcap * tanh(x * scale / softcap)
            slope = torch.mul(logits, logits, out=tiles[1]).neg_().add_(1).mul_(head.logit_scale)
        return logits.mul_(head.softcap), slope

    def logprobs(self, rows: Rows, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """logprobs [R], entropy [R] or [0], (max, log sum) [R, 2] of a chunk."""
        logits = rows.logits.unsqueeze(0)
        return self.backend.selected_logprobs_fwd(
            logits, rows.labels, None, self.head.temperature, rows.temperature, with_entropy
        )

    def compacted(self, rows: Rows, kept: Tensor) -> Rows:
        """The chunk's rows `kept` (ascending) alone, moved together inside the workspace."""
        for to, row in enumerate(kept.tolist()):
            for tile in (rows.logits, rows.slope):
                if tile is not None and to != row:
                    tile[to].copy_(tile[row])
        places, count = rows.places, kept.numel()
        if isinstance(places, slice):
            places = torch.arange(places.start, places.stop, device=kept.device)
        return Rows(
            places[kept],
            rows.hidden[kept],
            rows.labels[kept],
            None if rows.temperature is None else rows.temperature[kept],
            rows.logits[:count],
            None if rows.slope is None else rows.slope[:count],
        )

    def gradient(
        self, rows: Rows, g: Tensor | None, g_entropy: Tensor | None, stats: Tensor, entropy: Tensor
    ) -> Tensor:
        """Turns the chunk's logits into the gradient of hidden @ weight.T, in place; g, g_entropy [R] are upstream."""
        logits = rows.logits.unsqueeze(0)
        self.backend.selected_logprobs_bwd(
            *(g, g_entropy, logits, rows.labels, None, self.head.temperature, rows.temperature, stats, entropy, True)
        )
        return rows.logits if rows.slope is None else rows.logits.mul_(rows.slope)
