"""The scan family: generalised advantage estimation over padded or packed sequences."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.reference import scan as reference

OP = "gae"
PACKED = "gae_packed"  # its kernels' name in dispatch: a backend may have the one without the other
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
    cu_seqlens: Tensor | None = None,
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
        cu_seqlens: [S + 1] int32 or int64: rewards, values and mask are S packed sequences [total], bootstrap is [S],
            and sequence s is positions `cu_seqlens[s]` up to `cu_seqlens[s + 1]`, as flash-attn spells them; empty
            sequences are legal. Offsets that are wrong raise on a CPU; on a GPU they are not looked at, nothing
            outside the tensors is touched, the results mean nothing, and RLHF_KERNELS_CHECK=1 makes them raise.

    Returns:
        (advantages, returns), each [..., T] float32 (float64 for float64 inputs), exactly 0 where mask is false.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; offsets that do not start at 0, fall, or do not
            end at total.
    """
    rewards = validate.float_tensor(OP, "rewards", rewards).detach()
    if rewards.dim() == 0:
        raise ValueError(f"{OP}: rewards is a scalar; it takes [..., T]")
    values = validate.like(OP, "values", values, "rewards", rewards).detach()
    mask = validate.bool_mask(OP, mask, "rewards", rewards.shape, rewards.device)
    validate.number(OP, "gamma", gamma, low=0, high=1)
    validate.number(OP, "lam", lam, low=0, high=1)
    validate.choice(OP, "masked", masked, MASKED)
    shape, time, sequences = rewards.shape, rewards.shape[-1], rewards.shape[:-1]
    if cu_seqlens is not None:
        if rewards.dim() != 1:
            raise ValueError(f"{OP}: rewards has shape {list(shape)}; with cu_seqlens it takes [total]")
        cu_seqlens = validate.offsets(OP, "cu_seqlens", cu_seqlens, "rewards", rewards.device)
        sequences = torch.Size([cu_seqlens.shape[0] - 1])
    if bootstrap is not None:
        validate.float_tensor(OP, "bootstrap", bootstrap)
        like_name = "rewards" if cu_seqlens is None else "cu_seqlens"
        validate.same_place(OP, "bootstrap", bootstrap, like_name, sequences, rewards.device)
        bootstrap = bootstrap.detach().reshape(-1)
    if rewards.dtype != values.dtype:
        wide = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
        rewards, values = rewards.to(wide), values.to(wide)
    if cu_seqlens is None:
        batch = sequences.numel()
        rewards, values = rewards.reshape(batch, time), values.reshape(batch, time)
        mask = None if mask is None else mask.reshape(batch, time)

    kernel = dispatch.kernel(OP if cu_seqlens is None else PACKED, rewards)
    if kernel is None and not torch.compiler.is_compiling():
        advantages, returns = _plain(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, masked)
    else:
        if kernel is not None and bootstrap is not None:
            bootstrap = bootstrap.float()
        scalars = validate.runtime_scalar(gamma), validate.runtime_scalar(lam)
        advantages, returns = _gae(
            rewards, values, mask, bootstrap, cu_seqlens, *scalars, MASKED.index(masked), kernel is None
        )
    return advantages.view(shape), returns.view(shape)


@torch.library.custom_op("rlhf_kernels::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    masked: int,
    plain: bool,
) -> tuple[Tensor, Tensor]:
    """rewards, values, mask [B, T] and bootstrap [B], or [total] and [S] with cu_seqlens -> advantages, returns.

    gamma, lam: []; `masked`: of MASKED. `plain`: the reference, which a trace would unroll over T.
    """
    scalars = gamma.item(), lam.item()
    if plain:
        return _plain(rewards, values, mask, bootstrap, cu_seqlens, *scalars, MASKED[masked])
    if cu_seqlens is None:
        backend = dispatch.load(dispatch.required(OP, rewards))
        return backend.gae(rewards, values, mask, bootstrap, *scalars, masked)
    name = dispatch.required(PACKED, rewards)
    if name != "cpu":  # the native module looks for itself
        _check_offsets(cu_seqlens, rewards)
    return dispatch.load(name).gae_packed(rewards, values, mask, bootstrap, cu_seqlens, *scalars, masked)


@_gae.register_fake
def _(rewards: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    result = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return rewards.new_empty(rewards.shape, dtype=result), rewards.new_empty(rewards.shape, dtype=result)


def _plain(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    masked: str,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return reference.gae(rewards, values, mask, bootstrap, gamma, lam, masked)
    _check_offsets(cu_seqlens, rewards)
    return reference.gae_packed(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, masked)


def _check_offsets(cu_seqlens: Tensor, rewards: Tensor) -> None:
    if rewards.device.type == "cpu" or validate.checks_forced():
        validate.offset_values(OP, "cu_seqlens", cu_seqlens, rewards.shape[0])
