"""policy_loss and value_loss, forward and back, on the native module (csrc/cpu/losses.cpp)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, last_contiguous

# Elements of a unit of work where whole rows do not matter. A constant: the order of the sums depends on it.
TILE = 4096


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
    ratio: int,
    row_means: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All [R, T], each of its own dtype -> loss [], stats [7], gradient times the denominator [R, T] or [0]; float32.

    low, high: bounds of the ratio. ratio: 0 of each token, 1 of the sequence, 2 of the sequence times each token's own
    over itself. dual_clip: inf = none. denominator: NaN = the number of counted tokens. row_means:
    each row's losses are divided by its length. stats: the op's six, then the denominator.
    """
    rows, time = logprobs.shape
    tile = max(1, time if ratio or row_means else min(time, TILE))
    loss, stats, grad = _outputs(rows, time, 7, with_grad)
    logprobs, old_logprobs, mask = last_contiguous(logprobs), last_contiguous(old_logprobs), _last_contiguous(mask)
    advantages, weights = last_contiguous(advantages), _last_contiguous(weights)
    _native.policy_loss(
        *_matrix(logprobs),
        *_matrix(old_logprobs),
        *_matrix(advantages),
        *_matrix(weights),
        address(mask),
        0 if mask is None else mask.stride(0),
        rows,
        time,
        tile,
        low,
        high,
        dual_clip,
        ratio,
        row_means,
        float(denominator),
        loss.data_ptr(),
        stats.data_ptr(),
        grad.data_ptr() if with_grad else 0,
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
    loss, stats, grad = _outputs(rows, time, 3, with_grad)
    values, returns, mask = last_contiguous(values), last_contiguous(returns), _last_contiguous(mask)
    old_values = None if math.isinf(clip) else _last_contiguous(old_values)
    _native.value_loss(
        *_matrix(values),
        *_matrix(old_values),
        *_matrix(returns),
        address(mask),
        0 if mask is None else mask.stride(0),
        rows,
        time,
        tile,
        clip,
        row_means,
        float(denominator),
        loss.data_ptr(),
        stats.data_ptr(),
        grad.data_ptr() if with_grad else 0,
        torch.get_num_threads(),
    )
    return loss, stats, grad


def loss_bwd(grad: Tensor, stats: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad [R, T] and stats as either loss leaves them, upstream [] float32 -> grad * (upstream / denominator) [R, T];
    a finite number beyond the dtype's range becomes its largest."""
    grad = grad.contiguous()  # a hook on saved tensors may have brought it back otherwise
    grad_x = torch.empty_like(grad, dtype=dtype)
    denominator = stats.data_ptr() + stats.nbytes - stats.itemsize
    _native.loss_bwd(
        grad.data_ptr(),
        grad.numel(),
        upstream.data_ptr(),
        denominator,
        grad_x.data_ptr(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    return grad_x


def _last_contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else last_contiguous(x)


def _matrix(x: Tensor | None) -> tuple[int, int, int]:
    """Address, dtype and row stride, as every kernel of the family takes its inputs; zeros for an absent one."""
    return (0, 0, 0) if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride(0))


def _outputs(rows: int, time: int, stats: int, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """loss, stats and gradient, to be filled."""
    dtype = torch.float32
    grad = (
        torch.empty(rows, time, dtype=dtype, device="cpu") if with_grad else torch.empty(0, dtype=dtype, device="cpu")
    )
    return torch.empty((), dtype=dtype, device="cpu"), torch.empty(stats, dtype=dtype, device="cpu"), grad
