"""full_kl of rows p = softmax(x / T) and q = softmax(y / T), with d = x - max(x) and d' = y - max(y): KL(p || q) is
mean_p(d - d') / T - (log s - log s'), one read of both rows; jsd reads them twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import (
    ALIGNMENT,
    aligned,
    contiguous,
    launch,
    row_offset,
    row_softmax,
    softmax_fold,
)

REVERSE, FORWARD, JSD = (tl.constexpr(index) for index in range(3))  # as the op's DIRECTIONS counts them


def blocks(V: int) -> tuple[int, int]:
    """BLOCK_V and num_warps, as common.blocks: 8 columns of each row a thread, which carries three sums of each."""
    block = min(2048, max(128, triton.next_power_of_2(V)))
    return block, max(1, block // 256)


@triton.jit
def _log_sum(m, s):
    """NaN for a row of only -inf, which is no distribution."""
    return tl.where(m == float("-inf"), float("nan"), tl.log(s))


@triton.jit
def _row_kl(x_ptr, y_ptr, V, temperature, BLOCK_V: tl.constexpr):
    """One read of both rows -> KL(x's || y's), m and log_s of x's row and of y's, mean over x's of d - d'."""
    columns = tl.arange(0, BLOCK_V)
    scale = 1.4426950408889634 / temperature
    m, m_y = float("-inf"), float("-inf")
    s = tl.zeros([BLOCK_V], tl.float32)
    s_y = tl.zeros([BLOCK_V], tl.float32)
    w = tl.zeros([BLOCK_V], tl.float32)  # lane sums of e * (d - d'); not finite where only y is -inf
    for start in tl.range(0, V, BLOCK_V, num_stages=3):
        inside = start + columns < V
        x = tl.load(x_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(y_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        # A row that was only -inf so far has no terms to shift.
        before = tl.where(m_y == float("-inf"), 0.0, 1.0)
        m_y, s_y, d_y, _, shift_y, _ = softmax_fold(y, m_y, s_y, scale)
        shift_y = tl.where(before == 0.0, 0.0, shift_y)
        s_before = s
        m, s, d, e, shift, rescale = softmax_fold(x, m, s, scale)
        # Where rescale is 0 nothing is left of w but an infinity. Equal rows rise alike, and w stays 0.
        w = tl.where(rescale == 0.0, w * 0.0, rescale * (w + s_before * (shift - shift_y)))
        w += tl.where(x == float("-inf"), 0.0, e * (d - d_y))
    total = tl.sum(s, 0)
    log_s, log_s_y = _log_sum(m, total), _log_sum(m_y, tl.sum(s_y, 0))
    difference = log_s - log_s_y
    mean = tl.sum(w, 0) / total
    # Two proper rows, and yet no finite mean: x's gives a chance, however small, where y's has none.
    infinite = (difference == difference) & ((mean - mean) != 0.0)
    mean = tl.where(infinite, float("inf"), mean)
    return mean / temperature - difference, m, log_s, m_y, log_s_y, mean


@triton.jit
def _mixture(x, y, m, log_s, m_y, log_s_y, temperature):
    """-> e = exp(d / T), e' = exp(d' / T), log(p / mix) and log(q / mix), mix = (p + q) / 2; both logs exactly 0 in
    equal rows."""
    d, d_y = x - m, y - m_y
    scale = 1.4426950408889634 / temperature
    e, e_y = tl.exp2(d * scale), tl.exp2(d_y * scale)
    q = e_y * tl.exp(log_s - log_s_y)  # against p = e
    # The larger one's log is log(1 + |p - q| / (p + q)), the smaller one's differs by log(p / q): nothing is lost where
    # p / q is far from 1. The select also covers -inf on both sides.
    log_ratio = tl.where(e == q, 0.0, (d - d_y) / temperature - (log_s - log_s_y))
    larger = tl.log(1.0 + tl.abs(e - q) / (e + q + 1.17549435e-38))
    return e, e_y, larger + tl.minimum(log_ratio, 0.0), larger - tl.maximum(log_ratio, 0.0)


@triton.jit
def _row_jsd(x_ptr, y_ptr, V, temperature, BLOCK_V: tl.constexpr):
    """Two reads of both rows -> jsd, m and log_s of x's row and of y's, KL(p || mixture)."""
    m, log_s, _ = row_softmax(x_ptr, V, temperature, False, BLOCK_V)
    m_y, log_s_y, _ = row_softmax(y_ptr, V, temperature, False, BLOCK_V)
    columns = tl.arange(0, BLOCK_V)
    of_p = tl.zeros([BLOCK_V], tl.float32)
    of_q = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=3):
        inside = start + columns < V
        x = tl.load(x_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(y_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        e, e_y, log_p_m, log_q_m = _mixture(x, y, m, log_s, m_y, log_s_y, temperature)
        of_p += tl.where(e == 0.0, 0.0, e * log_p_m)
        of_q += tl.where(e_y == 0.0, 0.0, e_y * log_q_m)
    proper = (m > float("-inf")) & (m_y > float("-inf"))  # +inf and NaN have made log_s NaN
    kl_p = tl.where(proper, tl.sum(of_p, 0) * tl.exp(-log_s), float("nan"))
    kl_q = tl.sum(of_q, 0) * tl.exp(-log_s_y)
    return 0.5 * (kl_p + kl_q), m, log_s, m_y, log_s_y, kl_p


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner", "stride_ref_outer", "stride_ref_inner"])
def _full_kl_fwd_kernel(
    logits_ptr,
    ref_ptr,
    mask_ptr,
    row_temperature_ptr,
    kl_ptr,
    stats_ptr,
    temperature,
    inner,
    stride_outer,
    stride_inner,
    stride_ref_outer,
    stride_ref_inner,
    V,
    ALIGN: tl.constexpr,
    DIRECTION: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counted = True if mask_ptr is None else tl.load(mask_ptr + row)
    kl, m, log_s, m_ref, log_s_ref, kept = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if counted:
        if row_temperature_ptr is not None:
            temperature = tl.load(row_temperature_ptr + row)
        x_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        y_ptr = ref_ptr + row_offset(row, inner, stride_ref_outer, stride_ref_inner, ALIGN)
        if DIRECTION == REVERSE:
            kl, m, log_s, m_ref, log_s_ref, kept = _row_kl(x_ptr, y_ptr, V, temperature, BLOCK_V)
        elif DIRECTION == FORWARD:
            kl, m_ref, log_s_ref, m, log_s, kept = _row_kl(y_ptr, x_ptr, V, temperature, BLOCK_V)
        else:
            kl, m, log_s, m_ref, log_s_ref, kept = _row_jsd(x_ptr, y_ptr, V, temperature, BLOCK_V)
    tl.store(kl_ptr + row, kl)
    stats_ptr += 5 * row
    tl.store(stats_ptr, m)
    tl.store(stats_ptr + 1, log_s)
    tl.store(stats_ptr + 2, m_ref)
    tl.store(stats_ptr + 3, log_s_ref)
    tl.store(stats_ptr + 4, kept)


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner", "stride_ref_outer", "stride_ref_inner"])
def _full_kl_bwd_kernel(
    grad_kl_ptr,
    logits_ptr,
    ref_ptr,
    mask_ptr,
    row_temperature_ptr,
    stats_ptr,
    grad_ptr,
    temperature,
    inner,
    stride_outer,
    stride_inner,
    stride_ref_outer,
    stride_ref_inner,
    V,
    ALIGN: tl.constexpr,
    DIRECTION: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    per_row = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    columns = (tl.program_id(0) % per_row) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    counted = True if mask_ptr is None else tl.load(mask_ptr + row)
    grad = tl.zeros([BLOCK_V], tl.float32)
    if counted:
        g = tl.load(grad_kl_ptr + row)
        if g != 0.0:
            if row_temperature_ptr is not None:
                temperature = tl.load(row_temperature_ptr + row)
            stats_ptr += 5 * row
            m, log_s = tl.load(stats_ptr), tl.load(stats_ptr + 1)
            m_ref, log_s_ref = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
            kept = tl.load(stats_ptr + 4)
            x_offset = row_offset(row, inner, stride_outer, stride_inner, ALIGN) + columns
            y_offset = row_offset(row, inner, stride_ref_outer, stride_ref_inner, ALIGN) + columns
            x = tl.load(logits_ptr + x_offset, mask=inside, other=float("-inf")).to(tl.float32)
            y = tl.load(ref_ptr + y_offset, mask=inside, other=float("-inf")).to(tl.float32)
            scale = 1.4426950408889634 / temperature
            weight = g * tl.exp(-log_s) / temperature
            needed = log_s + log_s_ref
            if DIRECTION == FORWARD:
                e_ref = tl.exp2((y - m_ref) * scale)
                grad = weight * (tl.exp2((x - m) * scale) - e_ref * tl.exp(log_s - log_s_ref))
            elif DIRECTION == REVERSE:
                needed += kept  # an infinite KL has no gradient
                d = x - m
                e = tl.exp2(d * scale)
                # The difference first: it cancels where one p is almost 1.
                above = d - (y - m_ref) - kept
                grad = tl.where(e == 0.0, 0.0, (weight / temperature) * e * above)
            else:
                e, _, log_p_m, _ = _mixture(x, y, m, log_s, m_ref, log_s_ref, temperature)
                grad = tl.where(e == 0.0, 0.0, 0.5 * weight * e * (log_p_m - kept))
            needed *= g
            grad = tl.where(needed - needed == 0.0, grad, float("nan"))
    tl.store(grad_ptr + row * V + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def full_kl_fwd(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    direction: int,
) -> tuple[Tensor, Tensor]:
    """logits, ref_logits [O, I, V] of one dtype; mask, row_temperature [N = O*I] -> KL [N] and stats [N, 5], fp32.

    direction: 0 reverse, 1 forward, 2 jsd. Rows may be strided, and are copied where selected_logprobs_fwd copies them.
    """
    V, rows = logits.shape[-1], logits.shape[0] * logits.shape[1]
    logits, ref_logits = (
        x.clone(memory_format=torch.contiguous_format)
        if x.stride(-1) != 1 or (V % ALIGNMENT == 0 and not aligned(x))
        else x
        for x in (logits, ref_logits)
    )
    kl = logits.new_empty(rows, dtype=torch.float32)
    stats = logits.new_empty((rows, 5), dtype=torch.float32)
    block, warps = blocks(V)
    launch(
        _full_kl_fwd_kernel,
        rows,
        logits,
        ref_logits,
        contiguous(mask),
        contiguous(row_temperature),
        kl,
        stats,
        temperature,
        logits.shape[1],
        logits.stride(0),
        logits.stride(1),
        ref_logits.stride(0),
        ref_logits.stride(1),
        V,
        ALIGN=ALIGNMENT if V % ALIGNMENT == 0 else 1,
        DIRECTION=direction,
        BLOCK_V=block,
        num_warps=warps,
    )
    return kl, stats


def full_kl_bwd(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    direction: int,
    stats: Tensor,
) -> Tensor:
    """grad [N] -> gradient of the logits, contiguous [O, I, V] in their dtype."""
    V, rows = logits.shape[-1], logits.shape[0] * logits.shape[1]
    logits, ref_logits = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits, ref_logits))
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    block, warps = blocks(V)
    together = aligned(logits) and aligned(ref_logits)
    launch(
        _full_kl_bwd_kernel,
        rows * triton.cdiv(V, block),
        contiguous(grad),
        logits,
        ref_logits,
        contiguous(mask),
        contiguous(row_temperature),
        stats,
        grad_logits,
        temperature,
        logits.shape[1],
        logits.stride(0),
        logits.stride(1),
        ref_logits.stride(0),
        ref_logits.stride(1),
        V,
        ALIGN=ALIGNMENT if V % ALIGNMENT == 0 and together else 1,
        DIRECTION=direction,
        BLOCK_V=block,
        num_warps=warps,
    )
    return grad_logits
