"""The preference family: losses over pairs of a preferred and a rejected answer, advantages within groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.reference import preference as reference


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    label: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Bradley-Terry loss of a reward model (Ouyang et al. 2022, arXiv:2203.02155; margin: arXiv:2307.09288).

    Equals `-logsigmoid(d - margin).mean()` with `d = chosen - rejected`; with `label=q`:
    `-q * logsigmoid(d - margin) - (1 - q) * logsigmoid(-d - margin)`, so that a tie (q = 0.5) is at its minimum where
    both rewards are equal, whatever the margin.

    Args:
        chosen, rejected: [M] float, rewards of the two answers of each pair.
        margin: by how much the better answer's reward shall win, in reward units; a number or [M].
        label: probability that `chosen` is truly the better one, in [0, 1]; a number or [M]. 0.5 is a tie.
        reduction: "mean" over the pairs (0 if there are none) or "none".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [M] for reduction="none". Gradient in the inputs' dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    op = "pairwise_loss"
    validate.float_tensor(op, "chosen", chosen)
    validate.float_like(op, "rejected", rejected, "chosen", chosen)
    validate.choice(op, "reduction", reduction, ("mean", "none"))
    validate.number_or_like(op, "margin", margin, "chosen", chosen)
    validate.number_or_like(op, "label", label, "chosen", chosen, low=0.0, high=1.0)
    dispatch.select_backend(op, chosen)
    return reference.pairwise_loss(chosen, rejected, margin, label, reduction)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    label: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimisation over pairs of sequence logprobs.

    With `h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)`, the mean over pairs of

    - "sigmoid": `-(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)`
      (Rafailov et al. 2023, arXiv:2305.18290; smoothing: cDPO, Mitchell 2023).
    - "ipo": `(h - 1 / (2 * beta)) ** 2` (Azar et al. 2023, arXiv:2310.12036; pass logprobs per token, as TRL does, if
      the loss shall not depend on length).

    With `label=q` a pair's loss is q times that of h and 1 - q times that of -h, as if it stood there both ways round.

    Args:
        policy_chosen, policy_rejected: [M] float, logprob of each answer under the policy, nats; differentiable.
        ref_chosen, ref_rejected: [M] float, the same under the frozen reference; constants.
        beta: > 0, strength of the pull towards the reference.
        label_smoothing: probability in [0, 0.5] that a pair's label is wrong; "sigmoid" only.
        kind: "sigmoid" or "ipo".
        label: probability that `chosen` is truly the better one, in [0, 1]; a number or [M]. 0.5 is a tie.
        reduction: "mean" over the pairs (0 if there are none) or "none".

    Returns:
        (loss, chosen_rewards, rejected_rewards): a scalar, or [M] for reduction="none", and `beta * (policy - ref)` of
        each answer [M], detached; float32 (float64 for float64 inputs). Gradients in the inputs' dtypes.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; label smoothing with "ipo".
    """
    op = "dpo_loss"
    validate.float_tensor(op, "policy_chosen", policy_chosen)
    dispatch.select_backend(op, policy_chosen)
    return checked_dpo_loss(
        op,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
        kind=kind,
        label=label,
        reduction=reduction,
    )


def checked_dpo_loss(
    op: str,
    *,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float,
    kind: str,
    label: float | Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dpo_loss with errors that name `op`."""
    validate.float_tensor(op, "policy_chosen", policy_chosen)
    for name, x in (("policy_rejected", policy_rejected), ("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        validate.float_like(op, name, x, "policy_chosen", policy_chosen)
    if policy_chosen.dim() != 1:
        raise ValueError(
            f"{op}: policy_chosen has shape {list(policy_chosen.shape)}; it takes [M], a logprob per answer"
        )
    beta = validate.number(op, "beta", beta, above=0)
    label_smoothing = validate.number(op, "label_smoothing", label_smoothing, low=0, high=0.5)
    validate.choice(op, "kind", kind, ("sigmoid", "ipo"))
    if kind == "ipo" and label_smoothing != 0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; with kind='ipo' it must be 0")
    validate.number_or_like(op, "label", label, "policy_chosen", policy_chosen, low=0.0, high=1.0)
    validate.choice(op, "reduction", reduction, ("mean", "none"))
    return reference.dpo_loss(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
        kind=kind,
        label=label,
        reduction=reduction,
    )


def group_advantages(
    scores: Tensor,
    groups: Tensor | int,
    *,
    kind: Literal["grpo", "rloo", "mean"] = "grpo",
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each answer over the other answers to the same prompt.

    Over each group of n answers with mean m and sample standard deviation `d` (n - 1 in the denominator):
    "grpo" `(s - m) / (d + eps)` (Shao et al. 2024, arXiv:2402.03300), "rloo" `s -` the mean of the other n - 1
    (Ahmadian et al. 2024, arXiv:2402.14740), "mean" `s - m` (Liu et al. 2025, arXiv:2503.20783).
    A group of one gives 0. Not differentiable: advantages are targets. Sums are taken in float64, centred first.

    Args:
        scores: [B] float, reward of each answer in reward units.
        groups: [B] int64 or int32, the group of each answer, any numbers in any order, groups of any sizes; or one int,
            the size of groups that lie one after the other, which must divide B.
        kind: "grpo", "rloo" or "mean".
        eps: >= 0, added to the standard deviation; "grpo" only.

    Returns:
        [B] float32 (float64 for float64 scores). A NaN or infinite score makes its own group NaN. A group's result
        depends on its own scores alone, in their order, to the bit.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; a group size that does not divide B.
    """
    op = "group_advantages"
    validate.float_tensor(op, "scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"{op}: scores has shape {list(scores.shape)}; it takes [B]")
    validate.choice(op, "kind", kind, ("grpo", "rloo", "mean"))
    eps = validate.number(op, "eps", eps, low=0)
    if isinstance(groups, Tensor):
        if groups.dtype not in validate.INTS:
            raise TypeError(f"{op}: groups is {groups.dtype}; it takes an int64 or int32 tensor, or one int")
        validate.same_device_and_shape(op, "groups", groups, "scores", scores.shape, scores.device)
    else:
        _check_group_size(op, groups, scores.shape[0])
    dispatch.select_backend(op, scores)
    ids, size = (groups, 0) if isinstance(groups, Tensor) else (None, groups)
    return reference.group_advantages(scores.detach(), ids, size, kind, eps)


def _check_group_size(op: str, size: int, batch: int) -> None:
    if not torch.compiler.is_compiling() and (isinstance(size, bool) or not isinstance(size, int)):
        raise TypeError(f"{op}: groups is a {type(size).__name__}; it takes an int64 or int32 tensor, or one int")
    if size < 1 or batch % size:
        raise ValueError(f"{op}: groups is {size}; with {batch} scores it takes a size >= 1 that divides {batch}")
