"""whiten, forward and back, on the native module (csrc/cpu/tokens.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, contiguous, empty, empty_like, flat_rows

_CHUNK = 1024  # elements of a partial result: kElements in csrc/bind/tokens.cpp


def whiten_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, mask [...] -> [3] float64: count, mean and sum of squared distances to it, of what counts."""
    moments = torch.zeros(3, dtype=torch.float64, device="cpu")
    if x.numel():
        partials = torch.empty((-(-x.numel() // _CHUNK), 3), dtype=torch.float64, device="cpu")
        x, x_columns, x_stride = flat_rows(x)
        mask, mask_columns, mask_stride = _flat_mask(mask, x.numel())
        _native.whiten_moments(
            x.data_ptr(),
            DTYPES[x.dtype],
            x_columns,
            x_stride,
            address(mask),
            mask_columns,
            mask_stride,
            x.numel(),
            partials.data_ptr(),
            moments.data_ptr(),
            torch.get_num_threads(),
        )
    return moments


def whiten_fwd(
    x: Tensor, mask: Tensor | None, parts: Tensor | None, eps: float, shift_mean: bool
) -> tuple[Tensor, Tensor]:
    """x, mask [...] -> x whitened [...] float32, and moments [3] float64; those of `parts` [R, 3] merged, if given."""
    moments = whiten_moments(x, mask) if parts is None else torch.empty(3, dtype=torch.float64, device="cpu")
    y = empty(x.shape)
    whiten_into(x, mask=mask, parts=contiguous(parts), moments=moments, eps=eps, keep_mean=not shift_mean, y=y)
    return y, moments


def whiten_into(
    x: Tensor,
    *,
    mask: Tensor | None,
    parts: Tensor | None,
    moments: Tensor,
    eps: float,
    keep_mean: bool,
    y: Tensor,
) -> None:
    """x, mask [...] whitened into y [...] float32 contiguous, which may be x.

    parts: [R, 3] float64 contiguous, merged into moments [3] first; None: moments hold already.
    """
    x, x_columns, x_stride = flat_rows(x)
    mask, mask_columns, mask_stride = _flat_mask(mask, x.numel())
    parts_count = 0 if parts is None else len(parts)
    _native.whiten_fwd(
        x.data_ptr(),
        DTYPES[x.dtype],
        x_columns,
        x_stride,
        address(mask),
        mask_columns,
        mask_stride,
        x.numel(),
        address(parts),
        parts_count,
        moments.data_ptr(),
        eps,
        keep_mean,
        y.data_ptr(),
        torch.get_num_threads(),
    )


def whiten_bwd(grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool) -> Tensor:
    """grad, x, mask [...], moments [3] -> gradient [...] in x's dtype."""
    grad_x = empty_like(x)
    if x.numel():
        grad, keep_mean = grad.contiguous(), not shift_mean
        partials = torch.empty((-(-x.numel() // _CHUNK), 2), dtype=torch.float64, device="cpu")
        x, x_columns, x_stride = flat_rows(x)
        mask, mask_columns, mask_stride = _flat_mask(mask, x.numel())
        _native.whiten_bwd(
            x.data_ptr(),
            DTYPES[x.dtype],
            x_columns,
            x_stride,
            address(mask),
            mask_columns,
            mask_stride,
            x.numel(),
            grad.data_ptr(),
            moments.data_ptr(),
            eps,
            keep_mean,
            partials.data_ptr(),
            grad_x.data_ptr(),
            torch.get_num_threads(),
        )
    return grad_x


def _flat_mask(mask: Tensor | None, size: int) -> tuple[Tensor | None, int, int]:
    """As flat_rows; None counts as one row of `size`."""
    return (None, size, size) if mask is None else flat_rows(mask)
