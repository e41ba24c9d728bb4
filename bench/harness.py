"""Interleaved timing in one process, with a record of how busy the machine was meanwhile."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass
class Contender:
    """call is timed, prepare (untimed) runs before each call."""

    call: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass
class Timing:
    """Milliseconds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


@dataclass
class Comparison:
    timings: dict[str, Timing]
    rounds: int
    busy_rounds: int  # repeated, because other processes had more than their share of the cores
    others: float  # share of all cores that other processes had in the rounds that count
    ratios: dict[str, float] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return self.timings[name].median

    def best(self, prefix: str) -> float:
        return min(t.median for name, t in self.timings.items() if name.startswith(prefix))


class OtherProcesses:
    """Share of this machine's cores that neither this process nor its children used, between start and share()."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds that all cores were busy, seconds of this process and of its children that have ended, wall clock."""
        own = os.times()
        try:
            user, nice, system, _, _, irq, softirq, steal = map(
                int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
            )
        except FileNotFoundError:  # not Linux: the load average in the record has to do
            return 0.0, 0.0, time.monotonic()
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(own[:4]), time.monotonic()

    def share(self) -> float:
        busy, own, wall = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))


def compare(
    contenders: Mapping[str, Contender], rounds: int = 15, calls: int = 1, quiet: float = 0.05, patience: int = 8
) -> Comparison:
    """Every contender in turn, `rounds` times over; medians over rounds.

    A round in which other processes used more than `quiet` of the cores is measured again, at most `patience * rounds`
    times in all; after that busy rounds count too. The choice looks at the machine, never at the timings.
    """
    for contender in contenders.values():  # first calls compile, fault pages in and start threads
        for _ in range(2):
            _timed(contender, 1)
    kept: list[tuple[float, dict[str, float]]] = []
    busy = 0
    while len(kept) < rounds:
        machine = OtherProcesses()
        row = {name: _timed(contender, calls) for name, contender in contenders.items()}
        share = machine.share()
        if share > quiet and busy < patience * rounds:
            busy += 1
            continue
        kept.append((share, row))
    timings = {}
    for name in contenders:
        low, median, high = statistics.quantiles([row[name] for _, row in kept], n=4)
        timings[name] = Timing(median, low, high)
    return Comparison(timings, rounds, busy, statistics.mean(share for share, _ in kept))


def _timed(contender: Contender, calls: int) -> float:
    """Milliseconds per call. The result is freed outside the clock, like any other peer's."""
    total = 0.0
    for _ in range(calls):
        if contender.prepare:
            contender.prepare()
        start = time.perf_counter()
        result = contender.call()
        total += time.perf_counter() - start
        del result
    return total / calls * 1e3


def environment() -> dict[str, object]:
    """Hardware, versions and commit, for the record beside the figures."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchrl", "rlhf-kernels")},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip()
