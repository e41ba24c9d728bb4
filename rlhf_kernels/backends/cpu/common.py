"""Shared by the native backend's modules: dtypes as the native module counts them, addresses, memory to fill."""

from __future__ import annotations

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


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor for a kernel to fill; a large one in huge pages, which fault in four times as fast."""
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.nbytes >= _HUGE_BYTES:
        _native.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
