"""Readers of prompts, SFT examples and preference pairs: text or JSON, plain or .gz.

A bad line is a UserError `file:line: reason`; what is merely odd is counted in a `DataReport`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.chats import render_turn

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
    """What is odd in one file: each finding and its lines. With `strict` a warning is an error.

    ignore_fields: those that may be unused without a word.
    """

    def __init__(self, path: str | Path, strict: bool = False, ignore_fields: Sequence[str] = ()) -> None:
        self.path, self.ignored = path, frozenset(ignore_fields)
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


def transcript_prompt(chosen: str, rejected: str, where: str, markers: Sequence[str] = (HH_TURN,)) -> str:
    """The beginning that two transcripts share, up to the end of its last marker, where both answers begin."""
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    found = [(place + len(marker), marker) for marker in markers if (place := chosen[:shared].rfind(marker)) >= 0]
    if not found:
        known = " or ".join(repr(marker.strip()) for marker in markers)
        raise UserError(f"{where}: no field 'prompt', and 'chosen' and 'rejected' share no beginning up to {known}")
    return chosen[: max(found)[0]]


def check_pairs(found: Iterable[tuple[Pair, DataReport]]) -> list[Pair]:
    """The pairs that can be learned from; what is odd about each is counted in the report that comes with it.

    An empty or the same answer is dropped; an empty prompt, a duplicate and a contradiction (the same two answers, the
    other one preferred, or neither) are kept: repeated and opposed judgements are information. Which is preferred, is
    said by the label: (a, b) with label 0 is (b, a) with label 1.
    """
    pairs = []
    seen: dict[tuple[str, ...], set[int]] = {}
    for pair, report in found:
        if not pair.chosen.strip() or not pair.rejected.strip():
            report.warn("empty answer, dropped", pair.line)
            continue
        if pair.chosen == pair.rejected:
            report.warn("chosen equals rejected, dropped", pair.line)
            continue
        if not pair.prompt.strip():
            report.warn("empty prompt", pair.line)
        verdict = (pair.label > 0.5) - (pair.label < 0.5)
        verdict = verdict if pair.chosen < pair.rejected else -verdict
        earlier = seen.setdefault((pair.prompt, *sorted((pair.chosen, pair.rejected))), set())
        if verdict in earlier:
            report.warn("duplicate", pair.line)
        if earlier - {verdict}:
            report.warn("contradicts an earlier pair", pair.line)
        earlier.add(verdict)
        pairs.append(pair)
    return pairs


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
            "nothing can be held out, as all records belong to one prompt or conversation: --heldout 0, or a file for "
            "it by --eval_data"
        )
    training = [record for index, record in enumerate(records) if index not in chosen]
    return training, [record for index, record in enumerate(records) if index in chosen]
