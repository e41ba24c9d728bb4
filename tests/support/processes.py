"""Processes of their own for tests, forked from one that has imported the stages: that takes seconds of a core each."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_trainer.cli import main

PATIENCE = 600  # seconds, on a machine that does much else meanwhile
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([f"rlhf_trainer.{stage}" for stage in ("ppo", "sft", "reward", "dpo")])


class Forked:
    """`function(*arguments)` in a process of its own, which ends as a command would: with its number or SystemExit's.

    environment: set there before anything else. What it writes to stdout and stderr comes to lie in `folder`.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, folder: Path, **environment: str) -> None:
        self.paths = [folder / f"{number}.txt" for number in (1, 2)]
        folder.mkdir(parents=True, exist_ok=True)
        self.process = SERVER.Process(target=_run, args=(function, arguments, environment, self.paths), daemon=True)
        self.process.start()

    def wait(self) -> int:
        """The exit code; that of a signal is negative."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running after {PATIENCE} s: {self.stderr}"
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def stdout(self) -> str:
        return self.paths[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.paths[1].read_text(encoding="utf-8")


def command(*words: Any, folder: Path, **environment: str) -> Forked:
    """`rlhf` with these words."""
    return Forked(main, [str(word) for word in words], folder=folder, **environment)


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], paths: list[Path]
) -> None:
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        sys.exit(function(*arguments))
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # which multiprocessing leaves out
