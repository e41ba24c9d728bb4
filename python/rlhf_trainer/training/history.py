"""The metrics of a run's steps, in little memory: a long run has very many."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from rlhf_trainer.base.console import say
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.training.runlog import read_metrics, replace_lines


class History(Sequence[dict[str, float]]):
    """One dict of numbers a step. The newest is kept as it was given, and may still grow; earlier ones are packed."""

    def __init__(self, rows: Iterable[dict[str, float]] = ()) -> None:
        self.newest: dict[str, float] | None = None
        self.packed: list[tuple[tuple[tuple[str, bool], ...], array[float]]] = []  # (name, whether an int), values
        self.names: dict[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]] = {}  # one tuple for equal ones
        for row in rows:
            self.append(row)

    def append(self, metrics: dict[str, float]) -> None:
        if self.newest is not None:
            names = tuple((name, isinstance(value, int)) for name, value in self.newest.items())
            self.packed.append((self.names.setdefault(names, names), array("d", map(float, self.newest.values()))))
        self.newest = metrics

    def __len__(self) -> int:
        return len(self.packed) + (self.newest is not None)

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, float]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, float] | list[dict[str, float]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if self.newest is not None and place == len(self.packed):
            return self.newest
        names, values = self.packed[place]
        return {name: int(x) if whole else x for (name, whole), x in zip(names, values, strict=True)}


def read_history(file: Path) -> History:
    """What a checkpoint keeps: a JSON array with an object for each step from the first on."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return History({name: math.nan if value is None else value for name, value in row.items()} for row in rows)


def restore_metrics(output_dir: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.jsonl anew, and say so, where it does not hold the steps of a run that goes on."""
    wanted = [{"step": step, **row} for step, row in enumerate(history, start=1)]
    found = [row for row in read_metrics(output_dir) if row["step"] <= len(wanted)]
    if dumps(found, sort_keys=True) != dumps(wanted, sort_keys=True):
        file = Path(output_dir) / "metrics.jsonl"
        say(f"{file}: deleted, cut or changed since the checkpoint; its {len(wanted)} steps are restored from there")
        replace_lines(file, wanted)
