"""The linear family's epilogues on the native module (csrc/cpu/linear.cpp), and memory for the sweep to fill."""

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
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which torch.mm should multiply matrices of `dtype`: float32 where this CPU has no arithmetic for 16 bits.

    oneDNN refuses such a product there, and torch's own loops are 6 to 100 times slower than a float32 GEMM.
    """
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if asked is None:
        return dtype
    try:
        return dtype if getattr(torch.ops.mkldnn, asked)() else torch.float32
    except AttributeError:  # a torch without oneDNN
        return torch.float32


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
) -> None:
    """Replaces tile by its gradient (e * (a + b * (z - m)) + onehot * c) * dz/dx; coefficients [R, 4]: a, b, c, m."""
    arguments = _tile(tile, first, bias, softcap, logit_scale, labels, temperature, row_temperature)
    _native.linear_gradient(**arguments, coefficients=coefficients.data_ptr(), threads=torch.get_num_threads())


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
