"""Readers of prompts, SFT examples and preference pairs: text or JSON, plain or .gz.

A bad line is a UserError `file:line: reason`; what is merely odd is counted in a `DataReport`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.chats import render_prompt, render_turn
from rlhf_trainer.data.files import is_jsonl, is_table, read_jsonl, read_lines

Record = TypeVar("Record")
HH_TURN = "\n\nAssistant:"


@dataclass(frozen=True)
class Example:
    """One SFT record: the model learns `completion`, then EOS, after `prompt`. `line`: its line in the file."""

    prompt: str
    completion: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Pair:
    """One comparison. `label`: probability that `chosen` is the better one (0.5: a tie); `margin`: in reward units."""

    prompt: str
    chosen: str
    rejected: str
    label: float = 1.0
    margin: float = 0.0
    line: int = field(default=0, compare=False)


class DataReport:
    """What is odd in one file: each finding and its lines. With `strict` a warning is an error."""

    def __init__(self, path: str | Path, strict: bool = False) -> None:
        self.path = path
        self.strict = strict
        self.lines: dict[str, list[int]] = {}

    def warn(self, finding: str, line: int) -> None:
        """Count a finding; UserError if `strict`."""
        if self.strict:
            raise UserError(f"{self.path}:{line}: {finding} (an error because of --strict)")
        self.count(finding, line)

    def count(self, finding: str, line: int) -> None:
        """Count what is no error even if `strict`."""
        self.lines.setdefault(finding, []).append(line)

    def __getitem__(self, finding: str) -> int:
        return len(self.lines.get(finding, []))

    def summary(self, records: int, noun: str) -> str:
        parts = [f"{len(lines)} x {finding} (first: line {lines[0]})" for finding, lines in self.lines.items()]
        return f"{self.path}: {records} {noun}" + ("; " + ", ".join(parts) if parts else "")


def text_field(record: dict[str, Any], key: str, where: str) -> str:
    """record[key] as text that a tokenizer takes; UserError naming `where` if it is missing or something else."""
    if key not in record:
        raise UserError(f"{where}: no field {key!r}; the fields are {', '.join(record) or 'none'}")
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {key!r} is {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: field {key!r} holds half of a surrogate pair, which is not text") from None
    return value


def is_finite(value: Any) -> bool:
    """Whether it is a number that a float holds; JSON has integers of any size."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def number_field(record: dict[str, Any], key: str, where: str, default: float, low: float, high: float) -> float:
    value = record.get(key, default)
    if not is_finite(value) or not low <= value <= high:
        raise UserError(f"{where}: field {key!r} is {value!r}, expected a number in [{low:g}, {high:g}]")
    return float(value)


def messages_of(value: Any, key: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: field {key!r} is not a list of messages")
    for message in value:
        if not isinstance(message, dict):
            raise UserError(f"{where}: a message in {key!r} is {type(message).__name__}, expected an object")
        text_field(message, "role", where)
        text_field(message, "content", where)
    return value


def chat_turn(
    messages: list[dict[str, str]], end: int, tokenizer: PreTrainedTokenizerBase | None, where: str
) -> Example:
    """Message `end` as a completion of all before it; see `render_turn`."""
    return Example(*render_turn(messages, end, tokenizer, where))


def prompt_records(path: str | Path) -> Iterator[tuple[str, str | list[dict[str, str]]]]:
    """("file:line", prompt as text or chat messages): one a line of a text file, or JSON lines with "prompt" (text, or
    chat messages) or "messages" (without the assistant's last one). UserError for an unreadable file, a malformed
    line, an empty prompt."""
    if is_table(path):
        raise UserError(
            f"{path}: a table; prompts come as JSON lines with a `prompt` field, or one a line of a .txt file"
        )
    for number, line in [] if is_jsonl(path) else read_lines(path):
        if not line.strip():
            raise UserError(f"{path}:{number}: empty prompt")
        yield f"{path}:{number}", line
    for number, record in read_jsonl(path) if is_jsonl(path) else []:
        where = f"{path}:{number}"
        key = "messages" if "messages" in record else "prompt"
        if isinstance(record.get(key), list):
            messages = messages_of(record[key], key, where)
            if key == "messages" and messages[-1]["role"] == "assistant":  # sft's data: the answer is no prompt
                messages = messages[:-1]
            if not messages:
                raise UserError(f"{where}: no message to answer")
            yield where, messages
            continue
        prompt = text_field(record, key, where)
        if not prompt.strip():
            raise UserError(f"{where}: empty prompt")
        yield where, prompt


def read_prompts(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The prompts of a file (see prompt_records) as text, chats written by the tokenizer's template.

    Raises:
        UserError: an unreadable file, a malformed line, an empty prompt, or no prompt at all.
    """
    return [text for text, _ in read_shown_prompts(path, tokenizer)]


def read_shown_prompts(path: str | Path, tokenizer: PreTrainedTokenizerBase | None) -> list[tuple[str, str]]:
    """(text, `shown_prompt`) of each prompt: what a model and what a person reads. Raises as `read_prompts`."""
    prompts = []
    for where, prompt in prompt_records(path):
        text = prompt if isinstance(prompt, str) else render_prompt(prompt, tokenizer, where)
        if not text.strip():
            raise UserError(f"{where}: empty prompt")
        prompts.append((text, shown_prompt(prompt)))
    if not prompts:
        raise UserError(f"{path}: no prompt in it")
    return prompts


def shown_prompt(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as a person or a judge reads it: no control tokens, and roles only where there are several turns."""
    if isinstance(prompt, str):
        return prompt
    users = [message for message in prompt if message["role"] != "system"]
    return users[0]["content"] if len(users) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def instruction_prompt(record: dict[str, Any], where: str) -> str:
    """The prompt that "instruction" and an optional "input" make, the same for SFT and for preferences."""
    instruction, extra = text_field(record, "instruction", where), record.get("input") or ""
    extra = text_field({"input": extra}, "input", where)
    return f"{instruction}\n\n{extra}\n\n" if extra else f"{instruction}\n\n"


def _examples_of(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> list[Example]:
    if "messages" in record:
        messages = messages_of(record["messages"], "messages", where)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        if not turns:
            raise UserError(f"{where}: no assistant message to learn from")
        return [chat_turn(messages, turn, tokenizer, where) for turn in turns]
    if "instruction" in record:
        return [Example(instruction_prompt(record, where), text_field(record, "output", where))]
    return [Example(text_field(record, "prompt", where), text_field(record, "completion", where))]


def read_examples(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, strict: bool = False
) -> tuple[list[Example], DataReport]:
    """SFT examples from JSON lines of {"prompt", "completion"}, {"instruction", "input", "output"} or {"messages"}.

    A chat gives one example for each assistant message. An empty completion is dropped; an empty prompt and a
    duplicate are kept and counted. A text file gives one example a line, with an empty prompt.
    """
    report, examples, seen = DataReport(path, strict), [], set()
    if is_table(path):
        raise UserError(f"{path}: a table; examples are JSON lines of prompts and completions, instructions or chats")
    if is_jsonl(path):
        found = ((number, _examples_of(record, tokenizer, f"{path}:{number}")) for number, record in read_jsonl(path))
    else:
        found = ((number, [Example("", line)]) for number, line in read_lines(path))
    for number, records in found:
        for example in records:
            if not example.completion.strip():
                report.warn("empty completion, dropped", number)
                continue
            if is_jsonl(path) and not example.prompt.strip():
                report.warn("empty prompt", number)
            if example in seen:
                report.warn("duplicate", number)
            seen.add(example)
            examples.append(replace(example, line=number))
    if not examples:
        raise UserError(f"{path}: no example in it")
    return examples, report


def transcript_prompt(chosen: str, rejected: str, where: str, markers: Sequence[str] = (HH_TURN,)) -> str:
    """The beginning that two transcripts share, up to the end of its last marker, where both answers begin."""
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    found = [(place + len(marker), marker) for marker in markers if (place := chosen[:shared].rfind(marker)) >= 0]
    if not found:
        known = " or ".join(repr(marker.strip()) for marker in markers)
        raise UserError(f"{where}: no field 'prompt', and 'chosen' and 'rejected' share no beginning up to {known}")
    return chosen[: max(found)[0]]


def _pair_of(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> Pair:
    label = number_field(record, "label", where, 1.0, 0.0, 1.0)
    margin = number_field(record, "margin", where, 0.0, -math.inf, math.inf)
    if isinstance(record.get("chosen"), list) and isinstance(record.get("rejected"), list):
        context = messages_of(record["prompt"], "prompt", where) if "prompt" in record else []
        sides = [
            chat_turn(chat, len(chat) - 1, tokenizer, where)
            for chat in (context + messages_of(record[key], key, where) for key in ("chosen", "rejected"))
        ]
        if sides[0].prompt != sides[1].prompt:
            raise UserError(f"{where}: 'chosen' and 'rejected' differ before their last message")
        return Pair(sides[0].prompt, sides[0].completion, sides[1].completion, label, margin)
    chosen, rejected = text_field(record, "chosen", where), text_field(record, "rejected", where)
    if "prompt" in record:
        return Pair(text_field(record, "prompt", where), chosen, rejected, label, margin)
    prompt = transcript_prompt(chosen, rejected, where)
    return Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :], label, margin)


def check_pairs(found: Iterable[tuple[Pair, DataReport]], seen: set[tuple[str, str, str]] | None = None) -> list[Pair]:
    """The pairs that can be learned from; what is odd about each is counted in the report that comes with it.

    An empty or the same answer is dropped; an empty prompt, a duplicate and a contradiction (the same two answers, the
    other one preferred) are kept: repeated and opposed judgements are information.
    """
    pairs = []
    seen = set() if seen is None else seen
    for pair, report in found:
        if not pair.chosen.strip() or not pair.rejected.strip():
            report.warn("empty answer, dropped", pair.line)
            continue
        if pair.chosen == pair.rejected:
            report.warn("chosen equals rejected, dropped", pair.line)
            continue
        if not pair.prompt.strip():
            report.warn("empty prompt", pair.line)
        if (pair.prompt, pair.chosen, pair.rejected) in seen:
            report.warn("duplicate", pair.line)
        if (pair.prompt, pair.rejected, pair.chosen) in seen:
            report.warn("contradicts an earlier pair", pair.line)
        seen.add((pair.prompt, pair.chosen, pair.rejected))
        pairs.append(pair)
    return pairs


def read_pairs(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, strict: bool = False
) -> tuple[list[Pair], DataReport]:
    """Preference pairs: JSON lines of {"prompt", "chosen", "rejected"}, HH-RLHF transcripts without "prompt", or chats.

    Optional fields: "label" (probability that chosen is better) and "margin". What check_pairs finds odd is counted.
    `rlhf prefs` turns every other format into this one.
    """
    if is_table(path):
        raise UserError(f"{path}: a table; `rlhf prefs {path} --output pairs.jsonl` makes pairs of it")
    report = DataReport(path, strict)
    records = ((replace(_pair_of(r, tokenizer, f"{path}:{line}"), line=line), report) for line, r in read_jsonl(path))
    pairs = check_pairs(records)
    if not pairs:
        raise UserError(f"{path}: no pair in it")
    return pairs, report


def split_heldout(
    records: list[Record], heldout: float, seed: int, group: Callable[[Record], Hashable]
) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records. `heldout` < 1 is a share, from 1 on a number of records; 0 holds nothing out.

    Records of one group (the same prompt, say) stay together, so that training sees no prompt that is held out; the
    held-out part may therefore be larger by less than one group.
    """
    target = heldout if heldout >= 1 else heldout * len(records)
    if target >= len(records):
        raise UserError(f"--heldout {heldout:g} leaves none of the {len(records)} records for training")
    groups: dict[Hashable, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(group(record), []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for members in order:
        if len(chosen) >= target:
            break
        chosen.update(members)
    if len(chosen) == len(records) and target > 0:
        raise UserError(
            "nothing can be held out, as all records belong to one prompt: --heldout 0, or a file for it by --eval_data"
        )
    training = [record for index, record in enumerate(records) if index not in chosen]
    return training, [record for index, record in enumerate(records) if index in chosen]
