"""Scores of texts by a sequence classifier, such as a reward model, at the last real token."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.console import say_once
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.encoding import padding_id, plain_text
from rlhf_trainer.data.rows import TokenizedExample, left_pad, tokenize_example
from rlhf_trainer.models import precision
from rlhf_trainer.models.adapters import score_head
from rlhf_trainer.models.forward import hidden_states
from rlhf_trainer.models.loading import context_length
from rlhf_trainer.models.seq2seq import is_encoder_decoder, sequence_states

NORMALISATION = "reward_normalisation.json"  # {"mean": float, "std": float} beside a reward model


def last_token_scores(model: PreTrainedModel, ids: Tensor, mask: Tensor, head: nn.Module | None = None) -> Tensor:
    """ids, mask [B, L] -> the classifier's outputs [B, num_labels] at each row's last real token by the mask.

    `head` in place of the model's own. An encoder-decoder model has the whole row in its encoder and again, one later,
    in its decoder, as its own classifier does.

    Not the model's own pooling, which looks for the pad id and errs where PAD is EOS.
    """
    if is_encoder_decoder(model):
        hidden, last = sequence_states(model, ids, mask), mask.sum(-1) - 1
    else:
        hidden, last = hidden_states(model, ids, mask), mask.long().cumsum(-1).argmax(-1)
    own: Any = score_head(model) if head is None else head
    states = hidden[torch.arange(len(ids), device=ids.device), last]
    with precision.autocast_disabled(ids.device):
        return own(states.to(next(own.parameters()).dtype)).float()


def load_normalisation(folder: str | Path) -> tuple[float, float]:
    """(mean, std) of the raw scores on reference samples; (0, 1) where the folder says nothing."""
    file = Path(folder) / NORMALISATION
    if not file.is_file():
        return 0.0, 1.0
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        mean, std = float(record["mean"]), float(record["std"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: expected {{'mean': number, 'std': number}}: {error}") from None
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise UserError(f"{file}: mean {mean} and std {std}; both must be finite, and std more than 0")
    return mean, std


def _say_cut(model: PreTrainedModel, limit: int) -> None:
    name = model.config.name_or_path or type(model).__name__
    say_once(f"{name}: texts beyond its {limit} tokens are scored without their beginning")


@torch.no_grad()
def classifier_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    batch_size: int = 64,
    head: nn.Linear | None = None,
) -> Tensor:
    """Raw outputs [M, num_labels] float32 on the CPU of a sequence classifier for prompt + completion.

    With `head` the model is any decoder, whose states it reads.
    Decoder backbones score at the last real token, EOS appended; others (BERT-like) pool in their own way. Of a text
    longer than the context the beginning is left out, as in training, and said to be.
    """
    device, limit = next(model.parameters()).device, context_length(model) or sys.maxsize
    columns: Any = model.config.num_labels if head is None else head.out_features
    outputs = torch.empty(len(prompts), columns)
    if head is None and score_head(model) is None:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        limit = min(limit, tokenizer.model_max_length)
        tokenizer.truncation_side = "left"
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            encoded = tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=limit,
                split_special_tokens=True,  # what a text names is text
                return_tensors="pt",
            ).to(device)
            if encoded["input_ids"].shape[1] >= limit:
                _say_cut(model, limit)
            outputs[start : start + batch_size] = model(**encoded).logits.float().cpu()
        return outputs
    encoded_rows = [
        tokenize_example(tokenizer, prompt, plain_text(completion), limit)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return row_outputs(model, tokenizer, encoded_rows, batch_size=batch_size, head=head)


@torch.no_grad()
def row_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded_rows: Sequence[tuple[TokenizedExample, bool]],
    *,
    batch_size: int = 64,
    head: nn.Linear | None = None,
) -> Tensor:
    """`classifier_outputs` of a decoder for rows of ids, each with whether it was cut."""
    if any(cut for _, cut in encoded_rows):
        _say_cut(model, context_length(model) or sys.maxsize)
    device, rows = next(model.parameters()).device, [row.ids for row, _ in encoded_rows]
    columns: Any = model.config.num_labels if head is None else head.out_features
    outputs = torch.empty(len(rows), columns)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths together: little padding
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = left_pad([rows[i] for i in chosen], padding_id(tokenizer))
        outputs[chosen] = last_token_scores(model, ids.to(device), mask.to(device), head).cpu()
    return outputs


def score_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    label: int = 0,
    batch_size: int = 64,
    head: nn.Linear | None = None,
) -> Tensor:
    """Raw scores [M] float32 on the CPU: output `label` of `classifier_outputs`."""
    outputs = classifier_outputs(model, tokenizer, prompts, completions, batch_size=batch_size, head=head)
    return outputs[:, label]
