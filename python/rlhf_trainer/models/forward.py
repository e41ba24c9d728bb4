"""What one forward pass of a language model yields: hidden states, and what the linear family makes logprobs of."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_kernels import head_of
from rlhf_trainer.models import seq2seq


def position_ids(mask: Tensor) -> Tensor:
    """Positions counted over real tokens [B, L], so that left padding does not shift them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def decoder_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """What the forward of a decoder, or of its backbone, takes for ids, mask [B, L]."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = position_ids(mask)
    return inputs


def hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """ids, mask [B, L] -> last hidden states [B, L, D] of a causal LM's or classifier's backbone."""
    backbone = model.base_model
    return backbone(**decoder_inputs(backbone, ids, mask)).last_hidden_state


def head_inputs(model: PreTrainedModel, ids: Tensor, mask: Tensor, start: int) -> dict[str, Any]:
    """The arguments of the linear family for the tokens ids[:, start:]: hidden, labels, weight, bias and the like.

    ids, mask [B, L]; hidden [B, L - start, D] holds the states from which the tokens are predicted, as the head gets
    them. Of an encoder-decoder model the encoder gets ids[:, :start]. No logits are made.
    """
    head = head_of(model)
    if seq2seq.is_encoder_decoder(model):
        hidden = head.hidden_states(**seq2seq.inputs(model, ids, mask, start))[:, start - ids.shape[1] :]
    else:
        hidden = head.hidden_states(**decoder_inputs(model, ids, mask))[:, start - 1 : -1]
    return {"hidden": hidden, "labels": ids[:, start:], **head.options()}
