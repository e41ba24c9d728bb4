"""No kernel touches memory that is not its own, and offsets past 2**31 work; in processes that may die."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_backend


def _run(backend: str, where: str) -> int:
    require_backend(backend)
    command = [sys.executable, str(Path(__file__).with_name("guarded_memory.py")), backend, where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    return int(done.stdout)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("side", ["behind", "before"])
def test_guard_pages(backend: str, side: str) -> None:
    calls = 4 * 3 * 3 + 4 * (3 * 2 + 4) + 4 * 2 * 3 + 2 * 2 * (1 + 7) + 4 * 2 + 4 * 3 + 4 * 3 * 2
    sampling = 4 * 3 * 4 if backend == "cpu" else 2 * 2
    assert _run(backend, side) == calls + sampling + 3 * 2


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_offsets_past_31_bits(backend: str) -> None:
    assert _run(backend, "far") == 10


def test_a_guard_page_does_kill() -> None:
    """The instrument itself: reading one element too many is not survived."""
    program = (
        "import guarded_memory as g, torch, ctypes; x = g.guarded(torch.zeros(3), 'behind');"
        "ctypes.string_at(x.data_ptr() + x.nbytes, 1)"
    )
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, check=False)
    assert done.returncode == -11, done.stderr
