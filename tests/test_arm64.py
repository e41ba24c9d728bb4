"""The native sources for arm64: warnings are errors, and the kernels run under qemu print what this machine's do.

Skipped where there is no cross compiler: apt-get install g++-aarch64-linux-gnu qemu-user-static
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc"
DRIVER = Path(__file__).parent / "arm64" / "kernels.cpp"
FAMILIES = sorted(path for path in (SOURCES / "cpu").glob("*.cpp") if path.stem not in ("isa", "parallel"))
CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
# As CMakeLists.txt has them.
KERNEL_FLAGS = ["-DRK_ISA=baseline", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
KERNEL_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# A fused multiply-add rounds once where x86-64-v2 rounds twice; a scan of 37 steps carries that along.
TOLERANCE = 5e-6

pytestmark = pytest.mark.skipif(CROSS is None, reason="no aarch64-linux-gnu-g++")


def _compile(compiler: str, *arguments: str | Path) -> None:
    command = [compiler, "-std=c++17", "-fPIC", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"


def _program(compiler: str, folder: Path, *flags: str) -> Path:
    """The driver with every kernel, all built with `flags`."""
    folder.mkdir()
    for source in (*FAMILIES, DRIVER):
        _compile(compiler, *KERNEL_FLAGS, *flags, "-c", source, "-o", folder / f"{source.stem}.o")
    # Both sets of sources have a stem of their own; static, so that qemu needs no arm64 libraries.
    _compile(compiler, "-static", *folder.glob("*.o"), "-o", folder / "kernels")
    return folder / "kernels"


def _python_config(folder: Path) -> None:
    """Debian's Python.h asks for a pyconfig.h of the compiler's machine; this machine's has the same sizes."""
    headers, multiarch = Path(sysconfig.get_path("include")), sysconfig.get_config_var("MULTIARCH")
    here = headers.parent / str(multiarch) / headers.name / "pyconfig.h"
    if here.exists():
        there = folder / "aarch64-linux-gnu" / headers.name
        there.mkdir(parents=True)
        (there / "pyconfig.h").write_text(f'#include "{here}"\n')


def test_bindings_and_the_rest_compile(tmp_path: Path) -> None:
    _python_config(tmp_path)
    asked = subprocess.run([sys.executable, "-m", "pybind11", "--includes"], capture_output=True, text=True, check=True)
    bindings = sorted((SOURCES / "bind").glob("*.cpp"))
    assert len(bindings) == len(FAMILIES)
    for source in (SOURCES / "cpu" / "isa.cpp", SOURCES / "cpu" / "parallel.cpp", SOURCES / "bindings.cpp", *bindings):
        # Nothing is run.
        _compile(CROSS, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{tmp_path}", *asked.stdout.split(), source)


def test_kernels_compute_what_they_do_here(tmp_path: Path) -> None:
    arm = _program(CROSS, tmp_path / "arm64", "-Wall", "-Wextra", "-Werror", "-O1")
    if QEMU is None:
        pytest.skip("the kernels compile; no qemu-aarch64 to run them")
    host = _program("g++", tmp_path / "host", "-w", "-O1")
    printed = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for command in ([QEMU, arm], [host])
    ]
    assert len(printed[0]) > 10_000
    for ours, theirs in zip(*printed, strict=True):
        *name, x = ours.split()
        *same_name, y = theirs.split()
        assert name == same_name
        assert math.isclose(float(x), float(y), rel_tol=TOLERANCE, abs_tol=TOLERANCE), (ours, theirs)
