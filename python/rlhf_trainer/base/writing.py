"""Writing files: errors name the file, and nothing is half-written in silence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """An OSError from within names `path` if it names no file, as that of a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_whole(file: FileIO, data: bytes) -> None:
    """Append all of `data` to an unbuffered file, or leave the file as it was and raise the OSError."""
    start, place = file.seek(0, os.SEEK_END), 0
    try:
        while place < len(data):
            place += file.write(data[place:])
    except OSError:
        with suppress(OSError):  # the first error is the one to tell
            file.truncate(start)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file, whole: a process killed here, or a full disk, leaves what stood there before."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
