"""The scan family: generalised advantage estimation over padded sequences."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.reference import scan as reference

OP = "gae"
MASKED = ("skip", "stop", "zero")


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    masked: Literal["skip", "stop", "zero"] = "skip",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438), one reverse scan per sequence.

    Right to left: `delta_t = r_t + gamma * V_{t+1} - V_t`, `A_t = delta_t + gamma * lam * A_{t+1}`,
    `returns = A + V`. Not differentiable: advantages and returns are targets, their inputs are detached.

    Args:
        rewards: [..., T] float, reward of each token in reward units; not read where mask is false.
        values: [..., T] float, value of the state before each token; not read where mask is false.
        mask: [..., T] bool or 0/1, true where the token counts.
        gamma, lam: discount and trace decay, each in [0, 1].
        bootstrap: [...] float, value of the state after the last token of a sequence that was cut; 0 if None.
        masked: what a masked hole does to the scan. "skip": next value and running sum carry across (verl).
            "stop": both become 0, and `bootstrap` counts only if the last position does. "zero": the hole is a step
            with reward 0 and value 0 (OpenRLHF).

    Returns:
        (advantages, returns), each [..., T] float32 (float64 for float64 inputs), exactly 0 where mask is false.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    rewards = validate.float_tensor(OP, "rewards", rewards).detach()
    if rewards.dim() == 0:
        raise ValueError(f"{OP}: rewards is a scalar; it takes [..., T]")
    values = validate.like(OP, "values", values, "rewards", rewards).detach()
    mask = validate.bool_mask(OP, mask, "rewards", rewards.shape, rewards.device)
    validate.number(OP, "gamma", gamma, low=0, high=1)
    validate.number(OP, "lam", lam, low=0, high=1)
    validate.choice(OP, "masked", masked, MASKED)
    shape, time = rewards.shape, rewards.shape[-1]
    if bootstrap is not None:
        validate.float_tensor(OP, "bootstrap", bootstrap)
        validate.same_place(OP, "bootstrap", bootstrap, "rewards", shape[:-1], rewards.device)
        bootstrap = bootstrap.detach().reshape(-1)
    if rewards.dtype != values.dtype:
        wide = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
        rewards, values = rewards.to(wide), values.to(wide)
    batch = shape[:-1].numel()
    rewards, values = rewards.reshape(batch, time), values.reshape(batch, time)
    mask = None if mask is None else mask.reshape(batch, time)

    if dispatch.kernel(OP, rewards) is None:
        advantages, returns = reference.gae(rewards, values, mask, bootstrap, gamma, lam, masked)
    else:
        bootstrap = None if bootstrap is None else bootstrap.float()
        scalars = validate.runtime_scalar(gamma), validate.runtime_scalar(lam)
        advantages, returns = _gae(rewards, values, mask, bootstrap, *scalars, MASKED.index(masked))
    return advantages.view(shape), returns.view(shape)


@torch.library.custom_op("rlhf_kernels::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    masked: int,
) -> tuple[Tensor, Tensor]:
    """rewards, values, mask [B, T], bootstrap [B], gamma, lam [] -> advantages, returns [B, T]; `masked`: of MASKED."""
    backend = dispatch.load(dispatch.required(OP, rewards))
    return backend.gae(rewards, values, mask, bootstrap, gamma.item(), lam.item(), masked)


@_gae.register_fake
def _(rewards: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape, dtype=torch.float32), rewards.new_empty(rewards.shape, dtype=torch.float32)
