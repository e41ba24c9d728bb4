"""The linear family's epilogues: a tile of hidden @ weight.T into its rows' running softmax, or into its gradient.

z = softcap * tanh((x + bias) * logit_scale / softcap), without a softcap (x + bias) * logit_scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backends.triton.common import ALIGNMENT, launch, online_softmax_step


@triton.jit
def _tanh(x):
    """Odd minimax polynomial near 0 (Cephes), where 1 - exp would cancel; (1 - e) / (1 + e) elsewhere."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = x + x * square * p
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(x, bias_ptr, columns, inside, softcap, logit_scale, SOFTCAP: tl.constexpr):
    """Logits of products x [BLOCK] fp32, and their derivative."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if SOFTCAP:
        t = _tanh(x * (logit_scale / softcap))
        return softcap * t, logit_scale * (1.0 - t * t)
    return x * logit_scale, tl.full(x.shape, 1.0, tl.float32) * logit_scale


@triton.jit(do_not_specialize=["first", "stride", "W"])
def _online_softmax_kernel(
    tile_ptr,
    bias_ptr,
    labels_ptr,
    row_temperature_ptr,
    state_ptr,
    first,
    softcap,
    logit_scale,
    temperature,
    stride,
    W,
    ALIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    scale = 1.4426950408889634 / temperature
    row_ptr = tile_ptr + tl.multiple_of(row * stride, ALIGN)
    column = tl.load(labels_ptr + row).to(tl.int64) - first
    block = tl.arange(0, BLOCK_V)
    m = float("-inf")
    s = tl.zeros([BLOCK_V], tl.float32)
    w = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, W, BLOCK_V):
        columns = start + block
        inside = columns < W
        x = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        z, _ = _logits(x, bias_ptr, columns, inside, softcap, logit_scale, SOFTCAP)
        # Padding becomes -inf after the softcap, which has made something finite of it.
        m, s, w = online_softmax_step(tl.where(inside, z, float("-inf")), m, s, w, scale, WITH_ENTROPY)
    # The tile's softmax and the state's, brought to one maximum; the state is fp64, tiles are few.
    state_ptr += 4 * row
    m_old = tl.load(state_ptr).to(tl.float32)
    m_new = tl.maximum(m_old, m)
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    old, new = tl.exp2((m_old - pivot) * scale), tl.exp2((m - pivot) * scale)
    s_old, s_new = tl.load(state_ptr + 1), tl.sum(s, 0)
    tl.store(state_ptr, m_new.to(tl.float64))
    tl.store(state_ptr + 1, s_old * old + s_new * new)
    if WITH_ENTROPY:
        w_old = tl.where(old == 0.0, 0.0, old * (tl.load(state_ptr + 2) + s_old * (m_old - pivot)))
        w_new = tl.where(new == 0.0, 0.0, new * (tl.sum(w, 0) + s_new * (m - pivot)))
        tl.store(state_ptr + 2, w_old + w_new)
    if (column >= 0) & (column < W):
        x = tl.load(row_ptr + column + tl.zeros([1], tl.int64)).to(tl.float32)
        z, _ = _logits(x, bias_ptr, column + tl.zeros([1], tl.int64), x == x, softcap, logit_scale, SOFTCAP)
        tl.store(state_ptr + 3, tl.sum(z, 0).to(tl.float64))


@triton.jit(do_not_specialize=["first", "stride", "W"])
def _linear_gradient_kernel(
    tile_ptr,
    bias_ptr,
    labels_ptr,
    row_temperature_ptr,
    coefficients_ptr,
    first,
    softcap,
    logit_scale,
    temperature,
    stride,
    W,
    ALIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(W, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < W
    a = tl.load(coefficients_ptr + 4 * row)
    b = tl.load(coefficients_ptr + 4 * row + 1)
    c = tl.load(coefficients_ptr + 4 * row + 2)
    m = tl.load(coefficients_ptr + 4 * row + 3)
    row_ptr = tile_ptr + tl.multiple_of(row * stride, ALIGN)
    grad = tl.zeros([BLOCK_V], tl.float32)
    if (a != a) | (b != b):
        grad = tl.full([BLOCK_V], float("nan"), tl.float32)
    elif (a != 0.0) | (b != 0.0) | (c != 0.0):
        if row_temperature_ptr is not None:
            temperature = tl.load(row_temperature_ptr + row)
        label = tl.load(labels_ptr + row).to(tl.int64) - first
        x = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        z, by_x = _logits(x, bias_ptr, columns, inside, softcap, logit_scale, SOFTCAP)
        d = z - m
        e = tl.exp2(d * (1.4426950408889634 / temperature))
        # Select, because weight 0 times distance -inf is NaN.
        grad = tl.where(e == 0.0, 0.0, e * (a + b * d)) + tl.where(columns == label, c, 0.0)
        grad *= by_x
    tl.store(row_ptr + columns, grad.to(tile_ptr.dtype.element_ty), mask=inside)


def _blocks(W: int) -> tuple[int, int]:
    """BLOCK_V and num_warps, a function of the tile's width alone."""
    # 8 columns a thread: with 16, bias and softcap spill on sm_100.
    block = min(2048, max(128, triton.next_power_of_2(W)))
    return block, max(1, block // 256)


def _alignment(tile: Tensor) -> int:
    """Of every row's first element; a function of the vocabulary and the tile's width, as the workspace's tiles lie."""
    start = tile.data_ptr() % (ALIGNMENT * tile.element_size())
    return ALIGNMENT if start == 0 and tile.stride(0) % ALIGNMENT == 0 else 1


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for the sweep to fill."""
    return torch.empty(shape, dtype=dtype, device=device)


def logits_dtype(dtype: torch.dtype, fp32_logits: bool) -> torch.dtype:
    """Of a tile of products of matrices of `dtype`: every GPU here multiplies 16 bits into either."""
    return torch.float32 if fp32_logits else dtype


def products_are_invariant() -> bool:
    """No: cuBLAS chooses by the shape."""
    return False


def fp32_product(a: Tensor, b: Tensor, *, out: Tensor, accumulate: bool = False, round_a: bool = False) -> None:
    """out [M, N] float32 = a [M, K] @ b [K, N], or added to it; round_a: a may be rounded to b's dtype first."""
    if a.dtype != b.dtype:
        a, b = (a.to(b.dtype), b) if round_a else (a.float(), b.float())
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif not a.is_cuda:  # the interpreter's tensors: torch has no such product there
        fp32_product(a.float(), b.float(), out=out, accumulate=accumulate)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def multiplies_narrow(dtype: torch.dtype) -> bool:
    """Whether products with matrices of `dtype` are made in it, so that a gradient may come in it too."""
    return dtype == torch.bfloat16


def online_softmax_update(
    tile: Tensor,
    first: int,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
    labels: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    state: Tensor,
    with_entropy: bool,
) -> None:
    """Takes tile [R, W], the products' columns from `first` on, into state [R, 4] float64.

    bias: [W] float32. softcap: 0 for none. state: max m, sum(e), sum(e * (z - m)), the label's logit.
    """
    block, warps = _blocks(tile.shape[1])
    launch(
        _online_softmax_kernel,
        tile.shape[0],
        tile,
        bias,
        labels,
        row_temperature,
        state,
        first,
        softcap,
        logit_scale,
        temperature,
        tile.stride(0),
        tile.shape[1],
        ALIGN=_alignment(tile),
        SOFTCAP=softcap > 0,
        WITH_ENTROPY=with_entropy,
        BLOCK_V=block,
        num_warps=warps,
    )


def linear_gradient(
    tile: Tensor,
    first: int,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
    labels: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    coefficients: Tensor,
    narrow: bool = False,
) -> Tensor:
    """The tile's gradient (e * (a + b * (z - m)) + onehot * c) * dz/dx, over it; coefficients [R, 4]: a, b, c, m.

    narrow: it comes in bfloat16, in memory of its own.
    """
    block, warps = _blocks(tile.shape[1])
    launch(
        _linear_gradient_kernel,
        tile.shape[0] * triton.cdiv(tile.shape[1], block),
        tile,
        bias,
        labels,
        row_temperature,
        coefficients,
        first,
        softcap,
        logit_scale,
        temperature,
        tile.stride(0),
        tile.shape[1],
        ALIGN=_alignment(tile),
        SOFTCAP=softcap > 0,
        BLOCK_V=block,
        num_warps=warps,
    )
    return tile.bfloat16() if narrow else tile
