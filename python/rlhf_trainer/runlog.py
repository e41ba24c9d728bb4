"""What a run shows and keeps: a progress bar with ETA, metrics.jsonl, TensorBoard scalars and completions."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """Context manager around a stage's loop.

    `step(step, metrics)` appends one JSON object to metrics.jsonl, writes TensorBoard scalars and moves the bar. With
    `start` > 0 (a resumed run) lines of steps that will be repeated are dropped first.
    """

    def __init__(
        self, output_dir: str | Path, total: int, description: str, *, start: int = 0, tensorboard: bool = True
    ) -> None:
        self.folder = Path(output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        _keep_until(self.path, start)
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
        self.writer = _tensorboard(self.folder) if tensorboard else None
        self.every = max(1, total // 10)  # without a terminal: about ten plain lines

    def __enter__(self) -> RunLog:
        self.file = self.path.open("a", encoding="utf-8")
        if self.live:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.live:
            self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def step(self, step: int, metrics: dict[str, Any], note: str = "") -> None:
        """Record the metrics of step `step` (1 is the first); `note` is the short text beside the bar."""
        self.file.write(json.dumps({"step": step} | {key: _plain(value) for key, value in metrics.items()}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for key, value in metrics.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self.writer.add_scalar(key, value, step)
        self.progress.update(self.task, completed=step, note=note)
        if not self.live and (step % self.every == 0 or step == self.total):
            print(f"{self.description} {step}/{self.total}  {note}", file=sys.stderr, flush=True)

    def completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Keep sample completions: a line each in completions.jsonl, and a table in TensorBoard."""
        with (self.folder / "completions.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        if self.writer is not None and rows:
            head = "|".join(rows[0])
            lines = [
                "|".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row.values()) for row in rows
            ]
            self.writer.add_text("completions", "\n".join([head, "|".join(["---"] * len(rows[0])), *lines]), step)

    def say(self, message: str) -> None:
        """A line above the bar."""
        self.console.print(message, highlight=False, markup=False)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _keep_until(path: Path, start: int) -> None:
    """Drop the lines of steps after `start`: what a killed run wrote beyond its last checkpoint comes again."""
    if not path.exists():
        return
    kept = [json.dumps(metrics) + "\n" for metrics in read_metrics(path.parent) if metrics["step"] <= start]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, in order; [] if there is none. A line that a kill cut short is passed over."""
    path = Path(output_dir) / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
