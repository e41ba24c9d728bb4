"""Helpers of the reference ops: the compute dtype, sums over a row, and selection by a mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

EXPONENT_LIMIT = 20.0  # exponents are clamped to +-20 before exp: exp(20) is 4.9e8, far from fp32's overflow


def upcast(x: Tensor) -> Tensor:
    """fp32 for 16- and 32-bit floats, float64 unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def autocast_enabled(device: torch.device) -> bool:
    """Under autocast there; a device that knows none (meta) never is."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def saturating_cast(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad` rounded to `dtype`; a finite one beyond its range becomes its largest number.

    What was infinite stays so: a loss scaler looks for it.
    """
    if grad.dtype == dtype:
        return grad
    largest = torch.finfo(dtype).max
    return torch.where(grad.isfinite(), grad.clamp(-largest, largest), grad).to(dtype)


class _SaturatingUpcast(torch.autograd.Function):
    """16 bits to fp32; a finite gradient beyond what the 16 bits can say comes back as their largest number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return saturating_cast(grad, ctx.dtype)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.float()


def saturating_upcast(x: Tensor) -> Tensor:
    """As `upcast`, for functions whose slope may exceed fp16: no finite gradient becomes inf on its way back."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return _SaturatingUpcast.apply(x) if x.requires_grad else x.float()


def clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """`x` within [low, high]; its gradient is 1 from bound to bound, the bounds included, and 0 beyond and at NaN.

    torch.clamp has that gradient up to torch 2.13, and 0 on a bound from 2.14 on. A trace keeps the bounds as inputs:
    as plain numbers each new value would recompile.
    """
    if torch.compiler.is_compiling():
        one = x.new_ones(())
        low, high = one * low, one * high
    outside = torch.where(x < low, low, torch.where(x > high, high, x.detach()))  # the last is NaN
    return torch.where((x >= low) & (x <= high), x, outside)


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension by halving.

    torch.sum may split one long row over threads but not many rows, so its bits depend on the batch; elementwise adds
    in a fixed tree do not.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        low, high, rest = x.split([half, half, x.shape[-1] % 2], dim=-1)
        x = torch.cat([low + high, rest], dim=-1)
    return x.squeeze(-1)


def spread(x: Tensor, size: int) -> Tensor:
    """[...] -> [..., size], each element `size` times, by doubling: so that its gradient's sum is as row_sum's."""
    x = x.unsqueeze(-1)
    while x.shape[-1] < size:
        x = torch.cat([x, x[..., : size - x.shape[-1]]], dim=-1)
    return x


def select(mask: Tensor | None, x: Tensor, other: float = 0.0) -> Tensor:
    """`x` where counted, `other` elsewhere. Selects, never multiplies: NaN at a masked place stays out."""
    return x if mask is None else torch.where(mask, x, other)


def count(mask: Tensor | None, like: Tensor) -> Tensor:
    """Number of counted elements, a 0-d tensor in `like`'s dtype."""
    if mask is None:
        return torch.full((), like.numel(), dtype=like.dtype, device=like.device)
    return mask.sum().to(like.dtype)


def masked_mean(mask: Tensor | None, x: Tensor) -> Tensor:
    """Mean over the counted elements, 0 where there are none."""
    return select(mask, x).sum() / count(mask, x).clamp(min=1)


# exp(u) - 1 - u = u^2 (1/2! + u/3! + u^2/4! + ...): 15 terms reach float64 at |u| <= 0.5.
_K3_SERIES = [1.0 / math.factorial(k) for k in range(2, 17)]


def exp_minus_one_minus(u: Tensor) -> Tensor:
    """exp(u) - 1 - u without cancellation near 0; the exponent (not the linear term) is clamped to +-20."""
    small = u.abs() <= 0.5
    near = torch.where(small, u, 0.0)
    series = torch.full_like(u, _K3_SERIES[-1])
    for coefficient in reversed(_K3_SERIES[:-1]):
        series = series * near + coefficient
    far = torch.expm1(clamp(u, -EXPONENT_LIMIT, EXPONENT_LIMIT)) - u
    return torch.where(small, near * near * series, far)
