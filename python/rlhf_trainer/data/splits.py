"""Training and held-out records of a supervised stage, from two files or from one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.records import DataReport, Example, Pair, split_heldout

Record = TypeVar("Record", Example, Pair)


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

    All records of a prompt are on one side. heldout, seed: see `split_heldout`; strict, ignore_fields: `DataReport`.

    Raises:
        UserError: a file cannot be read, or nothing is left to train on.
    """
    if given is None:
        records, report = read(data, tokenizer, strict, ignore_fields)
    else:
        records, report = list(given), DataReport("data", strict)
        if not records:
            raise UserError("no training records were given; at least one is needed")
    if eval_data:
        other, other_report = read(eval_data, tokenizer, strict, ignore_fields)
        return Split(records, other, report, other_report)
    training, other = split_heldout(records, heldout, seed, group=lambda record: record.prompt or record)
    return Split(training, other, report, report)
