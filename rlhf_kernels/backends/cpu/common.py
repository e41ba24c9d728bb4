"""Shared by the native backend's modules: dtypes as the native module counts them, addresses, memory to fill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kernels import _native

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Above this the C library returns memory to the system at every free, and each use faults its pages in again.
_HUGE_BYTES = 32 << 20


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def flat_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """(x, columns, stride) for the kernels that run over flattened tensors: rows of `columns`, `stride` apart.

    Copied once: a last dimension that is not contiguous, and leading ones that are not one run of equal strides.
    """
    if x.is_contiguous() or x.numel() == 0:
        return x, x.numel(), x.numel()
    rows = last_contiguous(x).reshape(-1, x.shape[-1])
    return rows, rows.shape[1], rows.stride(0)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous tensor for a kernel to fill; a large one in huge pages, which fault in four times as fast."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    if out.nbytes >= _HUGE_BYTES:
        _native.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def empty_like(x: Tensor) -> Tensor:
    """As `empty`, of x's shape and dtype."""
    return empty(x.shape, x.dtype)
