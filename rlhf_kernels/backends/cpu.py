"""The native CPU kernels (csrc/cpu): allocates outputs and passes addresses, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Above this the C library returns memory to the system at every free, and each use faults its pages in again.
_HUGE_BYTES = 32 << 20


def describe() -> str:
    """The instruction set in use and those that this machine could run."""
    return f"{_native.isa()} of {', '.join(_native.available_isas())}"


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
    logits, labels = _last_contiguous(logits), labels.contiguous()
    mask, row_temperature = _contiguous(mask), _contiguous(row_temperature)
    bad = _native.selected_logprobs_fwd(
        *_logits_family(logits, labels, mask, temperature, row_temperature),
        logprobs.data_ptr(),
        _address(entropy if with_entropy else None),
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
    logits, labels = _last_contiguous(logits), labels.contiguous()
    mask, row_temperature = _contiguous(mask), _contiguous(row_temperature)
    grad_logprobs, grad_entropy = _contiguous(grad_logprobs), _contiguous(grad_entropy)
    grad = logits if inplace else _empty_like(logits)
    _native.selected_logprobs_bwd(
        *_logits_family(logits, labels, mask, temperature, row_temperature),
        _address(grad_logprobs),
        _address(grad_entropy),
        stats.data_ptr(),
        entropy.data_ptr(),
        grad.data_ptr(),
        grad.stride(0),
        grad.stride(1),
        torch.get_num_threads(),
    )
    return grad


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    masked: int,
) -> tuple[Tensor, Tensor]:
    """rewards, values, mask [B, T], bootstrap [B] -> advantages, returns [B, T] float32.

    masked: 0 skip, 1 stop, 2 zero.
    """
    batch, time = rewards.shape
    advantages = torch.empty((batch, time), dtype=torch.float32)
    returns = torch.empty((batch, time), dtype=torch.float32)
    rewards, values, bootstrap = _last_contiguous(rewards), _last_contiguous(values), _contiguous(bootstrap)
    mask = None if mask is None else _last_contiguous(mask)
    _native.gae(
        rewards.data_ptr(),
        values.data_ptr(),
        _DTYPES[rewards.dtype],
        _address(mask),
        _address(bootstrap),
        batch,
        time,
        rewards.stride(0),
        values.stride(0),
        0 if mask is None else mask.stride(0),
        gamma,
        lam,
        masked,
        advantages.data_ptr(),
        returns.data_ptr(),
        torch.get_num_threads(),
    )
    return advantages, returns


def _logits_family(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, row_temperature: Tensor | None
) -> tuple[int | float, ...]:
    """The arguments that every kernel of the family starts with."""
    outer, inner, vocab = logits.shape
    return (
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        outer,
        inner,
        logits.stride(0),
        logits.stride(1),
        vocab,
        labels.data_ptr(),
        labels.element_size(),
        _address(mask),
        temperature,
        _address(row_temperature),
    )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor for a kernel to fill; a large one in huge pages, which fault in four times as fast."""
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.nbytes >= _HUGE_BYTES:
        _native.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
