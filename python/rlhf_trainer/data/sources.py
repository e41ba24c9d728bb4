"""Records from whatever holds them.

JSON lines, one JSON array, a table with a header (comma, tab, semicolon or bar, or Markdown's), each also as .gz;
Parquet and Arrow files; a folder or a name that the `datasets` library loads. An error reads `file:line: reason`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import read_jsonl, read_lines

Record = dict[str, Any]
COLUMNAR = {".parquet": "parquet", ".arrow": "arrow"}
ENDINGS = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".gz", *COLUMNAR}  # of files; a data set's name has none


def is_text(path: str | Path) -> bool:
    """Whether the name is that of a file with one text a line."""
    name = str(path).removesuffix(".gz")
    return not Path(path).is_dir() and not name.endswith(tuple(ENDINGS - {".txt", ".gz"}))


def read_records(path: str, split: str = "train") -> Iterator[tuple[int, Record]]:
    """(line or row number from 1, record) of a file, a folder or a data set's name."""
    file = Path(path)
    if file.is_dir() or not file.exists() or file.suffix in COLUMNAR:
        return _data_set(path, split)
    start = next((line.strip() for _, line in read_lines(path) if line.strip()), "")
    if not start:
        return iter(())
    if start.startswith(("{", "[")):
        return read_jsonl(path)
    return _markdown(path) if start.startswith("|") or ".md" in file.suffixes else _table(path)


def _table(path: str) -> Iterator[tuple[int, Record]]:
    """The rows of a table below its header, by column; the delimiter is the one that the header has most of."""
    lines = (line + "\n" for _, line in read_lines(path))
    header = next(lines, "")
    delimiter = max(",\t;|", key=header.count)
    one_column = header.strip().isidentifier() and {".csv", ".tsv"} & set(Path(path).suffixes)
    if delimiter not in header and not one_column:
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


def _markdown(path: str) -> Iterator[tuple[int, Record]]:
    """The rows of a Markdown table; text around it is no part of it."""
    names: list[str] = []
    for line, text in read_lines(path):
        if not text.strip().startswith("|"):
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", text.strip().strip("|"))]
        if not names:
            names = cells
        elif len(cells) != len(names):
            raise UserError(f"{path}:{line}: {len(cells)} cells for {len(names)} columns ({', '.join(names)})")
        elif not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            yield line, dict(zip(names, cells, strict=True))


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
