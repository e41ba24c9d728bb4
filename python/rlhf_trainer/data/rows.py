"""Text -> token ids: prompts, completions, both cut to a length; padding to one length."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.chats import turn_end
from rlhf_trainer.data.encoding import (
    close,
    continue_text,
    encode_text,
    end_ids,
    holds_control,
    prompt_affixes,
)
from rlhf_trainer.data.records import DataReport, Example, Pair


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of prompt + completion + EOS; the first `prompt_length` are the prompt's. `line`: of the data file."""

    ids: list[int]
    prompt_length: int
    line: int = 0


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt as the tokenizer begins a text (BOS, if it uses one), never with the EOS that it would append."""
    ids = encode_text(tokenizer, prompt)
    prefix, suffix = prompt_affixes(tokenizer, ids)
    return prefix + ids + suffix


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str, eos: bool = True) -> list[int]:
    """Ids of a completion alone, followed by EOS."""
    ids = encode_text(tokenizer, completion)
    return close(tokenizer, ids, end_ids(tokenizer), always_eos=False) if eos else ids


def closed_by_eos(tokenizer: PreTrainedTokenizerBase, model: Any) -> dict[str, Any]:
    """Options of `tokenize_completions` for what a reward model reads: EOS closes an answer, whatever closed it."""
    return {"ends": [*end_ids(tokenizer, model), *turn_end(tokenizer)], "always_eos": True}


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """B lists of ids -> ids [B, L] and attention mask [B, L] bool, padded on the left to the longest."""
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        if row:
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = True
    return ids, mask


def tokenize_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, limit: int, **options: Any
) -> tuple[TokenizedExample, bool]:
    """(prompt and completion in at most `limit` tokens, whether something was cut); see `tokenize_completions`."""
    (row,), cut = tokenize_completions(tokenizer, prompt, [completion], limit, **options)
    return row, cut


def tokenize_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    completions: Sequence[str],
    limit: int,
    *,
    ends: Collection[int] | None = None,
    always_eos: bool = False,
) -> tuple[list[TokenizedExample], bool]:
    """(each completion after its prompt in at most `limit` tokens, whether something was cut).

    ends: the tokens that may close a completion, by default EOS alone; see `encoding.close`, also for `always_eos`.

    The beginning of the prompt is cut first (BOS stays), because old turns matter least; the same part for every
    completion, so that all follow the same prompt. If that is not enough, the end of a completion is cut. The token
    that closes it always stays: training and scoring both end with it.
    """
    ends = end_ids(tokenizer) if ends is None else ends
    inner = encode_text(tokenizer, prompt)
    prefix, suffix = prompt_affixes(tokenizer, inner)
    found = [continue_text(tokenizer, prompt, inner, text) for text in completions]
    keep = min(stay for stay, _ in found)  # what all completions leave to the prompt
    tails = [close(tokenizer, inner[keep:stay] + ids, ends, always_eos) for stay, ids in found]
    return cut_rows(prefix + inner[:keep] + suffix, tails, limit, tokenizer.bos_token_id)


def cut_rows(
    head: list[int], tails: list[list[int]], limit: int, bos: int | None
) -> tuple[list[TokenizedExample], bool]:
    """(each tail after the head in at most `limit` tokens, whether something was cut); see `tokenize_completions`."""
    excess = len(head) + max(map(len, tails)) - limit
    if excess > 0:
        first = head[:1] if head[:1] == [bos] else []
        head = first + head[len(first) + excess :]
        room = limit - len(head)
        tails = [tail if len(tail) <= room else [*tail[: room - 1], tail[-1]] for tail in tails]
    return [TokenizedExample(head + tail, len(head)) for tail in tails], excess > 0


def counted_tokens(row: TokenizedExample) -> int:
    return len(row.ids) - max(row.prompt_length, 1)


CONTROL = "special tokens in the text, taken as control"


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limit: int, report: DataReport, **options: Any
) -> list[TokenizedExample]:
    """Rows of the examples; options: `ends` and `always_eos` of `tokenize_completions`."""
    rows = []
    for example in examples:
        row, cut = tokenize_example(tokenizer, example.prompt, example.completion, limit, **options)
        if cut:
            report.warn(f"longer than {limit} tokens, cut", example.line)
        if holds_control(tokenizer, example.prompt) or holds_control(tokenizer, example.completion):
            report.count(CONTROL, example.line)
        rows.append(replace(row, line=example.line))
    return rows


@dataclass(frozen=True)
class TokenizedPair:
    pair: Pair
    chosen: TokenizedExample
    rejected: TokenizedExample


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], limit: int, report: DataReport, **options: Any
) -> list[TokenizedPair]:
    """Rows of the pairs, without those whose answers are the same tokens; options as of `encode_examples`."""
    encoded = []
    for pair in pairs:
        sides = [pair.chosen, pair.rejected]
        (chosen, rejected), cut = tokenize_completions(tokenizer, pair.prompt, sides, limit, **options)
        if cut:
            report.warn(f"longer than {limit} tokens, cut", pair.line)
        if any(holds_control(tokenizer, text) for text in (pair.prompt, *sides)):
            report.count(CONTROL, pair.line)
        if chosen.ids == rejected.ids:
            report.warn("chosen and rejected are the same tokens, dropped", pair.line)
            continue
        encoded.append(TokenizedPair(pair, chosen, rejected))
    if pairs and not encoded:
        raise UserError(f"{report.path}: in every pair chosen and rejected are the same tokens; nothing to learn")
    return encoded
