"""Shared by the Triton kernels: the launch, and the online softmax over a row that is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether the kernels below were jitted for the interpreter; Triton reads TRITON_INTERPRET when a module is imported.
INTERPRETED = triton.knobs.runtime.interpret

# 16 elements: Triton's unit of known alignment, enough for 16-byte accesses in every dtype.
ALIGNMENT = 16


def launch(kernel, programs: int, *args, num_warps: int, **constexprs) -> None:
    """Run `kernel` on a one-dimensional grid, on the device of its first argument (a tensor).

    One dimension, because the second and third end at 65,535 programs.
    """
    if programs == 0:
        return
    if args[0].device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "the triton backend got tensors on the CPU: move them to a GPU, or set TRITON_INTERPRET=1 before the "
            "first import of triton to run its kernels in the interpreter"
        )
    with torch.cuda.device_of(args[0]):
        # Fusing a*b+c rounds once instead of twice; said because Triton 3.10 changes the default.
        kernel[(programs,)](*args, **constexprs, num_warps=num_warps, enable_fp_fusion=True)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def blocks(V: int) -> tuple[int, int]:
    """BLOCK_V and num_warps: a function of V alone, so that a row's bits do not depend on the batch."""
    # 4096 columns over 8 warps: 16 a thread, few enough registers for several programs on a multiprocessor.
    block = min(4096, max(128, triton.next_power_of_2(V)))
    return block, max(1, block // 512)


def aligned(logits: Tensor) -> bool:
    start = logits.data_ptr() % (ALIGNMENT * logits.element_size())
    return start == 0 and all(stride % ALIGNMENT == 0 for stride in logits.stride()[:-1])


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner, ALIGN: tl.constexpr):
    """Elements before row `row` = (outer, inner) of [outer, inner, V], known to be a multiple of ALIGN."""
    offset = (row // inner) * stride_outer + (row % inner) * stride_inner
    return tl.multiple_of(offset, ALIGN)


def rows_of(x: Tensor) -> Tensor:
    """[R, C] with a contiguous last dimension: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@triton.jit
def place(i, columns, stride, STRIDED: tl.constexpr):
    """Where element `i` of the flattened rows lies."""
    return (i // columns) * stride + i % columns if STRIDED else i


@triton.jit
def softmax_fold(x, m, s, scale):
    """Fold a block of logits into m and s of its row, as online_softmax_step has them.

    Returns also the block's d = x - m and e = exp(d / T) at the new maximum, and for sums over earlier blocks how far
    the maximum rose (negative or -inf) and the factor that brings e to the new one.
    """
    m_new = tl.maximum(m, tl.max(x, 0))
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf minus -inf is NaN
    d = x - pivot
    e = tl.exp2(d * scale)
    shift = m - pivot
    rescale = tl.exp2(shift * scale)
    return m_new, s * rescale + e, d, e, shift, rescale


@triton.jit
def online_softmax_step(x, m, s, w, scale, WITH_ENTROPY: tl.constexpr):
    """Fold a block of logits into the running softmax of its row.

    x: [BLOCK] fp32, -inf in padded columns. m: scalar, maximum so far, -inf before the first block.
    s: [BLOCK], lane sums of e = exp((x - m) / T). w: [BLOCK], lane sums of e * (x - m). scale: log2(e) / T.
    Lanes are summed once, after the last block. NaN reaches s, although the maximum may drop it.
    """
    m_new, s_new, d, e, shift, rescale = softmax_fold(x, m, s, scale)
    if WITH_ENTROPY:
        # Select, because weight 0 times distance -inf is NaN: at x = -inf, and where m was -inf.
        w = tl.where(rescale == 0.0, 0.0, rescale * (w + s * shift)) + tl.where(e == 0.0, 0.0, e * d)
    return m_new, s_new, w


@triton.jit
def row_softmax(row_ptr, V, temperature, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr):
    """One read of a row -> (m, log_s, mean): maximum of the raw row, log sum exp((x - m) / T), sum p * (x - m).

    m and log_s stay apart: their sum would lose log_s's digits at logits of 1e4. `mean` is 0 unless WITH_ENTROPY.
    """
    columns = tl.arange(0, BLOCK_V)
    scale = 1.4426950408889634 / temperature
    m = float("-inf")
    s = tl.zeros([BLOCK_V], tl.float32)
    w = tl.zeros([BLOCK_V], tl.float32)
    # Three stages: two blocks are on their way to shared memory while one is folded.
    for start in tl.range(0, V, BLOCK_V, num_stages=3):
        inside = start + columns < V
        x = tl.load(row_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        m, s, w = online_softmax_step(x, m, s, w, scale, WITH_ENTROPY)
    total = tl.sum(s, 0)
    return m, tl.log(total), tl.sum(w, 0) / total
