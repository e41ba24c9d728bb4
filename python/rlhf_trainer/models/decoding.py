"""The next token's logits of a causal LM, one step at a time, by the model's own generation interface.

The interface knows under which name a model takes its cache (`past_key_values`, `cache_params`, `state`) and what it
takes beside it; a keyword of ours could vanish in a model's `**kwargs`, and the model would see the last token alone.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.utils import ALL_CACHE_NAMES, GenerationMode

from rlhf_trainer.models import seq2seq
from rlhf_trainer.models.forward import position_ids


class IncrementalDecoder:
    """Holds the cache of a batch; of a model that keeps none every step reads all tokens again."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
        self.model = cast(Any, model)
        self.accepted = inspect.signature(type(model).forward).parameters
        self.cached: bool | None = None  # None: before the first step
        self.state: dict[str, Any] = {}
        options = GenerationConfig(use_cache=True), self.state, GenerationMode.SAMPLE, len(ids), ids.shape[1]
        self.model._prepare_cache_for_generation(*options)

    def next_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, L] so far -> logits [B, V] of the token that comes next."""
        first = self.cached is None
        options = {"position_ids": position_ids(mask), "logits_to_keep": 1}
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=1 if self.cached else None,
            is_first_iteration=first,
            attention_mask=mask.long(),
            use_cache=True,
            **{key: value for key, value in options.items() if key in self.accepted},
            **self.state,
        )
        output = self.model(**inputs, return_dict=True)
        if first:
            self.cached = self._keep(output)
        elif self.cached:
            self._keep(output)
        return output.logits[:, -1]

    def _keep(self, output: Any) -> bool:
        """Take over the cache of a step; whether there is one. RecurrentGemma fills the one given and returns none."""
        name = next((name for name in ALL_CACHE_NAMES if output.get(name) is not None), None)
        if name is not None:
            self.state[name] = output[name]
        self.state = {key: cache for key, cache in self.state.items() if _holds_something(cache)}
        return bool(self.state)

    def select_rows(self, rows: Any) -> None:
        """Go on with these rows of the batch alone."""
        for name, cache in self.state.items():
            if isinstance(cache, Cache):
                cache.reorder_cache(rows)  # an index_select of every layer's state, whatever its kind
            else:  # RWKV's state: tensors [B, ...]
                self.state[name] = [tensor[rows] for tensor in cache]


def _holds_something(cache: Any) -> bool:
    """False of a cache that the model never touched, as one without the argument for it."""
    if not isinstance(cache, Cache):
        return True
    names = ("is_conv_states_initialized", "is_recurrent_states_initialized")
    linear = (flag for layer in cache.layers for name in names for flag in getattr(layer, name, {}).values())
    return any(getattr(layer, "is_initialized", False) for layer in cache.layers) or any(linear)


def decoder_for(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> IncrementalDecoder | seq2seq.IncrementalDecoder:
    """What gives the logits of the tokens after left-padded prompts ids, mask [B, P]."""
    kind = seq2seq.IncrementalDecoder if seq2seq.is_encoder_decoder(model) else IncrementalDecoder
    return kind(model, ids, mask)
