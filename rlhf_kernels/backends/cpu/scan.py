"""gae on the native module (csrc/cpu/scan.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import _native
from rlhf_kernels.backends.cpu.common import DTYPES, address, contiguous, last_contiguous


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
    rewards, values, bootstrap = last_contiguous(rewards), last_contiguous(values), contiguous(bootstrap)
    mask = None if mask is None else last_contiguous(mask)
    _native.gae(
        rewards.data_ptr(),
        values.data_ptr(),
        DTYPES[rewards.dtype],
        address(mask),
        address(bootstrap),
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
