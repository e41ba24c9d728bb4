"""No kernel touches memory that is not its own, and offsets past 2**31 work; in processes that may die."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import programs
from support.backends import require_backend


def _run(backend: str, where: str) -> int:
    require_backend(backend)
    done = programs.run("guarded_memory", backend, where)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    return int(done.stdout)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("side", ["behind", "before"])
def test_guard_pages(backend: str, side: str) -> None:
    calls = 4 * 3 * 3 + 4 * (3 * 2 + 4) + 4 * 2 * 3 + 2 * 2 * (1 + 7) + 4 * 2 + 4 * 3 + 4 * 3 * 2
    sampling = 4 * 3 * 4 if backend == "cpu" else 2 * 2
    products = 4 * 3 * 3 * 2
    assert _run(backend, side) == calls + sampling + products + 3 * 2


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_offsets_past_31_bits(backend: str) -> None:
    assert _run(backend, "far") == 10


def test_a_guard_page_does_kill() -> None:
    """The instrument itself: reading one element too many is not survived."""
    program = (
        "import torch, ctypes; from support import guarded_memory as g; x = g.guarded(torch.zeros(3), 'behind');"
        "ctypes.string_at(x.data_ptr() + x.nbytes, 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=programs.TESTS, capture_output=True, check=False)
    assert done.returncode == -11, done.stderr
