"""Files are whole or as they were, and an error names the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rlhf_trainer.base.config import save_options
from rlhf_trainer.base.writing import named, write_text
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.reports.page import write_page


def fill(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "new"),
        lambda path: save_options({"a": 1}, path),
        lambda path: write_page(path, "title", ["new"]),
    ],
)
def test_a_full_disk_leaves_a_file_as_it_was_and_is_told_with_its_name(tmp_path, write, monkeypatch):
    file = tmp_path / "file"
    file.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill)
        with pytest.raises(OSError, match="No space left") as caught:
            write(file)
    assert caught.value.filename == str(file)
    assert file.read_text() == "old"
    write(file)
    assert file.read_text() != "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_records_that_do_not_fit_are_told_with_their_file(tmp_path):
    def records():
        yield {"a": 1}
        fill()

    with pytest.raises(OSError, match="No space left") as caught:
        write_jsonl(tmp_path / "file.jsonl", records())
    assert caught.value.filename == str(tmp_path / "file.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_names_its_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, named("other"):
        (tmp_path / "none").read_text()
    assert caught.value.filename == str(tmp_path / "none")
