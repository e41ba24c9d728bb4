"""The scan family: generalised advantage estimation, padded or packed, and PPO's advantages of a rollout."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.reference import scan as reference

OP = "gae"
PACKED = "gae_packed"  # its kernels' name in dispatch: a backend may have the one without the other
PPO = "ppo_advantages"
Masked = Literal["skip", "stop", "zero"]
MASKED = ("skip", "stop", "zero")
WHITEN_EPS = 1e-8  # whiten's default


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    masked: Masked = "skip",
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
            sequences are legal. Offsets that are wrong raise on a CPU; a GPU's kernels do not look at them: nothing
            outside the tensors is touched, what no sequence covers is NaN, what one does may be any sequence's value
            or NaN, and RLHF_KERNELS_CHECK=1 makes them raise.

    Returns:
        (advantages, returns), each [..., T] float32 (float64 for float64 inputs), exactly 0 where mask is false.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; offsets that do not start at 0, fall, or do not
            end at total.
    """
    rewards = validate.float_tensor(OP, "rewards", rewards).detach()
    if rewards.dim() == 0:
        raise ValueError(f"{OP}: rewards is a scalar; it takes [..., T]")
    values = validate.float_like(OP, "values", values, "rewards", rewards).detach()
    rewards = validate.poisoned(mask, rewards)
    mask = validate.bool_mask(OP, mask, "rewards", rewards.shape, rewards.device)
    gamma = validate.number(OP, "gamma", gamma, low=0, high=1)
    lam = validate.number(OP, "lam", lam, low=0, high=1)
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
        validate.same_device_and_shape(OP, "bootstrap", bootstrap, like_name, sequences, rewards.device)
        bootstrap = bootstrap.detach().reshape(-1)
    if rewards.dtype != values.dtype:
        wide = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
        rewards, values = rewards.to(wide), values.to(wide)
    if cu_seqlens is None:
        batch = math.prod(sequences)
        rewards, values = rewards.reshape(batch, time), values.reshape(batch, time)
        mask = None if mask is None else mask.reshape(batch, time)

    kernel = dispatch.select_backend(OP if cu_seqlens is None else PACKED, rewards)
    if kernel is None and not _is_traced(rewards):
        advantages, returns = _plain(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, masked)
    else:
        if kernel is not None and bootstrap is not None:
            bootstrap = bootstrap.float()
        scalars = validate.runtime_scalar(gamma), validate.runtime_scalar(lam)
        advantages, returns = _gae(
            rewards, values, mask, bootstrap, cu_seqlens, *scalars, MASKED.index(masked), kernel is None
        )
    return advantages.view(shape), returns.view(shape)


def _is_traced(x: Tensor) -> bool:
    """Whether only shapes are wanted: the reference, which loops over T, then stands behind a registered op."""
    return torch.compiler.is_compiling() or not (validate.readable(x) or dispatch.transformed())


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
        backend = dispatch.backend_module(dispatch.require_backend(OP, rewards))
        return backend.gae(rewards, values, mask, bootstrap, *scalars, masked)
    name = dispatch.require_backend(PACKED, rewards)
    if name != "cpu":  # the native module looks for itself
        _check_offsets(cu_seqlens, rewards)
    return dispatch.backend_module(name).gae_packed(rewards, values, mask, bootstrap, cu_seqlens, *scalars, masked)


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
    # On a GPU too: it reads the longest length anyway, and its indices would be out of range.
    validate.offset_values(OP, "cu_seqlens", cu_seqlens, rewards.shape[0])
    return reference.gae_packed(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, masked)


def _check_offsets(cu_seqlens: Tensor, rewards: Tensor) -> None:
    if rewards.device.type == "cpu" or validate.checks_forced():
        validate.offset_values(OP, "cu_seqlens", cu_seqlens, rewards.shape[0])


def ppo_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """What PPO on language models needs of a rollout, in one sweep and one more to whiten (arXiv:1909.08593).

    Equals `kl = per_token_kl(logprobs, ref_logprobs)`, 0 where masked; `rewards = shaped_rewards(scores, kl, mask,
    kl_coef=kl_coef)`; `advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)`; then
    `whiten(advantages, mask)`. Not differentiable: all results are targets, the inputs are detached.

    Args:
        logprobs, ref_logprobs: [B, T] float, nats, of the sampled tokens under the policy and the reference.
        scores: [B] float, reward of each sequence, given to its last counted token; not used if there is none.
        values: [B, T] float, value of the state before each token, reward units.
        mask: [B, T] bool or 0/1, true where the token counts; nothing is read elsewhere, and holes are skipped.
        kl_coef: weight of the KL penalty (beta), >= 0, reward units per nat.
        gamma, lam: discount and trace decay, each in [0, 1].
        whiten: scale the advantages to mean 0 and variance 1 over all counted tokens; the returns stay as they are.

    Returns:
        (advantages, returns, kl), each [B, T] float32 (float64 if any input is), exactly 0 where mask is false.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    validate.float_tensor(PPO, "logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"{PPO}: logprobs has shape {list(logprobs.shape)}; it takes [B, T]")
    validate.float_like(PPO, "ref_logprobs", ref_logprobs, "logprobs", logprobs)
    validate.float_like(PPO, "values", values, "logprobs", logprobs)
    validate.float_tensor(PPO, "scores", scores)
    validate.same_device_and_shape(PPO, "scores", scores, "logprobs", logprobs.shape[:1], logprobs.device)
    ref_logprobs = validate.poisoned(mask, ref_logprobs)
    mask = validate.required_mask(PPO, mask, "logprobs", logprobs.shape, logprobs.device)
    kl_coef = validate.number(PPO, "kl_coef", kl_coef, low=0)
    gamma = validate.number(PPO, "gamma", gamma, low=0, high=1)
    lam = validate.number(PPO, "lam", lam, low=0, high=1)
    eps = WHITEN_EPS if whiten else None
    dtype = logprobs.dtype if logprobs.dtype == ref_logprobs.dtype == values.dtype else torch.float32
    if torch.float64 in (logprobs.dtype, ref_logprobs.dtype, scores.dtype, values.dtype):
        dtype = torch.float64
    logprobs, ref_logprobs, values = (x.detach().to(dtype) for x in (logprobs, ref_logprobs, values))
    scores = scores.detach().to(dtype if dtype == torch.float64 else torch.float32)
    tensors = logprobs, ref_logprobs, scores, values
    kernel = dispatch.select_backend(PPO, logprobs)
    if kernel is None and not _is_traced(logprobs):
        return reference.ppo_advantages(*tensors, mask, kl_coef, gamma, lam, eps)
    scalars = (validate.runtime_scalar(x) for x in (kl_coef, gamma, lam))
    return _ppo_advantages(*tensors, mask, *scalars, eps, kernel is None)


@torch.library.custom_op("rlhf_kernels::ppo_advantages", mutates_args=())
def _ppo_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: Tensor,
    gamma: Tensor,
    lam: Tensor,
    eps: float | None,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, ref_logprobs, values of one dtype and mask [B, T], scores [B] -> advantages, returns, kl [B, T].

    kl_coef, gamma, lam: []. `plain`: the reference, which a trace would unroll over T.
    """
    arguments = (logprobs, ref_logprobs, scores, values, mask, kl_coef.item(), gamma.item(), lam.item(), eps)
    if plain:
        return reference.ppo_advantages(*arguments)
    return dispatch.backend_module(dispatch.require_backend(PPO, logprobs)).ppo_advantages(*arguments)


@_ppo_advantages.register_fake
def _(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    result = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    advantages, returns, kl = (logprobs.new_empty(logprobs.shape, dtype=result) for _ in range(3))
    return advantages, returns, kl
