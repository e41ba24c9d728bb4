"""`--report_to`: the experiment trackers of accelerate (TensorBoard, wandb, trackio and others) behind one face."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState, tracking

from rlhf_trainer.base.errors import UserError

PROJECT = "rlhf"  # in wandb and trackio, where WANDB_PROJECT or TRACKIO_PROJECT does not name another


def chosen_trackers(names: Sequence[str]) -> list[str]:
    """The trackers that --report_to asks for; UserError for one that accelerate does not know or cannot import.

    TensorBoard, which is the default, is passed over where it is not installed.
    """
    if "none" in names:
        if len(names) > 1:
            raise UserError("--report_to none: nothing else goes with it")
        return []
    known, installed = set(tracking.LOGGER_TYPE_TO_CLASS), {str(name) for name in tracking.get_available_trackers()}
    own = known - {str(name) for name in tracking.LoggerType}  # registered with accelerate by the user
    for name in names:
        if name not in known:
            raise UserError(f"--report_to {name}: it takes none, {', '.join(sorted(known))}")
        if name not in installed | own | {"tensorboard"}:
            raise UserError(f"--report_to {name}: the package is not installed; `pip install {name}` installs it")
    return [name for name in dict.fromkeys(names) if name in installed | own]


class Trackers:
    """The trackers of one run; every method reaches all of them. None are an offline run's."""

    def __init__(
        self, names: Sequence[str], folder: Path, options: Mapping[str, Any] | None = None, start: int = 0
    ) -> None:
        """start: steps done before a resumed run; what an earlier process has reported after them is taken back."""
        self.trackers = [_start(name, folder, start) for name in chosen_trackers(names)]
        values = {key: _plain(value) for key, value in (options or {}).items()}
        for tracker in self.trackers:
            if tracker.name == "tensorboard":  # its hyperparameters would be a run of their own beside this one
                tracker.log({"config": markdown([{"option": key, "value": value} for key, value in values.items()])})
            else:
                tracker.store_init_configuration(values)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(dict(metrics), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Rows with the same keys as a table; where a tracker has none, as Markdown."""
        columns, cells = list(rows[0]), [list(row.values()) for row in rows]
        for tracker in self.trackers:
            if hasattr(tracker, "log_table"):
                tracker.log_table(name, columns=columns, data=cells, step=step)
            elif tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Table(columns=columns, data=cells)}, step=step)
            else:
                tracker.log({name: markdown(rows)}, step=step)

    def alert(self, title: str, text: str, step: int) -> None:
        """As an alert where the tracker has them (wandb and trackio notify whom they are told to), else as text."""
        for tracker in self.trackers:
            if tracker.name == "wandb":
                tracker.tracker.alert(title=title, text=text)
            elif tracker.name == "trackio":
                import trackio

                trackio.alert(title, text)
            else:
                tracker.log({"alert": f"{title}\n\n{text}"}, step=step)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def _start(name: str, folder: Path, start: int) -> Any:
    """The run's tracker; its files, if it has any, go to `folder`."""
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
    options = {"wandb": {"name": str(folder), "dir": str(folder)}, "trackio": {"name": str(folder)}}.get(name, {})
    PartialState()  # the trackers ask it which process is the main one
    try:
        if name == "tensorboard":
            if start == 0:  # else TensorBoard draws an earlier run of this folder and this one as one
                for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                    old.unlink()
            resumed = {"purge_step": start + 1} if start else {}
            tracker = kind("tensorboard", str(folder), **resumed)  # <folder>/tensorboard
        else:
            tracker = kind(project, *([str(folder)] if kind.requires_logging_directory else []), **options)
        tracker.start()
    except Exception as error:  # each package has errors of its own, such as of a login that is missing
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--report_to {name}: it could not be started: {reason[0]}") from error
    return tracker


def _plain(value: Any) -> Any:
    """What every tracker takes as a hyperparameter."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    if not rows:
        return ""
    lines = ["|".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row.values()) for row in rows]
    return "\n".join(["|".join(rows[0]), "|".join(["---"] * len(rows[0])), *lines])
