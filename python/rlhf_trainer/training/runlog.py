"""What a run shows and keeps: a progress bar with ETA, metrics, completions and alerts as JSONL and in trackers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import named, write_text, write_whole
from rlhf_trainer.training.trackers import Trackers


class RunLog:
    """Context manager around a stage's loop.

    `step(step, metrics)` appends one JSON object to metrics.jsonl, reports to the trackers and moves the bar. With
    `start` > 0 (a resumed run) lines of steps that will be repeated are dropped first. Of several ranks the first one
    writes; the others' logs are silent.

    Args:
        report_to: names of trackers, see `trackers`. options: the stage's, which trackers keep with the run.
    """

    def __init__(
        self,
        output_dir: str | Path,
        total: int,
        description: str,
        *,
        start: int = 0,
        report_to: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.silent = not distributed_context().main
        if self.silent:
            return
        self.folder = Path(output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        for name in ("metrics.jsonl", "completions.jsonl", "alerts.jsonl"):
            _keep_until(self.folder / name, start)
        self.total, self.description = total, description
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task(description, total=total, completed=start, note="")
        self.live = self.console.is_terminal
        self.trackers = Trackers(report_to, self.folder, options, start)
        self.every = max(1, total // 10)  # without a terminal: about ten plain lines

    def __enter__(self) -> RunLog:
        if self.silent:
            return self
        self.file = self.path.open("ab", buffering=0)  # nothing is kept back that a full disk would refuse later
        if self.live:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.silent:
            return
        self.file.close()
        if self.live:
            self.progress.stop()
        self.trackers.finish()

    def step(self, step: int, metrics: dict[str, Any], note: str = "") -> None:
        """Record the metrics of step `step` (1 is the first); `note` is the short text beside the bar."""
        if self.silent:
            return
        metrics = {key: _plain(value) for key, value in metrics.items()}
        if os.fstat(self.file.fileno()).st_nlink == 0:
            raise UserError(f"{self.path} was deleted while the run wrote to it; stopped after step {step}")
        with named(self.path):
            write_whole(self.file, (dumps({"step": step} | metrics) + "\n").encode())
        numbers = {key: x for key, x in metrics.items() if isinstance(x, (int, float)) and math.isfinite(x)}
        self.trackers.log(numbers, step)
        self.progress.update(self.task, completed=step, note=note)
        if not self.live and (step % self.every == 0 or step == self.total):
            print(f"{self.description} {step}/{self.total}  {note}", file=sys.stderr, flush=True)

    def completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Keep sample completions: a line each in completions.jsonl, and a table in the trackers."""
        if self.silent:
            return
        self._append("completions.jsonl", [{"step": step, **row} for row in rows])
        if rows:
            self.trackers.table("completions", rows, step)

    def alert(self, step: int, record: dict[str, Any], title: str, message: str) -> None:
        """Say the message above the bar, keep the record in alerts.jsonl, and raise an alert in the trackers."""
        if self.silent:
            return
        self.say(message)
        self._append("alerts.jsonl", [{"step": step, **record}])
        self.trackers.alert(title, message, step)

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        path = self.folder / name
        with named(path), path.open("ab", buffering=0) as file:
            write_whole(file, "".join(dumps(record, ensure_ascii=False) + "\n" for record in records).encode())

    def say(self, message: str) -> None:
        """A line above the bar."""
        if not self.silent:
            self.console.print(message, highlight=False, markup=False)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _keep_until(path: Path, start: int) -> None:
    """Drop the lines of steps after `start`: what a killed run wrote beyond its last checkpoint comes again."""
    if path.exists():
        records = read_records(path)
        replace_lines(path, [r for r in records if isinstance(r.get("step"), int) and r["step"] <= start])


def replace_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew: a process killed here leaves the old file or the new one, whole."""
    write_text(path, "".join(dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, [] if there is none. A line that a kill cut short is passed over."""
    records = []
    # Not splitlines(): a text may hold U+2028 and the like, which JSON lets stand in a string.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, in order, null as NaN; [] if there is none. A line cut short by a kill is left out.

    Raises:
        OSError: it cannot be read.
    """
    records = read_records(Path(output_dir) / "metrics.jsonl")
    whole = [record for record in records if isinstance(record.get("step"), int)]
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in whole]
