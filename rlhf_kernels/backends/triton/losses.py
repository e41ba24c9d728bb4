"""policy_loss and value_loss: a program per tile of a row leaves gradients and partial sums, one more merges them."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import launch
from rlhf_kernels.backends.triton.loss_tiles import (
    BLOCK_T,
    NUM_WARPS,
    TILE,
    as_rows,
    counted,
    counted_length,
    divisor_of,
    finish,
    largest_of,
    outputs,
    row_stride,
    tile_of_program,
    total_of,
)


@triton.jit
def _exponential(x):
    """exp(x) and exp(x) - 1 - x for |x| <= 20: tl.exp alone is off by ten ulp at 20, and cancels near 0."""
    n = tl.floor(x * 1.44269504 + 0.5)
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    # ln 2 in two parts, the first with so few bits that n times it is exact.
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    # exp(r) - 1 - r = r^2 p(r) on |r| <= ln(2) / 2: Cephes' polynomial.
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    rest = r * r * p
    return scale * (1.0 + (r + rest)), tl.where(n == 0.0, rest, (scale - 1.0) + scale * (r + rest) - x)


@triton.jit
def _clamp(x, low, high):
    """NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _policy_terms(rho, advantage, weight, low, high, dual_clip):
    """loss, slope by the log-ratio, hits of low, high and dual: rho is clamped on one side, which A's sign decides."""
    negative = advantage < 0.0
    ceiling = tl.where(negative, dual_clip, high)
    used = tl.where(negative & (rho < low), low, rho)
    used = tl.where(used > ceiling, ceiling, used)
    raised, lowered = used > rho, used < rho
    loss = -(used * advantage) * weight
    slope = tl.where(raised | lowered, 0.0, loss)
    return loss, slope, raised, lowered & (advantage > 0.0), lowered & negative


@triton.jit(
    do_not_specialize=[
        *("low", "high", "dual_clip", "stride_new", "stride_old", "stride_a", "stride_w", "stride_mask"),
        *("T", "tile", "programs"),
    ]
)
def _policy_loss_kernel(
    new_ptr,
    old_ptr,
    advantages_ptr,
    weights_ptr,
    mask_ptr,
    grad_ptr,
    partials_ptr,
    low,
    high,
    dual_clip,
    stride_new,
    stride_old,
    stride_a,
    stride_w,
    stride_mask,
    T,
    tile,
    programs,
    SEQUENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROW_MEANS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row, begin, end = tile_of_program(T, tile)
    new_ptr += row * stride_new
    old_ptr += row * stride_old
    advantages_ptr += row * stride_a
    if weights_ptr is not None:
        weights_ptr += row * stride_w
    if mask_ptr is not None:
        mask_ptr += row * stride_mask
    if grad_ptr is not None:
        grad_ptr += row * T
    lanes = tl.arange(0, BLOCK_T)

    length = 1.0
    mean = 0.0
    if SEQUENCE or ROW_MEANS:
        length = counted_length(mask_ptr, begin, end, BLOCK_T)
    if SEQUENCE:
        total = tl.zeros([BLOCK_T], tl.float32)
        for start in range(begin, end, BLOCK_T):
            t = start + lanes
            keep = counted(mask_ptr, t, end)
            new = tl.load(new_ptr + t, mask=keep, other=0.0).to(tl.float32)
            total += new - tl.load(old_ptr + t, mask=keep, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / length

    loss_sum = tl.zeros([BLOCK_T], tl.float32)
    slope_sum = tl.zeros([BLOCK_T], tl.float32)
    kl_sum = tl.zeros([BLOCK_T], tl.float32)
    rho_sum = tl.zeros([BLOCK_T], tl.float32)
    rho_max = tl.zeros([BLOCK_T], tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    low_count = tl.zeros([BLOCK_T], tl.int32)
    high_count = tl.zeros([BLOCK_T], tl.int32)
    dual_count = tl.zeros([BLOCK_T], tl.int32)
    for start in range(begin, end, BLOCK_T):
        t = start + lanes
        keep = counted(mask_ptr, t, end)
        advantage = tl.load(advantages_ptr + t, mask=keep, other=0.0).to(tl.float32)
        weight = 1.0
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + t, mask=keep, other=0.0).to(tl.float32)
        if SEQUENCE:
            log_ratio = tl.zeros([BLOCK_T], tl.float32) + mean
        else:
            new = tl.load(new_ptr + t, mask=keep, other=0.0).to(tl.float32)
            log_ratio = new - tl.load(old_ptr + t, mask=keep, other=0.0).to(tl.float32)
        clamped = _clamp(log_ratio, -20.0, 20.0)
        rho, k3 = _exponential(clamped)
        loss, slope, is_low, is_high, is_dual = _policy_terms(rho, advantage, weight, low, high, dual_clip)
        slope = tl.where((clamped < log_ratio) | (clamped > log_ratio), 0.0, slope)
        loss_sum += loss
        slope_sum += slope
        kl_sum += tl.where(keep, k3, 0.0)
        rho_sum += tl.where(keep, rho, 0.0)
        rho_max = tl.maximum(rho_max, tl.where(keep, rho, 0.0))
        count += keep.to(tl.int32)
        low_count += is_low.to(tl.int32)
        high_count += is_high.to(tl.int32)
        dual_count += is_dual.to(tl.int32)
        if grad_ptr is not None and PER_TOKEN:
            tl.store(grad_ptr + t, tl.where(keep, slope / length if ROW_MEANS else slope, 0.0), mask=t < end)
    if grad_ptr is not None and not PER_TOKEN:
        slope = tl.sum(slope_sum, 0) / length
        if ROW_MEANS:
            slope = slope / length
        for start in range(begin, end, BLOCK_T):
            t = start + lanes
            tl.store(grad_ptr + t, tl.where(counted(mask_ptr, t, end), slope, 0.0), mask=t < end)

    partials_ptr += tl.program_id(0)
    loss = tl.sum(loss_sum, 0)
    ratio = tl.sum(rho_sum, 0)
    largest = tl.where(ratio == ratio, tl.max(rho_max, 0), ratio)  # the maximum may drop NaN
    tl.store(partials_ptr, loss / length if ROW_MEANS else loss)
    tl.store(partials_ptr + programs, tl.sum(count, 0).to(tl.float32))
    tl.store(partials_ptr + 2 * programs, tl.sum(kl_sum, 0))
    tl.store(partials_ptr + 3 * programs, tl.sum(low_count, 0).to(tl.float32))
    tl.store(partials_ptr + 4 * programs, tl.sum(high_count, 0).to(tl.float32))
    tl.store(partials_ptr + 5 * programs, tl.sum(dual_count, 0).to(tl.float32))
    tl.store(partials_ptr + 6 * programs, ratio)
    tl.store(partials_ptr + 7 * programs, largest)


@triton.jit(do_not_specialize=["denominator", "programs"])
def _finish_policy_kernel(
    partials_ptr, denominator_ptr, loss_ptr, stats_ptr, denominator, programs, BLOCK: tl.constexpr
):
    tokens = tl.maximum(total_of(partials_ptr + programs, programs, BLOCK), 1.0)
    divisor = divisor_of(denominator_ptr, denominator, tokens)
    tl.store(loss_ptr, (total_of(partials_ptr, programs, BLOCK) / divisor).to(tl.float32))
    for field in tl.static_range(5):  # approx_kl, the three clip fractions, ratio_mean
        mean = total_of(partials_ptr + (2 + field) * programs, programs, BLOCK) / tokens
        tl.store(stats_ptr + field, mean.to(tl.float32))
    ratio = total_of(partials_ptr + 6 * programs, programs, BLOCK).to(tl.float32)
    largest = tl.where(ratio == ratio, largest_of(partials_ptr + 7 * programs, programs, BLOCK), ratio)
    tl.store(stats_ptr + 5, largest)
    tl.store(stats_ptr + 6, divisor.to(tl.float32))


@triton.jit(
    do_not_specialize=["clip", "stride_v", "stride_old", "stride_returns", "stride_mask", "T", "tile", "programs"]
)
def _value_loss_kernel(
    values_ptr,
    old_ptr,
    returns_ptr,
    mask_ptr,
    grad_ptr,
    partials_ptr,
    clip,
    stride_v,
    stride_old,
    stride_returns,
    stride_mask,
    T,
    tile,
    programs,
    ROW_MEANS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row, begin, end = tile_of_program(T, tile)
    values_ptr += row * stride_v
    returns_ptr += row * stride_returns
    if old_ptr is not None:
        old_ptr += row * stride_old
    if mask_ptr is not None:
        mask_ptr += row * stride_mask
    if grad_ptr is not None:
        grad_ptr += row * T
    lanes = tl.arange(0, BLOCK_T)
    length = 1.0
    if ROW_MEANS:
        length = counted_length(mask_ptr, begin, end, BLOCK_T)

    loss_sum = tl.zeros([BLOCK_T], tl.float32)
    clipped_count = tl.zeros([BLOCK_T], tl.int32)
    count = tl.zeros([BLOCK_T], tl.float32)
    # Welford's mean and sum of squared deviations in every lane, of the returns and of d = v - R.
    mean_return = tl.zeros([BLOCK_T], tl.float32)
    m2_return = tl.zeros([BLOCK_T], tl.float32)
    mean_d = tl.zeros([BLOCK_T], tl.float32)
    m2_d = tl.zeros([BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + lanes
        keep = counted(mask_ptr, t, end)
        value = tl.load(values_ptr + t, mask=keep, other=0.0).to(tl.float32)
        target = tl.load(returns_ptr + t, mask=keep, other=0.0).to(tl.float32)
        d = value - target
        squared = d * d
        loss = squared
        slope = d
        if old_ptr is not None:
            old = tl.load(old_ptr + t, mask=keep, other=0.0).to(tl.float32)
            moved = _clamp(value, old - clip, old + clip)
            squared_clipped = (moved - target) * (moved - target)
            is_clipped = squared_clipped > squared  # never where moved is the value
            loss = tl.where(is_clipped, squared_clipped, squared)
            slope = tl.where(is_clipped, 0.0, d)
            clipped_count += is_clipped.to(tl.int32)
        loss_sum += loss
        count += keep.to(tl.float32)
        share = tl.where(keep, 1.0 / tl.maximum(count, 1.0), 0.0)
        off = target - mean_return
        mean_return += tl.where(keep, off * share, 0.0)
        m2_return += tl.where(keep, off * (target - mean_return), 0.0)
        off = d - mean_d
        mean_d += tl.where(keep, off * share, 0.0)
        m2_d += tl.where(keep, off * (d - mean_d), 0.0)
        if grad_ptr is not None:
            tl.store(grad_ptr + t, tl.where(keep, slope / length, 0.0), mask=t < end)

    partials_ptr += tl.program_id(0)
    loss = 0.5 * tl.sum(loss_sum, 0)
    n = tl.sum(count, 0)
    tl.store(partials_ptr, loss / length if ROW_MEANS else loss)
    tl.store(partials_ptr + programs, n)
    tl.store(partials_ptr + 2 * programs, tl.sum(clipped_count, 0).to(tl.float32))
    tl.store(partials_ptr + 7 * programs, 0.0)
    _store_moments(partials_ptr + 3 * programs, programs, n, count, mean_return, m2_return)
    _store_moments(partials_ptr + 5 * programs, programs, n, count, mean_d, m2_d)


@triton.jit
def _store_moments(to_ptr, programs, n, count, mean, m2):
    """Lanes to one mean and one sum of squared deviations from it."""
    whole = tl.sum(count * mean, 0) / tl.maximum(n, 1.0)
    off = mean - whole
    tl.store(to_ptr, whole)
    tl.store(to_ptr + programs, tl.sum(m2 + count * off * off, 0))


@triton.jit
def _variance_sum(count_ptr, mean_ptr, programs, tokens, BLOCK: tl.constexpr):
    """Sum of squared deviations from the mean of all programs, from each one's count, mean and own sum."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n = tl.load(count_ptr + i, mask=i < programs, other=0.0).to(tl.float64)
        total += n * tl.load(mean_ptr + i, mask=i < programs, other=0.0).to(tl.float64)
    mean = tl.sum(total, 0) / tokens
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n = tl.load(count_ptr + i, mask=i < programs, other=0.0).to(tl.float64)
        off = tl.load(mean_ptr + i, mask=i < programs, other=0.0).to(tl.float64) - mean
        total += tl.load(mean_ptr + programs + i, mask=i < programs, other=0.0).to(tl.float64) + n * off * off
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["denominator", "programs"])
def _finish_value_kernel(
    partials_ptr, denominator_ptr, loss_ptr, stats_ptr, denominator, programs, BLOCK: tl.constexpr
):
    count_ptr = partials_ptr + programs
    tokens = tl.maximum(total_of(count_ptr, programs, BLOCK), 1.0)
    divisor = divisor_of(denominator_ptr, denominator, tokens)
    tl.store(loss_ptr, (total_of(partials_ptr, programs, BLOCK) / divisor).to(tl.float32))
    tl.store(stats_ptr, (total_of(partials_ptr + 2 * programs, programs, BLOCK) / tokens).to(tl.float32))
    spread = _variance_sum(count_ptr, partials_ptr + 3 * programs, programs, tokens, BLOCK)
    left = _variance_sum(count_ptr, partials_ptr + 5 * programs, programs, tokens, BLOCK)
    explained = 1.0 - left / tl.where(spread > 0.0, spread, 1.0)
    tl.store(stats_ptr + 1, tl.where(spread > 0.0, explained, 0.0).to(tl.float32))
    tl.store(stats_ptr + 2, divisor.to(tl.float32))


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
    """As the CPU backend's; a denominator that is a tensor is read by the kernel, without a sync."""
    T = logprobs.shape[1]
    tile = max(1, T if ratio or row_means else min(T, TILE))
    new, old, a, w, m = map(as_rows, (logprobs, old_logprobs, advantages, weights, mask))
    loss, stats, grad, partials, programs = outputs(logprobs, tile, 7, with_grad)
    launch(
        _policy_loss_kernel,
        programs,
        new,
        old,
        a,
        w,
        m,
        grad if with_grad else None,
        partials,
        low,
        high,
        dual_clip,
        *(row_stride(x) for x in (new, old, a, w, m)),
        T,
        tile,
        programs,
        SEQUENCE=ratio > 0,
        PER_TOKEN=ratio != 1,
        ROW_MEANS=row_means,
        BLOCK_T=BLOCK_T,
        num_warps=NUM_WARPS,
    )
    finish(_finish_policy_kernel, partials, denominator, loss, stats, programs)
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
    """As the CPU backend's."""
    T = values.shape[1]
    tile = max(1, T if row_means else min(T, TILE))
    v, old, target, m = map(as_rows, (values, None if math.isinf(clip) else old_values, returns, mask))
    loss, stats, grad, partials, programs = outputs(values, tile, 3, with_grad)
    launch(
        _value_loss_kernel,
        programs,
        v,
        old,
        target,
        m,
        grad if with_grad else None,
        partials,
        clip,
        *(row_stride(x) for x in (v, old, target, m)),
        T,
        tile,
        programs,
        ROW_MEANS=row_means,
        BLOCK_T=BLOCK_T,
        num_warps=NUM_WARPS,
    )
    finish(_finish_value_kernel, partials, denominator, loss, stats, programs)
    return loss, stats, grad
