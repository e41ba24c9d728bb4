"""gae on the CUDA module (csrc/cuda/scan.cuh): one block a sequence, padded or packed."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _cuda

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    masked: int,
) -> tuple[Tensor, Tensor]:
    """rewards, values [B, T], mask [B, T] bool, bootstrap [B] fp32 -> advantages, returns [B, T] fp32.

    Rows may be strided; a last dimension that is not contiguous is copied once. masked: 0 skip, 1 stop, 2 zero.
    """
    batch, time = rewards.shape
    rewards, values = _last_contiguous(rewards), _last_contiguous(values)
    mask = None if mask is None else _last_contiguous(mask)
    strides = rewards.stride(0), values.stride(0), 0 if mask is None else mask.stride(0)
    return _launch(rewards, values, mask, bootstrap, None, batch, time, strides, gamma, lam, masked)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    masked: int,
) -> tuple[Tensor, Tensor]:
    """rewards, values, mask [total], bootstrap [S] fp32, cu_seqlens [S + 1] -> advantages, returns [total] fp32.

    Offsets are clamped to [0, total]; what wrong ones leave out at either end is NaN.
    """
    total, sequences = rewards.shape[0], cu_seqlens.shape[0] - 1
    if sequences == 0:
        missing = rewards.new_full((total,), float("nan"), dtype=torch.float32)
        return missing, missing.clone()
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    mask = None if mask is None else mask.contiguous()
    return _launch(rewards, values, mask, bootstrap, cu_seqlens, sequences, total, (0, 0, 0), gamma, lam, masked)


def _launch(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    offsets: Tensor | None,
    rows: int,
    time: int,
    strides: tuple[int, int, int],
    gamma: float,
    lam: float,
    masked: int,
) -> tuple[Tensor, Tensor]:
    if rewards.device.type != "cuda":
        raise RuntimeError(f"the cuda backend got tensors on {rewards.device}: move them to a GPU")
    bootstrap = None if bootstrap is None else bootstrap.contiguous()
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    with torch.cuda.device_of(rewards):
        _cuda.gae(
            rewards.data_ptr(),
            values.data_ptr(),
            _DTYPES[rewards.dtype],
            _address(mask),
            _address(bootstrap),
            _address(offsets),
            0 if offsets is None else offsets.element_size(),
            rows,
            time,
            *strides,
            gamma,
            lam,
            masked,
            advantages.data_ptr(),
            returns.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return advantages, returns


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
