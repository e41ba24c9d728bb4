"""sample_tokens by inverse CDF: blocks of a row are summed side by side, then one program a row picks the block and the
column in it where the running sum exceeds u times the total. top-k and top-p are a threshold each, found by search on
keys that order as the logits do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import ALIGNMENT, aligned, blocks, contiguous, launch, row_offset

# Of a logit as float32, from the top: what can differ between two logits, in digits of two bits.
DIGITS = {torch.float32: 16, torch.float16: 10, torch.bfloat16: 8}


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner"])
def _block_sums_kernel(
    logits_ptr,
    mask_ptr,
    row_temperature_ptr,
    least_ptr,
    sums_ptr,
    temperature,
    inner,
    stride_outer,
    stride_inner,
    V,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One block of one row -> its maximum m and sum exp((x - m) / T), over what is not below `least`."""
    program = tl.program_id(0).to(tl.int64)
    per_row = tl.cdiv(V, BLOCK_V)
    row = program // per_row
    columns = (program % per_row) * BLOCK_V + tl.arange(0, BLOCK_V)
    counted = True if mask_ptr is None else tl.load(mask_ptr + row)
    m, s = float("-inf"), 0.0
    if counted:
        if row_temperature_ptr is not None:
            temperature = tl.load(row_temperature_ptr + row)
        row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        x = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        if least_ptr is not None:
            x = tl.where(x >= tl.load(least_ptr + row), x, float("-inf"))
        m = tl.max(x, 0)
        pivot = tl.where(m == float("-inf"), 0.0, m)  # -inf minus -inf is NaN
        s = tl.sum(tl.exp2((x - pivot) * (1.4426950408889634 / temperature)), 0)
    tl.store(sums_ptr + 2 * program, m)
    tl.store(sums_ptr + 2 * program + 1, s)


@triton.jit
def _row_sums(sums_ptr, row, V, scale, BLOCK_V: tl.constexpr, BLOCKS: tl.constexpr):
    """-> the row's maximum and, per block, its mass in float64 relative to that maximum."""
    index = tl.arange(0, BLOCKS)
    per_row = tl.cdiv(V, BLOCK_V)
    place = sums_ptr + 2 * (row * per_row + index)
    m = tl.load(place, mask=index < per_row, other=float("-inf"))
    s = tl.load(place + 1, mask=index < per_row, other=0.0)
    top = tl.max(m, 0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    return top, s.to(tl.float64) * tl.exp2((m - pivot) * scale).to(tl.float64)


@triton.jit
def _first_above(mass, target, SIZE: tl.constexpr):
    """mass [SIZE] float64 -> first index at which the running sum exceeds target, and the sum before it.

    Never an index of mass 0 while there is another: where rounding says to go past the last one, it is that one.
    """
    index = tl.arange(0, SIZE)
    upto = tl.cumsum(mass, 0)
    last = tl.max(tl.where(mass > 0.0, index, 0), 0)
    first = tl.min(tl.where((upto > target) & (mass > 0.0), index, last), 0)
    return first, tl.sum(tl.where(index == first, upto - mass, 0.0), 0)


@triton.jit
def _key(x):
    """uint32 that orders as the floats do."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _number(key):
    return tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _amounts(row_ptr, V, least, m, scale, key, unit, COUNT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Number, or sum of exp((x - m) / T), of the columns at or above key + 1, 2 and 3 units, and not below `least`."""
    columns = tl.arange(0, BLOCK_V)
    dtype: tl.constexpr = tl.int32 if COUNT else tl.float32
    first = tl.zeros([BLOCK_V], dtype)
    second = tl.zeros([BLOCK_V], dtype)
    third = tl.zeros([BLOCK_V], dtype)
    for start in range(0, V, BLOCK_V):
        inside = start + columns < V
        x = tl.load(row_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        weight = inside.to(tl.int32) if COUNT else tl.where(x >= least, tl.exp2((x - m) * scale), 0.0)
        here = _key(x)
        first += tl.where(here >= key + unit, weight, 0)
        second += tl.where(here >= key + 2 * unit, weight, 0)
        third += tl.where(here >= key + 3 * unit, weight, 0)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit
def _search(row_ptr, V, least, m, scale, target, COUNT: tl.constexpr, DIGITS: tl.constexpr, BLOCK_V: tl.constexpr):
    """The largest number such that the columns at or above it amount to `target`, two bits of its key a pass."""
    unit = tl.full([], 0x40000000, tl.uint32)
    key = unit - unit
    for _ in range(DIGITS):
        first, second, third = _amounts(row_ptr, V, least, m, scale, key, unit, COUNT, BLOCK_V)
        digit = (first >= target).to(tl.uint32) + (second >= target).to(tl.uint32) + (third >= target).to(tl.uint32)
        key += digit * unit
        unit = unit >> 2
    return _number(tl.where(key > 0x007FFFFF, key, 0x007FFFFF))  # -inf: below it are the keys of NaNs


@triton.jit(do_not_specialize=["top_k", "inner", "stride_outer", "stride_inner"])
def _threshold_kernel(
    logits_ptr,
    mask_ptr,
    row_temperature_ptr,
    sums_ptr,
    least_ptr,
    temperature,
    top_k,
    top_p,
    inner,
    stride_outer,
    stride_inner,
    V,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    DIGITS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One row -> the smallest logit that is kept; NaN, so that nothing is, where the row has no distribution."""
    row = tl.program_id(0).to(tl.int64)
    counted = True if mask_ptr is None else tl.load(mask_ptr + row)
    least = float("nan")
    if counted:
        if row_temperature_ptr is not None:
            temperature = tl.load(row_temperature_ptr + row)
        scale = 1.4426950408889634 / temperature
        m, mass = _row_sums(sums_ptr, row, V, scale, BLOCK_V, BLOCKS)
        total = tl.sum(mass, 0)
        if total > 0.0:
            row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
            least = float("-inf")
            if TOP_K:
                least = _search(row_ptr, V, least, m, scale, top_k, True, DIGITS, BLOCK_V)
            if TOP_P:
                target = top_p * total
                if TOP_K:
                    zero = tl.full([], 0, tl.uint32)
                    kept, _, _ = _amounts(row_ptr, V, least, m, scale, zero, zero, False, BLOCK_V)
                    target = top_p * kept.to(tl.float64)
                least = tl.maximum(least, _search(row_ptr, V, least, m, scale, target, False, DIGITS, BLOCK_V))
    tl.store(least_ptr + row, least)


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner"])
def _pick_kernel(
    logits_ptr,
    uniform_ptr,
    mask_ptr,
    row_temperature_ptr,
    least_ptr,
    sums_ptr,
    tokens_ptr,
    logprobs_ptr,
    temperature,
    inner,
    stride_outer,
    stride_inner,
    V,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counted = True if mask_ptr is None else tl.load(mask_ptr + row)
    token, logprob = 0, 0.0
    if counted:
        if row_temperature_ptr is not None:
            temperature = tl.load(row_temperature_ptr + row)
        scale = 1.4426950408889634 / temperature
        m, mass = _row_sums(sums_ptr, row, V, scale, BLOCK_V, BLOCKS)
        total = tl.sum(mass, 0)
        logprob = float("nan")
        if total > 0.0:
            target = tl.load(uniform_ptr + row) * total
            block, before = _first_above(mass, target, BLOCKS)
            columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
            row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
            x = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            e = tl.exp2((x - m) * scale)
            if least_ptr is not None:
                e = tl.where(x >= tl.load(least_ptr + row), e, 0.0)
            place, _ = _first_above(e.to(tl.float64), target - before, BLOCK_V)
            token = block * BLOCK_V + place
            chosen = tl.max(tl.where(columns == token, x, float("-inf")), 0)
            logprob = tl.div_rn(chosen - m, temperature) - tl.log(total.to(tl.float32))
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, logprob)


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """logits [O, I, V]; uniform float64, mask, row_temperature [N = O*I] -> tokens int64, logprobs float32 [N].

    top_k in [1, V] or 0, top_p in (0, 1]; 0 and 1 keep everything. Rows may be strided; copied once as for
    selected_logprobs. Workspace: float32 [N, blocks, 2], and [N] with a filter.
    """
    rows, V = uniform.shape[0], logits.shape[-1]
    if logits.stride(-1) != 1 or (V % ALIGNMENT == 0 and not aligned(logits)):
        logits = logits.clone(memory_format=torch.contiguous_format)
    uniform, mask, row_temperature = uniform.contiguous(), contiguous(mask), contiguous(row_temperature)
    block, warps = blocks(V)
    per_row = triton.cdiv(V, block)
    sums = logits.new_empty((rows, per_row, 2), dtype=torch.float32)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    place = (logits.shape[1], logits.stride(0), logits.stride(1), V)
    options = {"ALIGN": ALIGNMENT if V % ALIGNMENT == 0 else 1, "BLOCK_V": block, "num_warps": warps}
    wide = {"BLOCKS": triton.next_power_of_2(per_row), **options}

    def sum_blocks(least: Tensor | None) -> None:
        arguments = (logits, mask, row_temperature, least, sums, temperature, *place)
        launch(_block_sums_kernel, rows * per_row, *arguments, **options)

    sum_blocks(None)
    least: Tensor | None = None
    if top_k or top_p < 1:
        least = torch.empty_like(logprobs)
        launch(
            _threshold_kernel,
            rows,
            logits,
            mask,
            row_temperature,
            sums,
            least,
            temperature,
            top_k,
            top_p,
            *place,
            TOP_K=top_k > 0,
            TOP_P=top_p < 1,
            DIGITS=DIGITS[logits.dtype],
            **wide,
        )
        sum_blocks(least)
    arguments = (logits, uniform, mask, row_temperature, least, sums, tokens, logprobs, temperature, *place)
    launch(_pick_kernel, rows, *arguments, **wide)
    return tokens, logprobs
