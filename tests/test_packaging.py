"""What is built, when, and what it needs: no torch to build, no compiler to install, torch alone to import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rlhf_kernels as rk

ROOT = Path(__file__).resolve().parents[1]
# Where cmake and ninja are after `pip install .[dev]`, also if nobody activated the environment.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
BUILD = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
# An editable install would answer for every submodule that the unpacked wheel lacks.
WITHOUT_EDITABLE = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')];"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, as a fresh clone has them."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("csrc", "rlhf_kernels", "python"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "setup.py", ROOT / "CMakeLists.txt"]:
        shutil.copy(path, copy)
    return copy


def _build(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {name: value for name, value in os.environ.items() if name not in ("CXX", "RLHF_KERNELS_NO_NATIVE")}
    merged |= {"PATH": TOOLS, **environment}
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, env=merged, capture_output=True, text=True, check=False
    )


def _pure_wheel(done: subprocess.CompletedProcess[str], out: Path, reason: str) -> zipfile.ZipFile:
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"pure-Python build, no native CPU kernels: {reason}" in done.stderr
    (wheel,) = out.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert "rlhf_kernels/__init__.py" in names
    assert "rlhf_trainer/cli.py" in names
    assert "rlhf_trainer/constitutional/constitution.yaml" in names
    assert not [name for name in names if name.endswith(".so")]
    return archive


def test_no_native_wheel_works_through_the_reference(source: Path, tmp_path: Path) -> None:
    done = _build(source, tmp_path, RLHF_KERNELS_NO_NATIVE="1")
    archive = _pure_wheel(done, tmp_path, "RLHF_KERNELS_NO_NATIVE is set")
    archive.extractall(tmp_path / "installed")
    program = WITHOUT_EDITABLE + (
        "import torch, rlhf_kernels as rk; rk.info();"
        "print(rk.selected_logprobs(torch.zeros(1, 8), torch.zeros(1, dtype=torch.long)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "backend cpu: the native module was not built" in done.stdout
    assert "op selected_logprobs: cpu tensors by reference" in done.stdout
    assert "-2.0794" in done.stdout  # -log 8


def test_no_compiler_says_so(source: Path, tmp_path: Path) -> None:
    done = _build(source, tmp_path, PATH=str(tmp_path))
    _pure_wheel(done, tmp_path, "no C++ compiler found")


@pytest.mark.skipif(
    shutil.which("cmake", path=TOOLS) is None, reason="cmake is a build requirement, not one of the package"
)
def test_a_compiler_that_fails_is_an_error(source: Path, tmp_path: Path) -> None:
    done = _build(source, tmp_path, CXX=shutil.which("false") or "false")
    assert done.returncode != 0
    assert "RLHF_KERNELS_NO_NATIVE=1" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_kernels_without_a_binding_are_named(source: Path, tmp_path: Path) -> None:
    (source / "csrc" / "cpu" / "extra.cpp").touch()
    try:
        done = _build(source, tmp_path)
    finally:
        (source / "csrc" / "cpu" / "extra.cpp").unlink()
    assert done.returncode != 0
    assert "csrc/bind/extra.cpp is missing: csrc/cpu/extra.cpp has kernels" in " ".join(done.stderr.split())


def test_native_sources_include_no_torch_header() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 5
    includes = [line for path in files for line in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())]
    assert "pybind11/pybind11.h" in includes
    assert not [name for name in includes if re.match(r"(torch|ATen|c10|caffe2|TH)\b", name)]
    requires = re.search(r"^requires = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert "torch" not in requires


def test_import_needs_torch_alone() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import rlhf_kernels;"
        "print(*sorted({n.split('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rlhf_kernels"]


def test_one_version() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert rk.__version__ == version
