"""What one forward pass of a language model yields: hidden states, and the logits that belong to them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_trainer import seq2seq


def position_ids(mask: Tensor) -> Tensor:
    """Positions counted over real tokens [B, L], so that left padding does not shift them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """ids, mask [B, L] -> last hidden states [B, L, D] of a causal LM's or classifier's backbone."""
    backbone = model.base_model
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        options["position_ids"] = position_ids(mask)
    return backbone(**options).last_hidden_state


def response_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, start: int) -> Tensor:
    """ids, mask [B, L] -> the states [B, L - start, D] from which the tokens at start.. are predicted."""
    if seq2seq.is_encoder_decoder(model):
        return seq2seq.response_states(model, ids, mask, start)
    return hidden_states(model, ids, mask)[:, start - 1 : -1]


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The LM's logits [..., V] for hidden states [..., D], with its scaling and soft cap if it has them."""
    if scales_states(model.config):
        hidden = hidden * model.config.d_model**-0.5
    logits = model.get_output_embeddings()(hidden)
    if getattr(model, "final_logits_bias", None) is not None:  # BART
        logits = logits + model.final_logits_bias
    config = model.config.get_text_config()
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits


def scales_states(config: Any) -> bool:
    """Whether the decoder's states are multiplied by d_model ** -0.5 before the head, as T5 with tied embeddings."""
    tied = config.model_type in ("umt5", "switch_transformers") and config.tie_word_embeddings
    return bool(getattr(config, "scale_decoder_outputs", tied))
