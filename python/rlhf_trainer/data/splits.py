"""Training and held-out records of a supervised stage, from two files or from one."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.records import HH_TURN, DataReport, Example, Pair, split_heldout

Record = TypeVar("Record", Example, Pair)
KNOWN = "also in the training data: the same prompt, or another turn of its conversation"
RESPELLED = "prompt that differs from an earlier one only by Unicode form or outer spaces"


def conversations(prompts: Sequence[str]) -> list[int]:
    """[N] a number for each prompt, equal where they are of one conversation; an empty prompt is on its own.

    One conversation: prompts that differ only by Unicode form or outer spaces; a prompt that ends where an answer
    begins (its last character is no letter or digit), and every one that goes on from there, as the turns of a chat do;
    transcripts with the same first turn.
    """
    texts = [plain(prompt) for prompt in prompts]
    owner = list(range(len(texts)))

    def find(i: int) -> int:
        while owner[i] != i:
            owner[i] = owner[owner[i]]
            i = owner[i]
        return i

    first_turns: dict[str, int] = {}
    begun: list[int] = []  # prompts of which each is the beginning of the next, and of the one at hand
    for i in sorted((i for i, text in enumerate(texts) if text), key=lambda i: texts[i]):
        while begun and not texts[i].startswith(texts[begun[-1]]):
            begun.pop()
        if begun and (texts[i] == texts[begun[-1]] or not texts[begun[-1]][-1].isalnum()):
            owner[find(i)] = find(begun[-1])
        begun.append(i)
        turn, marker, _ = f"{texts[i]}\n\n".partition(HH_TURN.strip())
        if marker:
            owner[find(i)] = find(first_turns.setdefault(turn, i))
    return [find(i) for i in range(len(texts))]


def plain(text: str) -> str:
    """Text as it is compared: composed characters, no outer spaces."""
    return unicodedata.normalize("NFC", text).strip()


def count_respelled(records: Sequence[Example] | Sequence[Pair], report: DataReport) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if seen.setdefault(plain(record.prompt), record.prompt) != record.prompt:
            report.count(RESPELLED, record.line)


@dataclass(frozen=True)
class Split(Generic[Record]):
    """Records, and what was odd in the file of each part: one report where both come from one file."""

    training: list[Record]
    heldout: list[Record]
    report: DataReport
    heldout_report: DataReport

    def say(self, noun: str, *, training: int, heldout: int) -> None:
        """A line for each file: how many records are used of it, and what was odd."""
        if self.heldout_report is not self.report:
            say(self.report.summary(training, noun))
            say(self.heldout_report.summary(heldout, f"held-out {noun}"))
        else:
            say(self.report.summary(training + heldout, f"{noun}, {heldout} held out"))


def load_train_and_heldout(
    read: Callable[..., tuple[list[Record], DataReport]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str,
    eval_data: str | None,
    heldout: float,
    seed: int,
    strict: bool,
    ignore_fields: Sequence[str] = (),
    given: Sequence[Record] | None = None,
) -> Split[Record]:
    """The records of `data`, or those `given`, and of `eval_data`; without it a part of the first is held out.

    All records of a conversation are on one side; those of `eval_data` that training knows are counted.
    heldout, seed: see `split_heldout`. strict, ignore_fields: see `DataReport`.

    Raises:
        UserError: a file cannot be read, or nothing is left to train on.
    """
    if given is None:
        records, report = read(data, tokenizer, strict, ignore_fields)
    else:
        records, report = list(given), DataReport("data", strict)
        if not records:
            raise UserError("no training records were given; at least one is needed")
    count_respelled(records, report)
    if eval_data:
        other, other_report = read(eval_data, tokenizer, strict, ignore_fields)
        groups = conversations([record.prompt for record in records] + [record.prompt for record in other])
        known = set(groups[: len(records)])
        for record, group in zip(other, groups[len(records) :], strict=True):
            if group in known:
                other_report.count(KNOWN, record.line)
        return Split(records, other, report, other_report)
    of_record = dict(zip(map(id, records), conversations([record.prompt for record in records]), strict=True))
    training, other = split_heldout(records, heldout, seed, group=lambda record: of_record[id(record)])
    return Split(training, other, report, report)


def drawn(records: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most so many of them, drawn from all by the seed, in their order: a file's beginning need not be like it."""
    if len(records) <= most:
        return list(records)
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), most))]
