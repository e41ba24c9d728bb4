"""Matrix products on the native module (csrc/cpu/matmul.cpp): float32 results of matrices of any dtype and layout."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES


def matmul(a: Tensor, b: Tensor, *, out: Tensor, accumulate: bool = False, round_a: bool = False) -> None:
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
