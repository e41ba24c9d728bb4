"""policy_loss and value_loss on the native module (csrc/cpu/losses.cpp)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, last_contiguous

# Elements of a unit of work where whole rows do not matter. A constant: the order of the sums depends on it.
TILE = 4096
_PARTIALS = 8  # doubles that a unit leaves


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    low: float,
    high: float,
    dual_clip: float,
    denominator: float | Tensor,
    sequence: bool,
    row_means: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All [R, T], each of its own dtype -> loss [], stats [7], gradient times the denominator [R, T] or [0]; float32.

    low, high: bounds of the ratio. dual_clip: inf = none. denominator: NaN = the number of counted tokens. row_means:
    each row's losses are divided by its length. stats: the op's six, then the denominator.
    """
    rows, time = logprobs.shape
    tile = max(1, time if sequence or row_means else min(time, TILE))
    loss, stats, grad, partials = _outputs(rows, time, tile, 7, with_grad)
    logprobs, old_logprobs, advantages = (
        last_contiguous(logprobs),
        last_contiguous(old_logprobs),
        last_contiguous(advantages),
    )
    weights, mask = _last_contiguous(weights), _last_contiguous(mask)
    _native.policy_loss(
        *(*_matrix(logprobs), *_matrix(old_logprobs), *_matrix(advantages), *_matrix(weights)),
        *(address(mask), 0 if mask is None else mask.stride(0), rows, time, tile),
        *(low, high, dual_clip, sequence, row_means, float(denominator)),
        *(partials.data_ptr(), loss.data_ptr(), stats.data_ptr(), grad.data_ptr() if with_grad else 0),
        torch.get_num_threads(),
    )
    return loss, stats, grad


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    clip: float,
    denominator: float | Tensor,
    row_means: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As policy_loss; clip: inf = none, and then old_values are not read. stats [3]: the op's two, the denominator."""
    rows, time = values.shape
    tile = max(1, time if row_means else min(time, TILE))
    loss, stats, grad, partials = _outputs(rows, time, tile, 3, with_grad)
    values, returns, mask = last_contiguous(values), last_contiguous(returns), _last_contiguous(mask)
    old_values = None if math.isinf(clip) else _last_contiguous(old_values)
    _native.value_loss(
        *(*_matrix(values), *_matrix(old_values), *_matrix(returns)),
        *(address(mask), 0 if mask is None else mask.stride(0), rows, time, tile),
        *(clip, row_means, float(denominator)),
        *(partials.data_ptr(), loss.data_ptr(), stats.data_ptr(), grad.data_ptr() if with_grad else 0),
        torch.get_num_threads(),
    )
    return loss, stats, grad


def _last_contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else last_contiguous(x)


def _matrix(x: Tensor | None) -> tuple[int, int, int]:
    """Address, dtype and row stride, as every kernel of the family takes its inputs; zeros for an absent one."""
    return (0, 0, 0) if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride(0))


def _outputs(rows: int, time: int, tile: int, stats: int, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, stats, gradient, and the units' partial results as workspace."""
    return (
        torch.empty((), dtype=torch.float32),
        torch.empty(stats, dtype=torch.float32),
        torch.empty((rows, time) if with_grad else 0, dtype=torch.float32),
        torch.empty(rows * -(-time // tile) * _PARTIALS, dtype=torch.float64),
    )
