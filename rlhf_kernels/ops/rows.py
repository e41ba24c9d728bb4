"""Shared by the ops over rows of logits [..., V]: the checks of a row and its temperature, and rows as the kernels see
them."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops import validate


def check_logits(op: str, name: str, logits: object) -> tuple[torch.Size, int]:
    """Leading shape and V of float logits [..., V]."""
    x = validate.float_tensor(op, name, logits)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}; it takes [..., V] with V >= 1")
    return x.shape[:-1], x.shape[-1]


def row_temperature(
    op: str, temperature: float | Tensor, logits: Tensor, shape: torch.Size, mask: Tensor | None, given: object
) -> Tensor | None:
    """None for a number > 0, which is checked; a tensor as one temperature per row, in the dtype of the arithmetic.

    mask, given: checked, and as the caller gave it. At masked rows, where a caller may have anything, it is 1; where a
    mask that could not be looked at is neither 0 nor 1, it is NaN. The tensor's values are checked apart, by
    `positive`, and only where reading them is free.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        temperature = validate.number(op, "temperature", temperature, above=0)
        if not validate.is_unread_mask(given):
            return None
        return temperature * validate.poisoned(given, torch.ones(shape, dtype=wide, device=logits.device))
    validate.float_tensor(op, "temperature", temperature)
    if temperature.requires_grad:
        raise ValueError(f"{op}: temperature requires grad; it is not differentiable, pass temperature.detach()")
    try:
        rows = temperature.to(logits.device).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: temperature has shape {list(temperature.shape)}; it must broadcast over the rows {list(shape)}"
        ) from None
    rows = validate.poisoned(given, rows.to(wide))
    return rows if mask is None else torch.where(mask, rows, 1.0)


def reading_is_free(x: Tensor) -> bool:
    """Values are looked at only in eager mode, on the CPU or where RLHF_KERNELS_CHECK asks for it."""
    return validate.readable(x) and (x.device.type == "cpu" or validate.checks_forced())


def positive(op: str, temperature: Tensor | None) -> None:
    """Raise ValueError unless every temperature is > 0 (reads values)."""
    if temperature is not None and not bool((temperature > 0).all()):
        raise ValueError(f"{op}: temperature holds a value that is not > 0")


def scalar(temperature: float | Tensor) -> Tensor:
    """The temperature of every row for a registered op; 1, and not read, where each row has its own."""
    return validate.runtime_scalar(1.0 if isinstance(temperature, Tensor) else temperature)


def as_rows(logits: Tensor) -> Tensor:
    """[..., V] as [O, I, V], which keeps the strides of the last two leading dimensions without a copy."""
    return logits.flatten(0, -3) if logits.dim() >= 3 else logits[(None,) * (3 - logits.dim())]


def flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)
