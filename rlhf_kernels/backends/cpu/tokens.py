"""The token family on the native module (csrc/cpu/tokens.cpp): every tensor has its own dtype and row stride."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, empty, flat_rows, last_contiguous


def per_token_kl_fwd(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, with_slope: bool) -> tuple[Tensor, Tensor]:
    """logprobs, ref_logprobs [...] -> kl and slope [...] float32, slope [0] unless `with_slope`.

    estimator: 0 k1, 1 k2, 2 k3, 3 abs.
    """
    kl = empty(logprobs.shape)
    slope = empty(logprobs.shape if with_slope else (0,))
    if kl.numel() == 0:
        return kl, slope
    logprobs, logprobs_columns, logprobs_stride = flat_rows(logprobs)
    ref_logprobs, ref_logprobs_columns, ref_logprobs_stride = flat_rows(ref_logprobs)
    _native.per_token_kl_fwd(
        logprobs.data_ptr(),
        DTYPES[logprobs.dtype],
        logprobs_columns,
        logprobs_stride,
        ref_logprobs.data_ptr(),
        DTYPES[ref_logprobs.dtype],
        ref_logprobs_columns,
        ref_logprobs_stride,
        estimator,
        kl.numel(),
        kl.data_ptr(),
        slope.data_ptr() if with_slope else 0,
        torch.get_num_threads(),
    )
    return kl, slope


def per_token_kl_bwd(
    grad: Tensor, slope: Tensor, dtype: torch.dtype | None, ref_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """grad, slope [...] -> grad * slope and -grad * slope [...] in the dtypes given, [0] where that is None."""
    grad = grad.contiguous()
    grad_logprobs, grad_ref_logprobs = (
        empty(slope.shape if wanted else (0,), wanted or torch.float32) for wanted in (dtype, ref_dtype)
    )
    if slope.numel():
        _native.per_token_kl_bwd(
            grad.data_ptr(),
            slope.data_ptr(),
            slope.numel(),
            grad_logprobs.data_ptr() if dtype else 0,
            DTYPES[grad_logprobs.dtype],
            grad_ref_logprobs.data_ptr() if ref_dtype else 0,
            DTYPES[grad_ref_logprobs.dtype],
            torch.get_num_threads(),
        )
    return grad_logprobs, grad_ref_logprobs


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, clip: float) -> Tensor:
    """scores [B], kl, mask [B, T] -> rewards [B, T] float32. clip: bound on |score|, may be inf."""
    rewards = empty(kl.shape)
    batch, time = kl.shape
    if rewards.numel():
        kl, mask, scores = last_contiguous(kl), last_contiguous(mask), scores.float().contiguous()
        _native.shaped_rewards(
            kl.data_ptr(),
            DTYPES[kl.dtype],
            batch,
            time,
            kl.stride(0),
            mask.data_ptr(),
            mask.stride(0),
            scores.data_ptr(),
            kl_coef,
            clip,
            rewards.data_ptr(),
            torch.get_num_threads(),
        )
    return rewards
