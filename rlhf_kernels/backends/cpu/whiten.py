"""whiten on the native module (csrc/cpu/tokens.cpp): moments first, then the scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, contiguous, empty, empty_like, flat_rows

_CHUNK = 1024  # elements of a partial result: kElements in csrc/bind/tokens.cpp


def whiten_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, mask [...] -> [3] float64: count, mean and sum of squared distances to it, of what counts."""
    moments = torch.zeros(3, dtype=torch.float64)
    if x.numel():
        partials = torch.empty((-(-x.numel() // _CHUNK), 3), dtype=torch.float64)
        x, mask, layout = _whiten_layout(x, mask)
        _native.whiten_moments(*layout, partials.data_ptr(), moments.data_ptr(), torch.get_num_threads())
    return moments


def whiten_fwd(
    x: Tensor, mask: Tensor | None, parts: Tensor | None, eps: float, shift_mean: bool
) -> tuple[Tensor, Tensor]:
    """x, mask [...] -> x whitened [...] float32, and moments [3] float64; those of `parts` [R, 3] merged, if given."""
    moments = whiten_moments(x, mask) if parts is None else torch.empty(3, dtype=torch.float64)
    y = empty(x.shape)
    x, mask, layout = _whiten_layout(x, mask)
    parts = contiguous(parts)
    _native.whiten_fwd(
        *(*layout, address(parts), 0 if parts is None else len(parts), moments.data_ptr()),
        *(eps, not shift_mean, y.data_ptr(), torch.get_num_threads()),
    )
    return y, moments


def whiten_bwd(grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool) -> Tensor:
    """grad, x, mask [...], moments [3] -> gradient [...] in x's dtype."""
    grad_x = empty_like(x)
    if x.numel():
        grad = grad.contiguous()
        partials = torch.empty((-(-x.numel() // _CHUNK), 2), dtype=torch.float64)
        x, mask, layout = _whiten_layout(x, mask)
        _native.whiten_bwd(
            *(*layout, grad.data_ptr(), moments.data_ptr(), eps, not shift_mean, partials.data_ptr()),
            *(grad_x.data_ptr(), torch.get_num_threads()),
        )
    return grad_x


def _whiten_layout(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """x and mask, copied where their layout asks for it, and the arguments that all of whiten's kernels start with."""
    size = x.numel()
    x, columns, stride = flat_rows(x)
    layout = x.data_ptr(), DTYPES[x.dtype], columns, stride
    if mask is None:
        return x, mask, (*layout, 0, size, size, size)
    mask, mask_columns, mask_stride = flat_rows(mask)
    return x, mask, (*layout, mask.data_ptr(), mask_columns, mask_stride, size)
