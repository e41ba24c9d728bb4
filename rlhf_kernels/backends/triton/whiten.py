"""whiten: moments per block, one program that merges them in order, and the blocks again; no atomics. Gradient:
scale * (g - mean(g) - y * mean(g * y)), the means from sums per block, merged likewise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import contiguous, launch, place, rows_of

# 1024 elements over 4 warps: 8 a thread, two 16-byte accesses in fp32.
BLOCK = 1024
NUM_WARPS = 4
MERGE_BLOCK = 512  # partial results folded at a time by the one program that merges them


@triton.jit
def _counted(mask_ptr, i, inside):
    return inside if mask_ptr is None else tl.load(mask_ptr + i, mask=inside, other=0) != 0


@triton.jit
def _scale_of(moments_ptr, eps):
    """The mean as high + low, because x - mean would lose the digits of a mean rounded once; 1 / sqrt(var + eps)."""
    count = tl.maximum(tl.load(moments_ptr), 1.0)
    mean = tl.load(moments_ptr + 1)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    variance = (tl.load(moments_ptr + 2) / count).to(tl.float32)
    return high, low, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit(do_not_specialize=["size", "columns", "stride"])
def _whiten_moments_kernel(
    x_ptr, mask_ptr, partials_ptr, size, columns, stride, STRIDED: tl.constexpr, BLOCK: tl.constexpr
):
    """One block -> count, mean, sum of squared distances to it."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    counted = _counted(mask_ptr, i, i < size)
    x = tl.load(x_ptr + place(i, columns, stride, STRIDED), mask=counted, other=0.0).to(tl.float32)
    count = tl.sum(counted.to(tl.int32), 0)
    divisor = tl.maximum(count, 1).to(tl.float32)
    mean = tl.sum(x, 0) / divisor
    distance = tl.where(counted, x - mean, 0.0)
    # The rounded mean is put right by what the distances to it sum to.
    rest = tl.sum(distance, 0)
    correction = rest / divisor
    partials_ptr += 3 * block
    tl.store(partials_ptr, count.to(tl.float64))
    tl.store(partials_ptr + 1, mean.to(tl.float64) + correction.to(tl.float64))
    tl.store(partials_ptr + 2, (tl.sum(distance * distance, 0) - correction * rest).to(tl.float64))


@triton.jit(do_not_specialize=["parts"])
def _merge_moments_kernel(parts_ptr, merged_ptr, parts, BLOCK: tl.constexpr):
    """Counts, means and squared distances of `parts` parts, in a fixed order, to those of the whole; one program.

    The distances are taken to the mean of all, which is known by then, so that no digits go where it is large.
    """
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        at = parts_ptr + 3 * (start + lanes)
        inside = start + lanes < parts
        n = tl.load(at, mask=inside, other=0.0)
        count += n
        total += n * tl.load(at + 1, mask=inside, other=0.0)
    counted = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(counted, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        at = parts_ptr + 3 * (start + lanes)
        inside = start + lanes < parts
        distance = tl.load(at + 1, mask=inside, other=0.0) - mean
        squares += tl.load(at + 2, mask=inside, other=0.0)
        squares += tl.load(at, mask=inside, other=0.0) * distance * distance
    tl.store(merged_ptr, counted)
    tl.store(merged_ptr + 1, mean)
    tl.store(merged_ptr + 2, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["size", "columns", "stride"])
def _whiten_apply_kernel(
    x_ptr,
    mask_ptr,
    moments_ptr,
    y_ptr,
    eps,
    size,
    columns,
    stride,
    SHIFT_MEAN: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = _counted(mask_ptr, i, i < size)
    high, low, scale = _scale_of(moments_ptr, eps)
    x = tl.load(x_ptr + place(i, columns, stride, STRIDED), mask=counted, other=0.0).to(tl.float32)
    y = ((x - high) - low) * scale
    if not SHIFT_MEAN:
        y += high
    tl.store(y_ptr + i, tl.where(counted, y, 0.0), mask=i < size)


@triton.jit(do_not_specialize=["size", "columns", "stride"])
def _whiten_sums_kernel(
    grad_ptr,
    x_ptr,
    mask_ptr,
    moments_ptr,
    partials_ptr,
    eps,
    size,
    columns,
    stride,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block -> sums of grad and of grad * y over what counts, y the whitened x."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    counted = _counted(mask_ptr, i, i < size)
    high, low, scale = _scale_of(moments_ptr, eps)
    g = tl.load(grad_ptr + i, mask=counted, other=0.0)
    x = tl.load(x_ptr + place(i, columns, stride, STRIDED), mask=counted, other=0.0).to(tl.float32)
    y = tl.where(counted, ((x - high) - low) * scale, 0.0)
    tl.store(partials_ptr + 2 * block, tl.sum(g, 0).to(tl.float64))
    tl.store(partials_ptr + 2 * block + 1, tl.sum(g * y, 0).to(tl.float64))


@triton.jit(do_not_specialize=["parts"])
def _merge_sums_kernel(partials_ptr, moments_ptr, means_ptr, parts, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        inside = start + lanes < parts
        first += tl.load(partials_ptr + 2 * (start + lanes), mask=inside, other=0.0)
        second += tl.load(partials_ptr + 2 * (start + lanes) + 1, mask=inside, other=0.0)
    count = tl.maximum(tl.load(moments_ptr), 1.0)
    tl.store(means_ptr, (tl.sum(first, 0) / count).to(tl.float32))
    tl.store(means_ptr + 1, (tl.sum(second, 0) / count).to(tl.float32))


@triton.jit(do_not_specialize=["size", "columns", "stride"])
def _whiten_bwd_kernel(
    grad_ptr,
    x_ptr,
    mask_ptr,
    moments_ptr,
    means_ptr,
    grad_x_ptr,
    eps,
    size,
    columns,
    stride,
    SHIFT_MEAN: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = _counted(mask_ptr, i, i < size)
    high, low, scale = _scale_of(moments_ptr, eps)
    mean_grad = tl.load(means_ptr)
    g = tl.load(grad_ptr + i, mask=counted, other=0.0)
    x = tl.load(x_ptr + place(i, columns, stride, STRIDED), mask=counted, other=0.0).to(tl.float32)
    y = ((x - high) - low) * scale
    grad = ((g - mean_grad) - y * tl.load(means_ptr + 1)) * scale
    if not SHIFT_MEAN:
        grad += mean_grad
    tl.store(grad_x_ptr + i, tl.where(counted, grad, 0.0).to(grad_x_ptr.dtype.element_ty), mask=i < size)


def _flat(x: Tensor) -> tuple[Tensor, bool, tuple[int, int, int]]:
    """x as a view where its layout allows one, whether its rows lie apart, and (size, columns, stride)."""
    size = x.numel()
    if x.is_contiguous() or size == 0:
        return x, False, (size, size, size)
    rows = rows_of(x)
    return rows, True, (size, rows.shape[1], rows.stride(0))


def whiten_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, mask [...] -> [3] float64: count, mean and sum of squared distances to it, of what counts."""
    x, strided, layout = _flat(x)
    programs = triton.cdiv(x.numel(), BLOCK)
    partials = x.new_empty((programs, 3), dtype=torch.float64)
    launch(
        _whiten_moments_kernel,
        programs,
        x,
        contiguous(mask),
        partials,
        *layout,
        STRIDED=strided,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return _merge_moments(partials)


def _merge_moments(parts: Tensor) -> Tensor:
    merged = parts.new_empty(3)
    launch(_merge_moments_kernel, 1, parts, merged, len(parts), BLOCK=MERGE_BLOCK, num_warps=NUM_WARPS)
    return merged


def whiten_fwd(
    x: Tensor, mask: Tensor | None, parts: Tensor | None, eps: float, shift_mean: bool
) -> tuple[Tensor, Tensor]:
    """x, mask [...] -> x whitened [...] float32, and moments [3] float64; those of `parts` [R, 3] merged, if given."""
    moments = whiten_moments(x, mask) if parts is None else _merge_moments(parts.contiguous())
    y = x.new_empty(x.shape, dtype=torch.float32)
    x, strided, layout = _flat(x)
    launch(
        _whiten_apply_kernel,
        triton.cdiv(x.numel(), BLOCK),
        x,
        contiguous(mask),
        moments,
        y,
        eps,
        *layout,
        SHIFT_MEAN=shift_mean,
        STRIDED=strided,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return y, moments


def whiten_bwd(grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool) -> Tensor:
    """grad, x, mask [...], moments [3] -> gradient [...] in x's dtype."""
    grad_x = x.new_empty(x.shape)
    x, strided, layout = _flat(x)
    grad, mask = grad.contiguous(), contiguous(mask)
    programs = triton.cdiv(x.numel(), BLOCK)
    partials = moments.new_empty(programs, 2)
    means = moments.new_empty(2, dtype=torch.float32)
    options = {"STRIDED": strided, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    launch(_whiten_sums_kernel, programs, grad, x, mask, moments, partials, eps, *layout, **options)
    launch(_merge_sums_kernel, 1, partials, moments, means, programs, BLOCK=MERGE_BLOCK, num_warps=NUM_WARPS)
    launch(
        _whiten_bwd_kernel,
        programs,
        grad,
        x,
        mask,
        moments,
        means,
        grad_x,
        eps,
        *layout,
        SHIFT_MEAN=shift_mean,
        **options,
    )
    return grad_x
