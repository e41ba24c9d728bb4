"""selected_logprobs on the native module (csrc/cpu/logits.cpp)."""

from __future__ import annotations

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
    logprobs = torch.empty(rows, dtype=torch.float32)
    entropy = torch.empty(rows if with_entropy else 0, dtype=torch.float32)
    stats = torch.empty((rows, 2), dtype=torch.float32)
    logits, labels = last_contiguous(logits), labels.contiguous()
    mask, row_temperature = contiguous(mask), contiguous(row_temperature)
    bad = _native.selected_logprobs_fwd(
        *_logits_family(logits, labels, mask, temperature, row_temperature),
        logprobs.data_ptr(),
        address(entropy if with_entropy else None),
        stats.data_ptr(),
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise IndexError(
            f"selected_logprobs: labels holds {int(labels[bad])} at row {bad}; a label that the mask counts "
            f"must be in [0, {logits.shape[-1]})"
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
        *_logits_family(logits, labels, mask, temperature, row_temperature),
        address(grad_logprobs),
        address(grad_entropy),
        stats.data_ptr(),
        entropy.data_ptr(),
        grad.data_ptr(),
        grad.stride(0),
        grad.stride(1),
        torch.get_num_threads(),
    )
    return grad


def _logits_family(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, row_temperature: Tensor | None
) -> tuple[int | float, ...]:
    """The arguments that every kernel of the family starts with."""
    outer, inner, vocab = logits.shape
    return (
        logits.data_ptr(),
        DTYPES[logits.dtype],
        outer,
        inner,
        logits.stride(0),
        logits.stride(1),
        vocab,
        labels.data_ptr(),
        labels.element_size(),
        address(mask),
        temperature,
        address(row_temperature),
    )
