"""Argument checks shared by the public functions; every message names the argument, what it got and what it takes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_kernels import dispatch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTS = (torch.int64, torch.int32)


def checks_forced() -> bool:
    """RLHF_KERNELS_CHECK=1: also checks that need the values on a GPU, at the price of a sync."""
    return os.environ.get("RLHF_KERNELS_CHECK", "0") not in ("", "0")


def readable(x: Tensor) -> bool:
    """Whether x has values to look at: not on meta, and not in a trace, a fake tensor or torch.func's transforms."""
    if torch.compiler.is_compiling() or dispatch.transformed() or x.device.type == "meta":
        return False
    return type(x) is Tensor or type(x) is Parameter or not hasattr(x, "fake_mode")


def is_eager(tensors: Iterable[Tensor | None]) -> bool:
    """Whether every tensor is a plain one with memory, and no tracer or mode looks at the ops that are called."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(x is None or (type(x) in (Tensor, Parameter) and x.device.type != "meta") for x in tensors)


def float_tensor(op: str, name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; it takes a tensor")
    if type(x) is not Tensor and x.is_nested:
        raise TypeError(
            f"{op}: {name} is a nested tensor; it takes {name}.to_padded_tensor(0.0) with a mask, or packed sequences: "
            f"{name}.values(), with {name}.offsets() as cu_seqlens where the op has it"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {x.dtype}; it takes float32, float16, bfloat16 or float64")
    return x


def same_device_and_shape(
    op: str, name: str, x: Tensor, like_name: str, shape: Sequence[int], device: torch.device
) -> None:
    if x.shape != shape and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}; with this {like_name} it takes {list(shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device}, {like_name} on {device}; both must be on one device")


def float_like(op: str, name: str, x: object, like_name: str, reference: Tensor) -> Tensor:
    """A float tensor of `reference`'s shape and device."""
    tensor = float_tensor(op, name, x)
    same_device_and_shape(op, name, tensor, like_name, reference.shape, reference.device)
    return tensor


def over_tokens(op: str, name: str, x: object, like_name: str, reference: Tensor) -> Tensor:
    """A float tensor of `reference`'s shape and device, seen so where it has one value a sequence: [B] or [B, 1]."""
    tensor, shape = float_tensor(op, name, x), reference.shape
    if tensor.shape == shape and tensor.device == reference.device:
        return tensor
    if tensor.shape != shape and reference.dim() == 2 and tensor.shape in (shape[:1], (shape[0], 1)):
        tensor = tensor.view(-1, 1).expand(shape) if tensor.is_contiguous() else tensor.reshape(-1, 1).expand(shape)
    same_device_and_shape(op, name, tensor, like_name, shape, reference.device)
    return tensor


def deciding(first: Tensor, *others: Tensor | None) -> Tensor:
    """The tensor whose dtype decides which backend serves a call: one of float64, which no kernel takes, else first."""
    for x in others:
        if x is not None and x.dtype is torch.float64:
            return x
    return first


def bool_mask(op: str, mask: object, like_name: str, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """None, or a bool mask: true (1) where the position counts."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask is a {type(mask).__name__}; it takes a bool or 0/1 tensor, or None")
    if mask.is_complex():
        raise TypeError(f"{op}: mask is {mask.dtype}; it takes a bool or 0/1 tensor")
    same_device_and_shape(op, "mask", mask, like_name, shape, device)
    if mask.dtype == torch.bool:
        return mask
    if not is_unread_mask(mask):
        odd = (mask != 0) & (mask != 1)
        if bool(odd.any()):
            raise ValueError(f"{op}: mask holds {mask[odd][0].item():g}; it takes a bool tensor, or 0 and 1 alone")
    return mask != 0


def is_unread_mask(mask: object) -> TypeGuard[Tensor]:
    """Whether it is of numbers that `bool_mask` could not look at: on a GPU, or in a trace."""
    if not isinstance(mask, Tensor) or mask.dtype == torch.bool:
        return False
    return not (readable(mask) and (mask.device.type == "cpu" or checks_forced()))


def poisoned(mask: object, x: Tensor) -> Tensor:
    """x with NaN where a mask that `bool_mask` could not look at holds neither 0 nor 1."""
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool):  # soon said
        return x
    if not is_unread_mask(mask) or mask.shape != x.shape:
        return x
    return torch.where((mask != 0) & (mask != 1), float("nan"), x)


def required_mask(op: str, mask: object, like_name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    checked = bool_mask(op, mask, like_name, shape, device)
    if checked is None:
        raise TypeError(f"{op}: mask is None; it takes a bool or 0/1 tensor of shape {list(shape)}")
    return checked


def number(
    op: str,
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float | None = None,
    infinite: bool = False,
) -> Any:
    """The value: a finite real number (or inf, if `infinite`) inside [low, high], or strictly greater than `above`.

    A 0-d tensor is read, on a GPU with a sync; in a trace it stays a tensor, and is not looked at.
    """
    kind = type(value)
    plain = kind is float or kind is int  # Real's own test is slow
    if not plain and isinstance(value, Tensor):
        value = _scalar_of(op, name, value)
        if isinstance(value, Tensor):
            return value
        kind, plain = float, True
    # While tracing a number may be symbolic, its type is not known.
    if not (plain or torch.compiler.is_compiling()) and (kind is bool or not isinstance(value, Real)):
        raise TypeError(f"{op}: {name} is a {kind.__name__}; it takes a number or a 0-d tensor")
    if infinite and value == math.inf and high == math.inf:
        return value
    if above is not None and not (value > above and value < math.inf):
        raise ValueError(f"{op}: {name} is {value}; it takes a finite number > {above}")
    if not low <= value <= high or value in (math.inf, -math.inf):
        raise ValueError(f"{op}: {name} is {value}; it takes a finite number in [{low}, {high}]")
    return value


def _scalar_of(op: str, name: str, value: Tensor) -> float | Tensor:
    if value.dim() or value.dtype == torch.bool or value.is_complex():
        shape = list(value.shape)
        raise ValueError(f"{op}: {name} is a tensor {shape} of {value.dtype}; it takes a number or a 0-d tensor")
    if value.requires_grad:
        raise ValueError(f"{op}: {name} requires grad; it is not differentiable, pass {name}.detach()")
    return float(value.item()) if readable(value) else value.detach().to("cpu", torch.float64)


def number_or_like(
    op: str,
    name: str,
    value: object,
    like_name: str,
    reference: Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> None:
    """None, a finite number, or a float tensor that is a scalar or of `reference`'s shape (values read on CPU only)."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        number(op, name, value, low=low, high=high)
        return
    float_tensor(op, name, value)
    if value.dim():
        same_device_and_shape(op, name, value, like_name, reference.shape, reference.device)
    bounded = low > -math.inf or high < math.inf
    if (
        bounded
        and value.device.type == "cpu"
        and readable(value)
        and not bool(((value >= low) & (value <= high)).all())
    ):
        raise ValueError(f"{op}: {name} holds a value outside [{low}, {high}]")


def runtime_scalar(value: float) -> Tensor:
    """`value` for a registered op: 0-d float64 on the CPU, where reading it is no sync.

    A float argument would be a constant of the trace, and each new temperature would compile again; the product of a
    tensor and a number stays an input.
    """
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def offsets(op: str, name: str, x: object, like_name: str, device: torch.device) -> Tensor:
    """An int32 or int64 vector on `device` with at least one element; its values are `offset_values`' business."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; it takes an int32 or int64 tensor [S + 1], or None")
    if x.dtype not in INTS:
        raise TypeError(f"{op}: {name} is {x.dtype}; it takes int32 or int64")
    if x.dim() != 1 or x.shape[0] == 0:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}; it takes [S + 1]")
    same_device_and_shape(op, name, x, like_name, x.shape, device)
    return x


def offset_values(op: str, name: str, x: Tensor, total: int) -> None:
    """Raise ValueError at the first offset that is not 0, falls, or is not `total` at the end (reads values)."""
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[1:] = (x[1:] < x[:-1]) | (x[1:] > total)
    bad[0] |= x[0] != 0
    bad[-1] |= x[-1] != total
    if bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: {name} holds {int(x[place])} at {place}; it takes offsets that start at 0, never fall and end at "
            f"{total}"
        )


def choice(op: str, name: str, value: object, options: Sequence[object]) -> None:
    if value not in options:
        raise ValueError(f"{op}: {name} is {value!r}; it takes {', '.join(map(repr, options))}")


def label_in_range(op: str, labels: Tensor, mask: Tensor | None, vocab: int) -> None:
    """Raise IndexError for the first counted label outside [0, vocab), naming its row and value (reads values)."""
    bad = (labels < 0) | (labels >= vocab)
    if mask is not None:
        bad = bad & mask
    if bool(bad.any()):
        row = int(bad.reshape(-1).nonzero()[0])
        bad_label(op, row, int(labels.reshape(-1)[row]), vocab)


def bad_label(op: str, row: int, label: int, vocab: int) -> None:
    raise IndexError(
        f"{op}: label {label} at row {row} is outside [0, {vocab}); leave rows without a label out: "
        f"mask=labels != {label}"
    )
