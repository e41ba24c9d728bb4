"""Text -> token ids: prompts, completions, both cut to a length; padding to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_trainer.data.records import DataReport, Example, Pair


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of prompt + completion + EOS; the first `prompt_length` are the prompt's. `line`: of the data file."""

    ids: list[int]
    prompt_length: int
    line: int = 0


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt as the tokenizer begins a text (BOS, if it uses one), never with a closing EOS."""
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str, eos: bool = True) -> list[int]:
    """Ids of a completion, followed by EOS."""
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if eos else ids


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
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, limit: int
) -> tuple[TokenizedExample, bool]:
    """(prompt and completion in at most `limit` tokens, whether something was cut); see `tokenize_completions`."""
    (row,), cut = tokenize_completions(tokenizer, prompt, [completion], limit)
    return row, cut


def tokenize_completions(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completions: Sequence[str], limit: int
) -> tuple[list[TokenizedExample], bool]:
    """(each completion after its prompt in at most `limit` tokens, whether something was cut).

    The beginning of the prompt is cut first (BOS stays), because old turns matter least; the same part for every
    completion, so that all follow the same prompt. If that is not enough, the end of a completion is cut. The EOS after
    it always stays: training and scoring both end with it.
    """
    head, tails = encode_prompt(tokenizer, prompt), [encode_completion(tokenizer, text) for text in completions]
    excess = len(head) + max(map(len, tails)) - limit
    if excess > 0:
        bos = head[:1] if head[:1] == [tokenizer.bos_token_id] else []
        head = bos + head[len(bos) + excess :]
        room = limit - len(head)
        tails = [tail if len(tail) <= room else [*tail[: room - 1], tail[-1]] for tail in tails]
    return [TokenizedExample(head + tail, len(head)) for tail in tails], excess > 0


def counted_tokens(row: TokenizedExample) -> int:
    return len(row.ids) - max(row.prompt_length, 1)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limit: int, report: DataReport
) -> list[TokenizedExample]:
    rows = []
    for example in examples:
        row, cut = tokenize_example(tokenizer, example.prompt, example.completion, limit)
        if cut:
            report.warn(f"longer than {limit} tokens, cut", example.line)
        rows.append(replace(row, line=example.line))
    return rows


@dataclass(frozen=True)
class TokenizedPair:
    pair: Pair
    chosen: TokenizedExample
    rejected: TokenizedExample


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], limit: int, report: DataReport
) -> list[TokenizedPair]:
    encoded = []
    for pair in pairs:
        (chosen, rejected), cut = tokenize_completions(tokenizer, pair.prompt, [pair.chosen, pair.rejected], limit)
        if cut:
            report.warn(f"longer than {limit} tokens, cut", pair.line)
        encoded.append(TokenizedPair(pair, chosen, rejected))
    return encoded
