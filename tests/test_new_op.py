"""A new op with kernels is a few files, each with a step that is easily forgotten: these tests name it.

CMake itself names a csrc/cpu/NAME.cpp without csrc/bind/NAME.cpp (test_packaging.py), and tests/test_native_calls.py a
stub that was not made again.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.backends import require_backend

import rlhf_kernels as rk
from rlhf_kernels import dispatch

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ROOT / "rlhf_kernels" / "backends"
HEADERS = [path for path in (ROOT / "csrc" / "cpu").glob("*.h") if path.with_suffix(".cpp").exists()]
FAMILIES = sorted(path.stem for path in HEADERS if path.stem not in ("isa", "parallel"))
SERVED = [(op, backend) for op, kernels in dispatch.OPS.items() for backend in kernels.backends]
INTERNAL = {"gae_packed"}  # part of a public op, but not every backend of it need have it


def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("op", "backend"), SERVED)
def test_every_backend_has_the_functions_that_the_table_lists(op: str, backend: str) -> None:
    path = BACKENDS / backend / f"{dispatch.OPS[op].file}.py"
    assert path.exists(), f"dispatch.OPS[{op!r}] names {backend}: {path} is missing"
    missing = set(dispatch.OPS[op].functions) - _functions(path)
    assert not missing, f"dispatch.OPS[{op!r}] names {backend}: {path} lacks {missing}"


def test_every_op_of_the_table_is_public() -> None:
    missing = set(dispatch.OPS) - INTERNAL - set(rk.__all__)
    assert not missing, f"rlhf_kernels/__init__.py does not export {missing}"
    unknown = {backend for _, backend in SERVED} - {backend.name for backend in dispatch.BACKENDS}
    assert not unknown, f"dispatch.OPS names {unknown}, which are no backends"


@pytest.mark.parametrize("backend", [backend.name for backend in dispatch.BACKENDS])
def test_the_table_becomes_the_functions_of_the_package(backend: str) -> None:
    require_backend(backend)
    module = dispatch.backend_module(backend)
    for op, name in SERVED:
        if name == backend:
            for function in dispatch.OPS[op].functions:
                assert callable(getattr(module, function)), (op, function)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_of_a_header_is_defined_and_called(family: str) -> None:
    header, source, binding = (
        (ROOT / "csrc" / folder / f"{family}{suffix}").read_text()
        for folder, suffix in (("cpu", ".h"), ("cpu", ".cpp"), ("bind", ".cpp"))
    )
    macro = f"RK_{family.upper()}_KERNELS"
    found = re.search(rf"#define {macro}\(X\)((?:.*\\\n)*.*)\n", header)
    assert found, f"csrc/cpu/{family}.h does not define {macro}"
    kernels = re.findall(r"X\((\w+), \w+\)", found[1])
    assert kernels, f"{macro} lists no kernel"
    assert f"RK_KERNEL_TABLE({macro})" in binding, f"csrc/bind/{family}.cpp lacks RK_KERNEL_TABLE({macro})"
    for kernel in kernels:
        assert re.search(rf"^void {kernel}\(", source, re.MULTILINE), f"csrc/cpu/{family}.cpp lacks {kernel}"
        assert f"kernels().{kernel}" in binding, f"csrc/bind/{family}.cpp never calls {kernel}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_function_of_a_binding_is_called(family: str) -> None:
    binding = (ROOT / "csrc" / "bind" / f"{family}.cpp").read_text()
    functions = re.findall(r"^RK_(?:KEYWORDS|POSITIONS)\(\w+, (\w+),", binding, re.MULTILINE)
    assert functions, f"csrc/bind/{family}.cpp has no RK_KEYWORDS and no RK_POSITIONS"
    callers = "".join(path.read_text() for path in (BACKENDS / "cpu").glob("*.py"))
    for function in functions:
        assert f"_native.{function}(" in callers, f"nothing in {BACKENDS / 'cpu'} calls {function}"
