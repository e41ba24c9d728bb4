"""The linear family's products and epilogues on the native module (csrc/cpu/matmul.cpp, linear.cpp), and its memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, empty


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, on huge pages where large: the workspace is fresh in each call, and so are its page faults."""
    return empty(shape, dtype)


@cache
def logits_dtype(dtype: torch.dtype, fp32_logits: bool) -> torch.dtype:
    """Of a tile of products of matrices of `dtype`: float32 where it is asked for, or torch cannot do otherwise.

    Where this CPU has no arithmetic for 16 bits, oneDNN refuses a 16-bit product, and torch's own loops are 6 to 100
    times slower than a float32 GEMM.
    """
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if asked is None or fp32_logits:
        return torch.float32
    try:
        return dtype if getattr(torch.ops.mkldnn, asked)() else torch.float32
    except AttributeError:  # a torch without oneDNN
        return torch.float32


def products_are_invariant() -> bool:
    """Whether the bits of a row of fp32_product depend on no other row."""
    return True


def fp32_product(a: Tensor, b: Tensor, *, out: Tensor, accumulate: bool = False, round_a: bool = False) -> None:
    """out [M, N] float32 = a [M, K] @ b [K, N], or added to it.

    Sums are float32, in the order of K: an element's bits depend on its row of a and its column of b alone, not on the
    other rows, on the number of threads, nor on torch's settings for products of float32.

    round_a: a may be rounded to b's dtype first, where the CPU multiplies pairs of bfloat16.
    """
    bfloat = torch.bfloat16
    _native.matmul(
        a=a.data_ptr(),
        a_dtype=DTYPES[a.dtype],
        a_row=a.stride(0),
        a_column=a.stride(1),
        b=b.data_ptr(),
        b_dtype=DTYPES[b.dtype],
        b_row=b.stride(0),
        b_column=b.stride(1),
        c=out.data_ptr(),
        c_row=out.stride(0),
        m=a.shape[0],
        n=b.shape[1],
        k=a.shape[1],
        accumulate=accumulate,
        pairs=b.dtype == bfloat and (round_a or a.dtype == bfloat) and _native.has_bfloat_pairs(),
        threads=torch.get_num_threads(),
    )


def multiplies_narrow(dtype: torch.dtype) -> bool:
    """Whether products with matrices of `dtype` are made in it, so that a gradient may come in it too."""
    return dtype == torch.bfloat16 and _native.has_bfloat_pairs()


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
    arguments = _tile(tile, first, bias, softcap, logit_scale, labels, temperature, row_temperature)
    _native.online_softmax_update(
        **arguments, state=state.data_ptr(), entropy=with_entropy, threads=torch.get_num_threads()
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

    narrow: a float32 tile's gradient comes in bfloat16, in the first half of each row's memory.
    """
    arguments = _tile(tile, first, bias, softcap, logit_scale, labels, temperature, row_temperature)
    _native.linear_gradient(
        **arguments, coefficients=coefficients.data_ptr(), narrow=narrow, threads=torch.get_num_threads()
    )
    return tile.view(torch.bfloat16)[:, : tile.shape[1]] if narrow else tile


def _tile(
    tile: Tensor,
    first: int,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
    labels: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
) -> dict[str, Any]:
    """The arguments that both kernels take. Every tensor is contiguous but for the tile's rows."""
    return {
        "data": tile.data_ptr(),
        "dtype": DTYPES[tile.dtype],
        "rows": tile.shape[0],
        "stride": tile.stride(0),
        "width": tile.shape[1],
        "first": first,
        "bias": address(bias),
        "softcap": softcap,
        "scale": logit_scale,
        "labels": labels.data_ptr(),
        "label_bytes": labels.element_size(),
        "temperature": temperature,
        "row_temperature": address(row_temperature),
    }
