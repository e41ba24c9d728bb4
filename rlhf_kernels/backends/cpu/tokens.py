"""The token family on the native module (csrc/cpu/tokens.cpp): every tensor has its own dtype and row stride."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import (
    DTYPES,
    address,
    contiguous,
    empty,
    empty_like,
    flat_rows,
    last_contiguous,
)

_CHUNK = 1024  # elements of a partial result: kElements in csrc/bind/tokens.cpp


def per_token_kl_fwd(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, with_slope: bool) -> tuple[Tensor, Tensor]:
    """logprobs, ref_logprobs [...] -> kl and slope [...] float32, slope [0] unless `with_slope`.

    estimator: 0 k1, 1 k2, 2 k3, 3 abs.
    """
    kl = empty(logprobs.shape)
    slope = empty(logprobs.shape if with_slope else (0,))
    if kl.numel() == 0:
        return kl, slope
    logprobs, columns, stride = flat_rows(logprobs)
    ref_logprobs, ref_columns, ref_stride = flat_rows(ref_logprobs)
    _native.per_token_kl_fwd(
        *(logprobs.data_ptr(), DTYPES[logprobs.dtype], columns, stride),
        *(ref_logprobs.data_ptr(), DTYPES[ref_logprobs.dtype], ref_columns, ref_stride),
        *(estimator, kl.numel(), kl.data_ptr(), slope.data_ptr() if with_slope else 0, torch.get_num_threads()),
    )
    return kl, slope


def per_token_kl_bwd(
    grad: Tensor, slope: Tensor, dtype: torch.dtype | None, ref_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """grad, slope [...] -> grad * slope and -grad * slope [...] in the dtypes given, [0] where that is None."""
    grad = grad.contiguous()
    grads = [empty(slope.shape if wanted else (0,), wanted or torch.float32) for wanted in (dtype, ref_dtype)]
    if slope.numel():
        addressed = ((address(g if g.numel() else None), DTYPES[g.dtype]) for g in grads)
        _native.per_token_kl_bwd(
            *(grad.data_ptr(), slope.data_ptr(), slope.numel(), *next(addressed), *next(addressed)),
            torch.get_num_threads(),
        )
    return grads[0], grads[1]


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, clip: float) -> Tensor:
    """scores [B], kl, mask [B, T] -> rewards [B, T] float32. clip: bound on |score|, may be inf."""
    rewards = empty(kl.shape)
    batch, time = kl.shape
    if rewards.numel():
        kl, mask, scores = last_contiguous(kl), last_contiguous(mask), scores.float().contiguous()
        _native.shaped_rewards(
            *(kl.data_ptr(), DTYPES[kl.dtype], batch, time, kl.stride(0), mask.data_ptr(), mask.stride(0)),
            *(scores.data_ptr(), kl_coef, clip, rewards.data_ptr(), torch.get_num_threads()),
        )
    return rewards


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
