"""Files and data sets of preferences -> pairs and rankings; the format is recognised from the first record, or named.

Sources: JSON lines, one JSON array, a table with a header (comma, tab, semicolon or bar), each also as .gz; Parquet and
Arrow files; a folder or a name that the `datasets` library loads. An error reads `file:line: reason`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.exports import EXPORTS
from rlhf_trainer.data.files import read_jsonl, read_lines
from rlhf_trainer.data.formats import RECORDS, Format, Item, Options, Record, Score, ranked_by_prompt
from rlhf_trainer.data.rankings import RankedPrompt, clean, merge
from rlhf_trainer.data.records import DataReport, Pair

FORMATS = {known.name: known for known in (*EXPORTS, *RECORDS)}  # exports first: they are the more particular
COLUMNAR = {".parquet": "parquet", ".arrow": "arrow"}
ENDINGS = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".gz", *COLUMNAR}  # of files; a data set's name has none of them


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


# Sources


def read_records(path: str, split: str = "train") -> Iterator[tuple[int, Record]]:
    """(line or row number from 1, record) of a file, a folder or a data set's name."""
    file = Path(path)
    if file.is_dir() or not file.exists() or file.suffix in COLUMNAR:
        return _data_set(path, split)
    start = next((line.strip() for _, line in read_lines(path) if line.strip()), "")
    if not start:
        return iter(())
    return read_jsonl(path) if start.startswith(("{", "[")) else _table(path)


def _table(path: str) -> Iterator[tuple[int, Record]]:
    """The rows of a table below its header, by column; the delimiter is the one that the header has most of."""
    lines = (line + "\n" for _, line in read_lines(path))
    header = next(lines, "")
    delimiter = max(",\t;|", key=header.count)
    if delimiter not in header:
        raise UserError(f"{path}:1: neither JSON nor a table: its first line has no comma, tab, semicolon or bar")
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 131,072 characters of the default
    rows = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    line = 1
    try:
        names = next(rows)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}:1: two columns are called {twice!r}")
        for row in rows:
            line, start = rows.line_num, line + 1
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(f"{path}:{start}: {len(row)} cells for {len(names)} columns ({', '.join(names)})")
            yield start, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{line + 1}: not a table: {error}") from None


def _data_set(path: str, split: str) -> Iterator[tuple[int, Record]]:
    """The rows of whatever the `datasets` library loads by this name or from this path."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    file = Path(path)
    if not file.exists() and (path.count("/") > 1 or path.startswith((".", "/", "~")) or file.suffix in ENDINGS):
        raise UserError(f"{path}: no such file or directory")
    datasets.disable_progress_bars()
    try:
        if file.suffix in COLUMNAR:
            loaded = datasets.load_dataset(COLUMNAR[file.suffix], data_files={split: path}, split=split)
        elif (file / "dataset_dict.json").exists() or (file / "state.json").exists():
            loaded = datasets.load_from_disk(path)
            loaded = _split_of(loaded, path, split) if isinstance(loaded, dict) else loaded
        else:
            loaded = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        raise UserError(f"{path}: the data set cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    for row, record in enumerate(loaded, start=1):
        yield row, {key: value for key, value in record.items() if value is not None}


def _split_of(loaded: Any, path: str, split: str) -> Any:
    if split not in loaded:
        raise UserError(f"{path}: no split {split!r}; --split names one of {', '.join(loaded)}")
    return loaded[split]
