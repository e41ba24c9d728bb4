"""selected_logprobs: logp = (x[label] - m)/T - log_s and entropy log_s - sum p (x - m)/T, one read of the row;
gradient (g (onehot - p) - gH p (log p + H)) / T, one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import ALIGNMENT, aligned, blocks, contiguous, launch, row_offset, row_softmax


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner"])
def _selected_logprobs_fwd_kernel(
    logits_ptr,
    labels_ptr,
    mask_ptr,
    row_temperature_ptr,
    logprobs_ptr,
    entropy_ptr,
    stats_ptr,
    temperature,
    inner,
    stride_outer,
    stride_inner,
    V,
    ALIGN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counted = True if mask_ptr is None else tl.load(mask_ptr + row)
    logprob, entropy, m, log_s = 0.0, 0.0, 0.0, 0.0
    if counted:
        if row_temperature_ptr is not None:
            temperature = tl.load(row_temperature_ptr + row)
        row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        label = tl.load(labels_ptr + row).to(tl.int64)
        known = (label >= 0) & (label < V)
        chosen = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        m, log_s, mean = row_softmax(row_ptr, V, temperature, WITH_ENTROPY, BLOCK_V)
        logprob = tl.div_rn(chosen - m, temperature) - log_s
        entropy = log_s - mean / temperature
    tl.store(logprobs_ptr + row, logprob)
    tl.store(stats_ptr + 2 * row, m)
    tl.store(stats_ptr + 2 * row + 1, log_s)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner", "stride_grad_outer", "stride_grad_inner"])
def _selected_logprobs_bwd_kernel(
    logits_ptr,
    labels_ptr,
    mask_ptr,
    row_temperature_ptr,
    stats_ptr,
    entropy_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    grad_ptr,
    temperature,
    inner,
    stride_outer,
    stride_inner,
    stride_grad_outer,
    stride_grad_inner,
    V,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    per_row = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    start = (tl.program_id(0) % per_row) * BLOCK_V
    columns = start + tl.arange(0, BLOCK_V)
    inside = columns < V
    counted = True if mask_ptr is None else tl.load(mask_ptr + row)
    grad = tl.zeros([BLOCK_V], tl.float32)
    if counted:
        g = 0.0 if grad_logprobs_ptr is None else tl.load(grad_logprobs_ptr + row)
        g_entropy = 0.0 if grad_entropy_ptr is None else tl.load(grad_entropy_ptr + row)
        label = tl.load(labels_ptr + row).to(tl.int64)
        known = (label >= 0) & (label < V)
        if not known:
            grad = tl.full([BLOCK_V], float("nan"), tl.float32)
        elif (g != 0.0) | (g_entropy != 0.0):
            if row_temperature_ptr is not None:
                temperature = tl.load(row_temperature_ptr + row)
            per_temperature = 1.0 / temperature
            m = tl.load(stats_ptr + 2 * row)
            log_s = tl.load(stats_ptr + 2 * row + 1)
            offset = row_offset(row, inner, stride_outer, stride_inner, ALIGN)
            x = tl.load(logits_ptr + offset + columns, mask=inside, other=float("-inf")).to(tl.float32)
            log_p = (x - m) * per_temperature - log_s
            p = tl.exp(log_p)
            grad = g * (tl.where(columns == label, 1.0, 0.0) - p)
            if grad_entropy_ptr is not None:
                entropy = tl.load(entropy_ptr + row)
                grad -= g_entropy * tl.where(p == 0.0, 0.0, p * (log_p + entropy))
            grad *= per_temperature
    offset = row_offset(row, inner, stride_grad_outer, stride_grad_inner, ALIGN)
    tl.store(grad_ptr + offset + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def selected_logprobs_fwd(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [O, I, V]; labels, mask, row_temperature [N = O*I] -> logprobs [N], entropy [N] or [0], stats [N, 2].

    Rows may be strided. Copied once: a last dimension that is not contiguous, and rows that start off a
    16-element boundary while V is a multiple of 16, whose sums would round in another order.
    """
    rows, V = labels.shape[0], logits.shape[-1]
    if logits.stride(-1) != 1 or (V % ALIGNMENT == 0 and not aligned(logits)):
        logits = logits.clone(memory_format=torch.contiguous_format)
    new = logits.new_empty
    logprobs = new(rows, dtype=torch.float32)
    entropy = new(rows if with_entropy else 0, dtype=torch.float32)
    stats = new((rows, 2), dtype=torch.float32)
    block, warps = blocks(V)
    launch(
        _selected_logprobs_fwd_kernel,
        rows,
        logits,
        *map(contiguous, (labels, mask, row_temperature)),
        logprobs,
        entropy,
        stats,
        temperature,
        logits.shape[1],
        logits.stride(0),
        logits.stride(1),
        V,
        ALIGN=ALIGNMENT if V % ALIGNMENT == 0 else 1,
        WITH_ENTROPY=with_entropy,
        BLOCK_V=block,
        num_warps=warps,
    )
    return logprobs, entropy, stats


def selected_logprobs_bwd(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    stats: Tensor,
    entropy: Tensor,
    inplace: bool,
) -> Tensor:
    """Gradient [O, I, V] in logits' dtype: contiguous, or written over `logits` through its strides if `inplace`."""
    rows, V = labels.shape[0], logits.shape[-1]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    grad = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    block, warps = blocks(V)
    launch(
        _selected_logprobs_bwd_kernel,
        rows * triton.cdiv(V, block),
        logits,
        *map(contiguous, (labels, mask, row_temperature)),
        stats,
        entropy,
        contiguous(grad_logprobs),
        contiguous(grad_entropy),
        grad,
        temperature,
        logits.shape[1],
        logits.stride(0),
        logits.stride(1),
        grad.stride(0),
        grad.stride(1),
        V,
        ALIGN=ALIGNMENT if V % ALIGNMENT == 0 and aligned(logits) and aligned(grad) else 1,
        BLOCK_V=block,
        num_warps=warps,
    )
    return grad
