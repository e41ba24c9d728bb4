"""full_kl on the native module (csrc/cpu/full_kl.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, contiguous, empty_like, last_contiguous


def full_kl_fwd(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    direction: int,
) -> tuple[Tensor, Tensor]:
    """logits, ref_logits [O, I, V] of one dtype, mask, row_temperature [N = O*I] -> KL [N], stats [N, 5], float32.

    direction: 0 reverse, 1 forward, 2 jsd. stats: (max, log sum) of both rows, then what the gradient needs beside
    them: of reverse the mean over pi of how much further a logit is below its row's maximum in ref than in pi, of
    jsd KL(pi || m).
    """
    rows = logits.shape[0] * logits.shape[1]
    kl = torch.empty(rows, dtype=torch.float32, device="cpu")
    stats = torch.empty((rows, 5), dtype=torch.float32, device="cpu")
    logits, ref_logits = last_contiguous(logits), last_contiguous(ref_logits)
    mask, row_temperature = contiguous(mask), contiguous(row_temperature)
    _native.full_kl_fwd(
        **_full_kl_family(logits, ref_logits, mask, temperature, row_temperature, direction),
        kl=kl.data_ptr(),
        stats=stats.data_ptr(),
        threads=torch.get_num_threads(),
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
    logits, ref_logits = last_contiguous(logits), last_contiguous(ref_logits)
    mask, row_temperature, grad = contiguous(mask), contiguous(row_temperature), grad.contiguous()
    grad_logits = empty_like(logits)
    _native.full_kl_bwd(
        **_full_kl_family(logits, ref_logits, mask, temperature, row_temperature, direction),
        grad_kl=grad.data_ptr(),
        stats=stats.data_ptr(),
        grad=grad_logits.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return grad_logits


def _full_kl_family(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    direction: int,
) -> dict[str, Any]:
    """The arguments that both kernels take."""
    outer, inner, vocab = logits.shape
    return {
        "logits": logits.data_ptr(),
        "stride_outer": logits.stride(0),
        "stride_inner": logits.stride(1),
        "ref": ref_logits.data_ptr(),
        "ref_stride_outer": ref_logits.stride(0),
        "ref_stride_inner": ref_logits.stride(1),
        "dtype": DTYPES[logits.dtype],
        "outer": outer,
        "inner": inner,
        "vocab": vocab,
        "direction": direction,
        "mask": address(mask),
        "temperature": temperature,
        "row_temperature": address(row_temperature),
    }
