"""Encoder-decoder models (T5, BART): the prompt goes to the encoder, the response to the decoder.

Prompts reach here left-padded, as everywhere. The encoder gets each closed with EOS and padded on the right, as these
models were trained: then absolute positions (BART) are right too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    return bool(model.config.is_encoder_decoder)


def force_eager_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Attention with the same bits whether gradients are wanted or not, as PPO's first ratio needs.

    SDPA changes its kernel where the mask needs a gradient, and T5's mask holds its learned position bias.
    """
    if getattr(model.config, "relative_attention_num_buckets", None):
        model.set_attn_implementation("eager")
    return model


def start_token(model: PreTrainedModel) -> int:
    """The id that the decoder begins with."""
    start = model.config.decoder_start_token_id
    return model.config.pad_token_id if start is None else start


def first_tokens(model: PreTrainedModel) -> list[int]:
    """What the decoder reads before it predicts: the start token, and the BOS that `generate` forces (BART, mBART)."""
    settings = (getattr(model, "generation_config", None), model.config)
    forced = next((x for x in (getattr(s, "forced_bos_token_id", None) for s in settings) if x is not None), None)
    return [start_token(model), *([] if forced is None else [forced])]


def close_prompts(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded prompts [B, P] -> the encoder's ids and mask [B, P + 1]: closed with EOS, padded on the right."""
    eos = model.config.eos_token_id
    if isinstance(eos, list):
        eos = eos[0]
    if eos is not None:
        ids = torch.cat([ids, ids.new_full((len(ids), 1), eos)], 1)
        mask = torch.cat([mask, mask.new_ones((len(ids), 1))], 1)
    return pad_right(ids, mask)


def pad_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask [B, L] with the padding moved to the right."""
    order = (~mask).int().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def encode(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    """Left-padded prompts [B, P] -> the encoder's output and its mask."""
    ids, mask = close_prompts(model, ids, mask)
    return model.get_encoder()(input_ids=ids, attention_mask=mask.long()), mask.long()


def inputs(model: PreTrainedModel, ids: Tensor, mask: Tensor, start: int) -> dict[str, Any]:
    """The forward's inputs for prompts [B, :start] and responses [B, start:], whose tokens the decoder predicts [B, R].

    They are predicted in its last R states: before them it reads the rest of the `first_tokens`.
    Responses are padded on the right, where nothing that counts can see it.
    """
    prompts, prompt_mask = close_prompts(model, ids[:, :start], mask[:, :start])
    first = ids.new_tensor([first_tokens(model)]).expand(len(ids), -1)
    decoder_ids = torch.cat([first, ids[:, start:-1]], 1)
    return {
        "input_ids": prompts,
        "attention_mask": prompt_mask.long(),
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": torch.ones_like(decoder_ids),
        "use_cache": False,
    }


def sequence_states(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Left-padded rows [B, L] -> the decoder's states [B, L, D], padded on the right, as its classifiers do.

    The row is the encoder's input and, after the start token, the decoder's: every state has read all of it.
    """
    ids, mask = pad_right(ids, mask)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask.long())
    first = ids.new_full((len(ids), 1), start_token(model))
    inputs = torch.cat([first, ids[:, :-1]], 1)
    output = model.get_decoder()(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=mask.long(),
        use_cache=False,
    )
    return output.last_hidden_state


class IncrementalDecoder:
    """The next token's logits, one step at a time, with a KV cache; the encoder runs once."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
        self.model, self.cache = model, None
        self.encoded, self.mask = encode(model, ids, mask)
        self.first = ids.new_tensor([first_tokens(model)]).repeat(len(ids), 1)

    def next_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B, L] so far -> logits [B, V] of the token that comes next."""
        inputs = self.first if self.cache is None else ids[:, -1:]
        output = self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=inputs,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def select_rows(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        self.encoded.last_hidden_state, self.mask = self.encoded.last_hidden_state[rows], self.mask[rows]
        self.first = self.first[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)
