"""Logprob, entropy and value of each token of a policy's responses, in one forward pass."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf_kernels import linear_kl, linear_logprobs
from rlhf_trainer.models.forward import head_inputs
from rlhf_trainer.models.sharding import fsdp_forward, is_sharded
from rlhf_trainer.sampling.rollout import Rollout


class ValueHead(Protocol):
    """Gives a value to the state before each token; PPO's is `onpolicy.value_head.ValueHead`."""

    def values(self, policy: PreTrainedModel, hidden: Tensor, ids: Tensor, mask: Tensor, start: int) -> Tensor:
        """[b, R] values of the states before the tokens ids[:, start:]; hidden [b, R, D] are the policy's own there."""
        ...


@fsdp_forward
def token_outputs(
    policy: PreTrainedModel,
    value_head: ValueHead | None,
    rollout: Rollout,
    rows: Tensor,
    temperature: float,
    *,
    entropy_bonus: bool = False,
    keep: list[dict[str, Any]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs, entropies and values [b, R] of the responses in `rows`, 0 at padding.

    The logprob and the value of a token read the hidden state before it; logits are never in memory. Padding is cut to
    what these rows need, and only counted positions reach the lm_head: the same rows always have the same shapes, and
    so give the same bits. Entropies have a gradient only for an entropy bonus: without it a frozen head saves one GEMM.
    keep: gets what the linear family was called with, for `exact_kl`.
    """
    start, length = rollout.prompt_length, rollout.response_mask.shape[1]
    width = int(rollout.response_mask[rows].sum(-1).max())
    skip = start - int(rollout.mask[rows, :start].sum(-1).max())
    ids, mask = rollout.ids[rows, skip : start + width], rollout.mask[rows, skip : start + width]
    start -= skip
    counted = mask[:, start:]
    inputs = head_inputs(policy, ids, mask, start)
    if keep is not None:
        keep.append({**(_copied(inputs) if is_sharded(policy) else inputs), "mask": counted})
    with_entropy: Literal[True, "detached"] = True if entropy_bonus else "detached"
    logprobs, entropy = linear_logprobs(**inputs, mask=counted, temperature=temperature, with_entropy=with_entropy)
    values = torch.zeros_like(logprobs)
    if value_head is not None:
        values = torch.where(counted, value_head.values(policy, inputs["hidden"], ids, mask, start), 0.0)
    logprobs, entropy, values = (pad(x, (0, length - width)) for x in (logprobs, entropy, values))
    return logprobs, entropy, values


def _copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """With copies of the head: FSDP 2 frees what it has gathered when the forward ends."""
    lora = None if inputs["lora"] is None else [(a.clone(), b.clone(), scale) for a, b, scale in inputs["lora"]]
    bias = None if inputs["bias"] is None else inputs["bias"].clone()
    return {**inputs, "weight": inputs["weight"].clone(), "bias": bias, "lora": lora}


def exact_kl(policy: dict[str, Any], reference: dict[str, Any], temperature: float, sampled: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary at each state of the responses [b, R], nats, 0 at padding.

    Summed over a response it has the mean of the sampled log-ratios, a fraction of their spread, and is never negative.

    Args:
        policy, reference: what `token_outputs` kept of the same rows.
        sampled: [b, R] log-ratios of the sampled tokens; they are returned where the two models' logits differ in
            softcap or scale, which `linear_kl` cannot compare.
    """
    same = {name: policy[name] for name in ("softcap", "logit_scale")}
    if any(reference[name] != value for name, value in same.items()):
        return sampled
    found = linear_kl(
        policy["hidden"],
        policy["weight"],
        reference["hidden"],
        reference["weight"],
        bias=policy["bias"],
        ref_bias=reference["bias"],
        lora=policy["lora"],
        ref_lora=reference["lora"],
        temperature=temperature,
        mask=policy["mask"],
        **same,
    )
    return pad(found, (0, sampled.shape[1] - found.shape[1]))
