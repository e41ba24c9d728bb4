"""per_token_kl, value and slope in one read; shaped_rewards, one row a program, from its end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import launch, place, rows_of

# 1024 elements over 4 warps: 8 a thread, two 16-byte accesses in fp32.
BLOCK = 1024
NUM_WARPS = 4

K1, K2, K3, ABS = (tl.constexpr(index) for index in range(4))  # as the op's ESTIMATORS counts them
EXPONENT_LIMIT = tl.constexpr(20.0)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def split_exp(u):
    """exp(u) = scale * (1 + f + bend) for |u| <= 20, bend = exp(f) - 1 - f; scale = 1 and f = u where |u| <= 1/2.

    In parts, so that nothing cancels where 1 or 1 + u is taken off it.
    """
    n = tl.where(tl.abs(u) <= 0.5, 0.0, tl.floor(u * 1.44269504 + 0.5))
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    # ln 2 in two parts; the first has 9 trailing zeros, so that n times it is exact.
    f = (u - n * 0.693145751953125) - n * 1.4286068203094172e-6
    p = 2.7557319e-7 * f + 2.7557319e-6  # Taylor: the term left out is 6e-9 of the sum at |f| = 1/2
    p = p * f + 2.4801587e-5
    p = p * f + 1.9841270e-4
    p = p * f + 1.3888889e-3
    p = p * f + 8.3333333e-3
    p = p * f + 4.1666667e-2
    p = p * f + 1.6666667e-1
    p = p * f + 0.5
    return scale, f, f * f * p


@triton.jit
def bounded(x, limit):
    """x within +-limit; NaN stays."""
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)


@triton.jit
def saturate(x, limit):
    """As bounded, infinities apart: a finite number stays finite in a narrower dtype."""
    return tl.where(tl.abs(x) <= LARGEST, bounded(x, limit), x)


@triton.jit(do_not_specialize=["size", "columns", "stride", "ref_stride"])
def _per_token_kl_fwd_kernel(
    logprobs_ptr,
    ref_ptr,
    kl_ptr,
    slope_ptr,
    size,
    columns,
    stride,
    ref_stride,
    ESTIMATOR: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    raw = tl.load(logprobs_ptr + place(i, columns, stride, STRIDED), mask=inside, other=0.0).to(tl.float32)
    raw -= tl.load(ref_ptr + place(i, columns, ref_stride, STRIDED), mask=inside, other=0.0).to(tl.float32)
    d = bounded(raw, LARGEST)
    if ESTIMATOR == K1:
        value, slope = d, tl.full([BLOCK], 1.0, tl.float32)
    elif ESTIMATOR == ABS:
        value, slope = tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    elif ESTIMATOR == K2:
        square = d * (d * 0.5)
        value, slope = tl.where(square > LARGEST, LARGEST, square), tl.where(square > LARGEST, 0.0, d)
    else:
        scale, f, bend = split_exp(bounded(-d, EXPONENT_LIMIT))
        # Where |d| <= 1/2 the bracket is exactly 0 and the value is `bend` alone: nothing cancels.
        value = scale * bend + ((scale * f + (scale - 1.0)) + d)
        slope = tl.where(tl.abs(d) > EXPONENT_LIMIT, 1.0, -(scale * bend + (scale * f + (scale - 1.0))))
    tl.store(kl_ptr + i, value, mask=inside)
    if slope_ptr is not None:
        tl.store(slope_ptr + i, tl.where(tl.abs(raw) <= LARGEST, slope, 0.0), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _per_token_kl_bwd_kernel(
    grad_ptr,
    slope_ptr,
    grad_logprobs_ptr,
    grad_ref_ptr,
    size,
    LIMIT: tl.constexpr,
    REF_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    product = tl.load(grad_ptr + i, mask=inside, other=0.0) * tl.load(slope_ptr + i, mask=inside, other=0.0)
    if grad_logprobs_ptr is not None:
        grad = saturate(product, LIMIT)
        tl.store(grad_logprobs_ptr + i, grad.to(grad_logprobs_ptr.dtype.element_ty), mask=inside)
    if grad_ref_ptr is not None:
        grad = saturate(-product, REF_LIMIT)
        tl.store(grad_ref_ptr + i, grad.to(grad_ref_ptr.dtype.element_ty), mask=inside)


def per_token_kl_fwd(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, with_slope: bool) -> tuple[Tensor, Tensor]:
    """logprobs, ref_logprobs [...] -> kl and slope [...] float32, slope [0] unless `with_slope`.

    Rows may be strided; other layouts are copied once. estimator: 0 k1, 1 k2, 2 k3, 3 abs.
    """
    shape = logprobs.shape
    kl = logprobs.new_empty(shape, dtype=torch.float32)
    slope = logprobs.new_empty(shape if with_slope else (0,), dtype=torch.float32)
    size = kl.numel()
    if size == 0:
        return kl, slope
    strided = not (logprobs.is_contiguous() and ref_logprobs.is_contiguous())
    strides = size, size, size
    if strided:
        logprobs, ref_logprobs = rows_of(logprobs), rows_of(ref_logprobs)
        strides = logprobs.shape[1], logprobs.stride(0), ref_logprobs.stride(0)
    launch(
        _per_token_kl_fwd_kernel,
        triton.cdiv(size, BLOCK),
        logprobs,
        ref_logprobs,
        kl,
        slope if with_slope else None,
        size,
        *strides,
        ESTIMATOR=estimator,
        STRIDED=strided,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return kl, slope


def per_token_kl_bwd(
    grad: Tensor, slope: Tensor, dtype: torch.dtype | None, ref_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """grad, slope [...] -> grad * slope and -grad * slope [...] in the dtypes given, [0] where that is None."""
    size = slope.numel()
    grads = [slope.new_empty(slope.shape if wanted else (0,), dtype=wanted) for wanted in (dtype, ref_dtype)]
    outputs = [g if wanted else None for g, wanted in zip(grads, (dtype, ref_dtype), strict=True)]
    launch(
        _per_token_kl_bwd_kernel,
        triton.cdiv(size, BLOCK),
        grad.contiguous(),
        slope,
        *outputs,
        size,
        LIMIT=torch.finfo(grads[0].dtype).max,
        REF_LIMIT=torch.finfo(grads[1].dtype).max,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return grads[0], grads[1]


@triton.jit(do_not_specialize=["T", "stride_kl"])
def _shaped_rewards_kernel(
    scores_ptr,
    kl_ptr,
    mask_ptr,
    rewards_ptr,
    kl_coef,
    clip,
    T,
    stride_kl,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kl_ptr += row * stride_kl
    mask_ptr += row * T
    rewards_ptr += row * T
    score = tl.load(scores_ptr + row).to(tl.float32)
    score = bounded(score, clip)
    waiting = 1  # for the last counted position
    chunks = tl.cdiv(T, BLOCK)
    for chunk in range(chunks):
        t = (chunks - 1 - chunk) * BLOCK + tl.arange(0, BLOCK)
        inside = t < T
        counted = tl.load(mask_ptr + t, mask=inside, other=0) != 0
        kl = tl.load(kl_ptr + t, mask=counted, other=0.0).to(tl.float32)
        last = tl.max(tl.where(counted, t, -1), 0)
        reward = tl.where(counted, -kl_coef * kl, 0.0)
        reward = tl.where((t == last) & (waiting != 0), reward + score, reward)
        waiting = tl.where(last >= 0, 0, waiting)
        tl.store(rewards_ptr + t, tl.where(inside & counted, reward, 0.0), mask=inside)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, clip: float) -> Tensor:
    """scores [B], kl, mask [B, T] -> rewards [B, T] float32; rows may be strided. clip: bound on |score|, or inf."""
    batch, time = kl.shape
    kl = rows_of(kl) if kl.numel() else kl
    rewards = kl.new_empty((batch, time), dtype=torch.float32)
    launch(
        _shaped_rewards_kernel,
        batch if time else 0,
        scores.contiguous(),
        kl,
        mask.contiguous(),
        rewards,
        kl_coef,
        clip,
        time,
        kl.stride(0),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return rewards
