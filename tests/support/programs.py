"""Runs the modules of this folder that are programs, each in a process of its own, which may die."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]  # where `support` is found
PATIENCE = 600  # seconds


def run(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m support.MODULE ARGUMENT...`, in this process's environment unless another is given."""
    return subprocess.run(
        [sys.executable, "-m", f"support.{module}", *arguments],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
