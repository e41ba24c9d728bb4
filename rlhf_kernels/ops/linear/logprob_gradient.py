"""d logprob / d hidden, formed while the logits of the forward are at hand: a frozen head's backward has no GEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.linear.chunks import TILE_BYTES, ChunkedHead, RowChunk
from rlhf_kernels.ops.linear.gradients import accumulate
from rlhf_kernels.ops.linear.shards import summed


class LogprobGradient:
    """One chunk's, summed over its tiles under a maximum that rises from tile to tile.

    d logprob / dx = (1 - p_label) W_label dz_label/dx - sum over the other tokens of p_j W_j dz_j/dx, over T. The label
    has no columns in the sum, where 16 bits would round its p_label; its own term comes from its logprob.
    """

    def __init__(self, sweep: ChunkedHead, chunk: RowChunk) -> None:
        self._sweep, self._rows = sweep, chunk
        self._sum = torch.zeros(chunk.hidden.shape, dtype=torch.float32, device=chunk.hidden.device)
        self._top = torch.full(chunk.labels.shape, float("-inf"), dtype=torch.float64, device=chunk.hidden.device)
        self._label = self._top  # the label's logit, NaN where it is another shard's

    def add(self, columns: slice, tile: Tensor, state: Tensor) -> None:
        """A tile that has been folded into state [R, 4]; it is overwritten."""
        sweep, rows = self._sweep, self._rows
        top = state[:, 0].clone()
        pivot = torch.where(top == float("-inf"), 0.0, top)  # while there are only -inf, exp gives 0 with any pivot
        coefficients = torch.zeros(state.shape, dtype=torch.float32, device=state.device)
        coefficients[:, 0], coefficients[:, 3] = 1.0, pivot
        sweep.backend.linear_gradient(tile, *sweep.epilogue(rows, columns), coefficients)
        column = rows.labels.long() - (sweep.call.vocab_offset + columns.start)
        here = (column >= 0) & (column < tile.shape[1])
        column = column.clamp(0, tile.shape[1] - 1).unsqueeze(1)
        tile.scatter_(1, column, tile.gather(1, column).masked_fill_(here.unsqueeze(1), 0))
        self._sum.mul_(torch.exp((self._top - pivot) / sweep.temperature(rows)).float().unsqueeze(1))
        accumulate(sweep, self._sum, tile, sweep.call.weight[columns])
        self._top, self._label = top, state[:, 3]

    def store(self, to: Tensor, logprobs: Tensor, stats: Tensor) -> None:
        """Into the chunk's rows of to [N, D], from the chunk's logprobs [R] and softmax stats [R, 2]."""
        sweep, rows, call = self._sweep, self._rows, self._sweep.call
        temperature, (m, log_s) = sweep.temperature(rows), stats.unbind(1)
        others = -torch.exp((self._top - m) / temperature - log_s) / temperature
        slope = sweep.logit_scale * torch.ones_like(m)
        if sweep.softcap is not None:
            slope *= 1 - (self._label / sweep.softcap).square()
        label = torch.where(self._label.isnan(), 0.0, -torch.expm1(logprobs.double()) * slope / temperature)
        token = (rows.labels.long() - call.vocab_offset).clamp(0, call.weight.shape[0] - 1)
        others, label = others.float().unsqueeze(1), label.float().unsqueeze(1)
        step = max(1, TILE_BYTES // (16 * self._sum.shape[1]))
        for some in (slice(start, start + step) for start in range(0, len(token), step)):
            self._sum[some].mul_(others[some]).addcmul_(call.weight[token[some]].float(), label[some])
        if call.group:  # each rank has the share of its tokens
            summed(self._sum, call.group)
        to[rows.row_indices] = self._sum.to(to.dtype)


def scale_rows_(dlogprob_dhidden: Tensor, grad: Tensor, mask: Tensor | None) -> None:
    """dlogprob_dhidden [N, D] times grad [N], in fp32 and in place; 0 where grad is 0 or the row does not count."""
    still = grad == 0 if mask is None else (grad == 0) | ~mask
    step = max(1, TILE_BYTES // (16 * dlogprob_dhidden.shape[1]))
    for start in range(0, len(dlogprob_dhidden), step):
        some = slice(start, start + step)
        dlogprob_dhidden[some].mul_(grad[some].float().unsqueeze(1)).masked_fill_(still[some].unsqueeze(1), 0)


def scaled_rows(dlogprob_dhidden: Tensor, grad: Tensor, mask: Tensor | None) -> Tensor:
    """The same as a new tensor, for a trace."""
    still = grad == 0 if mask is None else (grad == 0) | ~mask
    scaled = dlogprob_dhidden.float() * grad.float().unsqueeze(1)
    return torch.where(still.unsqueeze(1), 0.0, scaled).to(dlogprob_dhidden.dtype)
