"""Files and data sets of preferences -> pairs and rankings; the format is recognised from the first record, or named.

An error reads `file:line: reason`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.exports import EXPORTS
from rlhf_trainer.data.formats import RECORDS, Format, Item, Options, Record, Score, ranked_by_prompt
from rlhf_trainer.data.rankings import RankedPrompt, clean, merge
from rlhf_trainer.data.records import DataReport, Pair
from rlhf_trainer.data.sources import read_records

FORMATS = {known.name: known for known in (*EXPORTS, *RECORDS)}  # exports first: they are the more particular


@dataclass
class Preferences:
    """All that was read: pairs as they came, rankings to vote on, and per file its format, records and report."""

    pairs: list[tuple[Pair, DataReport]] = field(default_factory=list)
    ranked: list[tuple[RankedPrompt, DataReport]] = field(default_factory=list)
    reports: list[DataReport] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    records: list[int] = field(default_factory=list)


def read_preferences(
    paths: Sequence[str],
    *,
    format: str = "auto",
    split: str = "train",
    options: Options | None = None,
    strict: bool = False,
) -> Preferences:
    """Everything in these files, of one format each; rankings of the same prompt and completions are merged.

    Raises:
        UserError: a file that cannot be read or is of no known format, a malformed record, no preference at all; with
            `strict` also an empty prompt or completion, a duplicate, a contradiction, an answer equal to the other.
    """
    found, options = Preferences(), options or Options()
    ranked: list[tuple[RankedPrompt, DataReport]] = []
    scores: list[tuple[Score, DataReport]] = []
    for path in paths:
        name = path if Path(path).exists() else f"{path}[{split}]"
        report = DataReport(name, strict)
        records = list(_items(path, name, format, split, options, report, found))
        ranked += [(item, report) for item in records if isinstance(item, RankedPrompt)]
        scores += [(item, report) for item in records if isinstance(item, Score)]
        found.pairs += [(item, report) for item in records if isinstance(item, Pair)]
        found.reports.append(report)
    ranked += [(record, scores[0][1]) for record in ranked_by_prompt(scores)]
    found.ranked = merge((record, report) for one, report in ranked for record in clean([one], report))
    if not found.pairs and not found.ranked:
        oddities = [
            report.summary(count, "records") for report, count in zip(found.reports, found.records, strict=True)
        ]
        raise UserError(f"no preference in {'; '.join(oddities)}")
    return found


def _items(
    path: str, name: str, format: str, split: str, options: Options, report: DataReport, found: Preferences
) -> Iterator[Item]:
    records = read_records(path, split)
    first = next(records, None)
    if first is None:
        raise UserError(f"{name}: no record in it")
    kind = FORMATS[format] if format != "auto" else recognise(first[1], f"{name}:{first[0]}", options)
    count = 0
    for line, record in chain([first], records):
        items = list(_parse(kind, record, f"{name}:{line}", line, options))
        if not items:
            report.count("not labelled yet, skipped", line)
        if any(isinstance(item, Pair) and _repeats_prompt(item) for item in items):
            report.count("both answers begin with the prompt (twice there?)", line)
        count += 1
        yield from items
    found.formats.append(kind.name)
    found.records.append(count)


def _repeats_prompt(pair: Pair) -> bool:
    """Whether the prompt stands again in both answers, as in data sets whose answers are whole conversations."""
    prompt = pair.prompt.strip()
    return len(prompt) > 8 and all(side.lstrip().startswith(prompt) for side in (pair.chosen, pair.rejected))


def _parse(kind: Format, record: Record, where: str, line: int, options: Options) -> Iterable[Item]:
    try:
        return list(kind.parse(record, where, line, options))
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        # A record that is not built as its format says, in a place that no check names.
        raise UserError(f"{where}: not built as format {kind.name} is: {type(error).__name__} {error}") from None


def recognise(record: Record, where: str, options: Options) -> Format:
    """The format of a file that begins with this record."""
    renamed = dict(record)
    renamed.update({ours: record[theirs] for ours, theirs in options.columns.items() if theirs in record})
    for kind in FORMATS.values():
        if kind.fits(renamed):
            return kind
    raise UserError(
        f"{where}: no known format has the fields {', '.join(map(str, record)) or 'none'}; --columns chosen=NAME "
        "rejected=NAME prompt=NAME says which is which, --help lists the formats"
    )
