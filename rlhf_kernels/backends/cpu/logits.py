"""selected_logprobs on the native module (csrc/cpu/logits.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, contiguous, empty_like, last_contiguous


def selected_logprobs_fwd(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [O, I, V], labels, mask, row_temperature [O*I] -> logprobs, entropy, (max, log sum), all float32.

    Raises IndexError at an unmasked label outside [0, V). Logits whose last dimension is strided are copied once.
    """
    rows = labels.shape[0]
    logprobs = torch.empty(rows, dtype=torch.float32, device="cpu")
    entropy = torch.empty(rows if with_entropy else 0, dtype=torch.float32, device="cpu")
    stats = torch.empty((rows, 2), dtype=torch.float32, device="cpu")
    logits, labels = last_contiguous(logits), labels.contiguous()
    mask, row_temperature = contiguous(mask), contiguous(row_temperature)
    bad = _native.selected_logprobs_fwd(
        **_logits_family(logits, labels, mask, temperature, row_temperature),
        logprobs=logprobs.data_ptr(),
        entropy=address(entropy if with_entropy else None),
        stats=stats.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if bad >= 0:
        raise IndexError(
            f"selected_logprobs: label {int(labels[bad])} at row {bad} is outside [0, {logits.shape[-1]}); leave rows "
            f"without a label out: mask=labels != {int(labels[bad])}"
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
    """Gradient in the dtype of logits: a new contiguous [O, I, V], or written over logits if `inplace`."""
    logits, labels = last_contiguous(logits), labels.contiguous()
    mask, row_temperature = contiguous(mask), contiguous(row_temperature)
    grad_logprobs, grad_entropy = contiguous(grad_logprobs), contiguous(grad_entropy)
    grad = logits if inplace else empty_like(logits)
    _native.selected_logprobs_bwd(
        **_logits_family(logits, labels, mask, temperature, row_temperature),
        grad_logprobs=address(grad_logprobs),
        grad_entropy=address(grad_entropy),
        stats=stats.data_ptr(),
        entropy=entropy.data_ptr(),
        grad=grad.data_ptr(),
        grad_stride_outer=grad.stride(0),
        grad_stride_inner=grad.stride(1),
        threads=torch.get_num_threads(),
    )
    return grad


def _logits_family(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, row_temperature: Tensor | None
) -> dict[str, Any]:
    """The arguments that both kernels take."""
    outer, inner, vocab = logits.shape
    return {
        "logits": logits.data_ptr(),
        "dtype": DTYPES[logits.dtype],
        "outer": outer,
        "inner": inner,
        "stride_outer": logits.stride(0),
        "stride_inner": logits.stride(1),
        "vocab": vocab,
        "labels": labels.data_ptr(),
        "label_bytes": labels.element_size(),
        "mask": address(mask),
        "temperature": temperature,
        "row_temperature": address(row_temperature),
    }
