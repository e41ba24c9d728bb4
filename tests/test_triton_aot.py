"""Every Triton kernel compiles for four GPUs without spilling, and once for all batches, lengths and scalars."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from support import programs
from support.backends import require_backend

ROOT = Path(__file__).resolve().parents[1]


def targets() -> Iterator[ParameterSet]:
    """One in every run, the others in the sweep: each takes half a minute where nothing is cached."""
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        yield pytest.param(target, marks=[] if target == "sm_90" else pytest.mark.sweep)


def rows(*targets: str) -> list[dict]:
    """What tests/support/triton_aot.py prints; a process of its own, because here Triton is set to interpret."""
    require_backend("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = programs.run("triton_aot", *targets, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", list(targets()))
def test_no_kernel_spills(target: str) -> None:
    usage = [row for row in rows(target) if "target" in row]
    print()
    for row in usage:
        print(f"{row['target']:7} {row['kernel']:30} {row['case']:30} {row['registers']:4} registers", end="")
        print(f", {row['spilled']} spilled")
    sources = [path.read_text() for path in (ROOT / "rlhf_kernels/backends/triton").glob("*.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE)}
    assert len(kernels) > 15
    assert {(row["target"], row["kernel"]) for row in usage} == {(target, kernel) for kernel in kernels}
    assert [row for row in usage if row["spilled"]] == []


def test_batch_length_and_scalars_share_one_compilation() -> None:
    repeated = [row for row in rows() if "repeated" in row]
    assert len(repeated) > 5
    for row in repeated:
        versions = dict(row["versions"])
        if "_block_sums_kernel" in versions:
            versions["_block_sums_kernel"] -= 1  # one call runs it without a threshold, then with one
        assert set(versions.values()) == {1}, row
