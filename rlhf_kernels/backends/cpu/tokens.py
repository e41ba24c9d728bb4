"""The token family on the native module (csrc/cpu/tokens.cpp): every tensor has its own dtype and row stride."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import (
    DTYPES,
    address,
    empty,
    flat_rows,
    last_contiguous,
)


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
