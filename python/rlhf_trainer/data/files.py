"""Files of text, JSON lines and JSON arrays, plain or .gz. A bad line is a UserError `file:line: reason`."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import named


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without the line end) of a UTF-8 file; a name in .gz is decompressed."""
    number = 0
    try:
        with gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: damaged gzip data ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file, or of one that is a single JSON array; empty lines are skipped."""
    first = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _json_array(path)
            return
        first = False
        record, end = _object(path, number, line, len(line) - len(line.lstrip()))
        if line[end:].strip():
            raise UserError(f"{path}:{number}: not JSON: there is more after the object, at column {end + 1}")
        yield number, record


def _json_array(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of one JSON array, each with the line on which it begins."""
    text = "\n".join(line for _, line in read_lines(path))
    place, line, counted, began = text.index("[") + 1, 1, 0, False
    while True:
        place = _after_spaces(text, place)
        comma = began and text[place : place + 1] == ","
        if comma:
            place = _after_spaces(text, place + 1)
        line += text.count("\n", counted, place)
        counted = place
        if text[place : place + 1] == "]" and not comma:
            if text[place + 1 :].strip():
                raise UserError(f"{path}:{line}: not JSON: there is more after the end of the array")
            return
        if began and not comma:
            raise UserError(f"{path}:{line}: not JSON: no comma between two objects")
        record, place = _object(path, line, text, place)
        began = True
        yield line, record


def _after_spaces(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _object(path: str | Path, line: int, text: str, place: int) -> tuple[dict[str, Any], int]:
    """The JSON object that begins at text[place], on that line of the file, and where it ends."""
    try:
        record, end = _DECODER.raw_decode(text, place)
    except ValueError as error:  # JSONDecodeError, or an integer of more digits than Python converts
        at = line + text.count("\n", place, getattr(error, "pos", place))
        raise UserError(f"{path}:{at}: not JSON: {getattr(error, 'msg', error)}") from None
    except RecursionError:
        raise UserError(f"{path}:{line}: not usable JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}:{line}: expected a JSON object, got {type(record).__name__}")
    return record, end


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write one object a line, to a temporary file that is then renamed: the file is whole or not there.

    A name in .gz is compressed.

    Raises:
        OSError: it cannot be written; a file that stood there before is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path), open(temporary, "wb") as raw:
            # Without name and time in it, so that the same records are the same bytes.
            zipped = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else nullcontext(raw)
            with zipped as file:
                file.writelines((dumps(record, ensure_ascii=False) + "\n").encode() for record in records)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def is_jsonl(path: str | Path) -> bool:
    return str(path).removesuffix(".gz").endswith((".jsonl", ".json"))
