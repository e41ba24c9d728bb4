"""linear_dpo_loss: direct preference optimisation straight from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops.linear.call import Lora, prepare
from rlhf_kernels.ops.linear.chunks import DEFAULT_WORKSPACE
from rlhf_kernels.ops.linear.logprobs import logprobs_of
from rlhf_kernels.ops.preference import checked_dpo_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_dpo_loss(
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    label: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    length_normalised: bool = False,
    bias: Tensor | None = None,
    lora: Lora | Sequence[Lora] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = torch.float32,
    workspace: int = DEFAULT_WORKSPACE,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimisation from hidden states: `dpo_loss` of the answers' summed `linear_logprobs`.

    The two sides may differ in length. A token's gradient needs the sums of its pair, so the logits are made twice.

    Args:
        chosen_hidden, rejected_hidden: [M, T, D] and [M, T', D], the policy's hidden states.
        weight, bias, lora, temperature, softcap, logit_scale, logits_dtype, workspace, process_group: the head, as in
            `linear_logprobs`.
        chosen_labels, rejected_labels: [M, T] and [M, T'], the tokens that follow.
        ref_chosen, ref_rejected: [M] float, logprob of each answer under the frozen reference, nats.
        chosen_mask, rejected_mask: true at the answer's tokens; others (the prompt) cost nothing.
        beta, label_smoothing, kind, label, reduction: as in `dpo_loss`.
        length_normalised: take means instead of sums over an answer's tokens (IPO as TRL has it, SimPO's reward).

    Returns:
        (loss, chosen_rewards, rejected_rewards), as `dpo_loss`.

    Raises:
        TypeError, ValueError, IndexError: as `linear_logprobs` and `dpo_loss`.
    """
    sums = []
    for side, hidden, labels, mask in (
        ("chosen", chosen_hidden, chosen_labels, chosen_mask),
        ("rejected", rejected_hidden, rejected_labels, rejected_mask),
    ):
        op = f"linear_dpo_loss ({side})"
        call = prepare(
            op,
            hidden,
            weight,
            labels,
            bias=bias,
            lora=lora,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=mask,
            logits_dtype=logits_dtype,
            workspace=workspace,
            process_group=process_group,
        )
        if labels.dim() != 2:
            raise ValueError(f"{op}: labels has shape {list(labels.shape)}; it takes [M, T]")
        if side == "chosen":
            kernel = dispatch.select_backend("linear_dpo_loss", call.hidden)
        logprobs, _ = logprobs_of(call, False, kernel=kernel)
        total = logprobs.sum(-1)
        if length_normalised:
            total = total / (labels.shape[1] if call.mask is None else call.mask.sum(-1).clamp(min=1))
        sums.append(total)
    return checked_dpo_loss(
        "linear_dpo_loss",
        policy_chosen=sums[0],
        policy_rejected=sums[1],
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
        kind=kind,
        label=label,
        reduction=reduction,
    )
