"""What no compiler sees of the native module: that its stub is its own, and that each argument stands in its place.

Most functions take keywords. Those of short calls take positions, and there two addresses in the wrong order would
corrupt memory: this reads the sources of rlhf_kernels/backends/cpu, where each argument must bear its parameter's name.
"""

from __future__ import annotations

import ast
import inspect
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.backends import require_backend

from rlhf_kernels import dispatch

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "rlhf_kernels" / "_native.pyi"
CALLERS = sorted((ROOT / "rlhf_kernels" / "backends" / "cpu").glob("*.py"))
FUNCTIONS = {node.name: node.args for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)}
POSITIONAL = {name: [a.arg for a in args.posonlyargs] for name, args in FUNCTIONS.items() if args.posonlyargs}
KEYWORDS = {name: {a.arg for a in args.kwonlyargs} for name, args in FUNCTIONS.items() if args.kwonlyargs}


def _name(node: ast.expr) -> str:
    """The parameter that an expression is meant for: `x` and x's address x, its stride x_stride, its dtype x_dtype."""
    match node:
        case ast.Name(id=name):
            return name
        case (
            ast.IfExp(body=ast.Constant(value=0), orelse=present)
            | ast.IfExp(body=present, orelse=ast.Constant(value=0))
        ):
            return _name(present)
        case ast.Subscript(value=ast.Name(id="DTYPES"), slice=ast.Name(id=name)):
            return name
        case ast.Subscript(value=ast.Name(id="DTYPES"), slice=ast.Attribute(value=ast.Name(id=tensor), attr="dtype")):
            return f"{tensor}_dtype"
        case ast.Call(func=ast.Name(id="address" | "float"), args=[inner]):
            return _name(inner)
        case ast.Call(func=ast.Attribute(value=ast.Name(id=tensor), attr=method)):
            called = f"{tensor}.{method}({', '.join(map(ast.unparse, node.args))})"
            meanings = {
                f"{tensor}.data_ptr()": tensor,
                f"{tensor}.numel()": "size",
                f"{tensor}.stride(0)": f"{tensor}_stride",
                f"{tensor}.element_size()": f"{tensor}_bytes",
                "torch.get_num_threads()": "threads",
            }
            if called in meanings:
                return meanings[called]
    raise AssertionError(
        f"cannot tell which parameter {ast.unparse(node)!r} is meant for: put it into a variable first"
    )


def _names(call: ast.Call) -> Iterator[str]:
    for argument in call.args:
        match argument:
            case ast.Starred(value=ast.Call(func=ast.Name(id="_matrix"), args=[ast.Name(id=tensor)])):
                yield from (tensor, f"{tensor}_dtype", f"{tensor}_stride")
            case _:
                yield _name(argument)


def _calls(source: str) -> list[tuple[str, ast.Call]]:
    """The calls of the native module's functions."""
    return [
        (node.func.attr, node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "_native"
    ]


def _mismatches(source: str) -> list[str]:
    """Arguments of calls by position that do not bear their parameter's name."""
    found = []
    for function, call in _calls(source):
        if function not in POSITIONAL:
            continue
        assert not call.keywords, function
        parameters = POSITIONAL[function]
        # The only dtype of a function, which all its tensors share, is named after none of them.
        shared = [p for p in parameters if p.endswith("dtype")] == ["dtype"]
        given = ["dtype" if shared and name.endswith("_dtype") else name for name in _names(call)]
        if len(given) != len(parameters):
            found.append(f"{function} takes {len(parameters)} arguments, not {len(given)}")
        found += [f"{function}: {a} where {b} belongs" for a, b in zip(given, parameters, strict=False) if a != b]
    return found


@pytest.mark.parametrize("path", CALLERS, ids=lambda path: path.stem)
def test_every_argument_stands_at_its_parameter(path: Path) -> None:
    assert _mismatches(path.read_text()) == []


def test_every_function_by_position_is_read_and_has_no_name_twice() -> None:
    called = {name for path in CALLERS for name, _ in _calls(path.read_text())}
    assert set(POSITIONAL) <= called
    assert {"gae", "policy_loss", "value_loss", "per_token_kl_fwd", "whiten_bwd"} <= set(POSITIONAL)
    assert all(len(set(parameters)) == len(parameters) for parameters in POSITIONAL.values())


def test_any_two_arguments_that_change_places_are_found() -> None:
    """In each call by position, each pair of neighbours and the two ends, in the sources as they are."""
    tried = 0
    for path in CALLERS:
        for function, call in _calls(path.read_text()):
            if function not in POSITIONAL:
                continue
            for i in range(len(call.args)):
                swapped = list(call.args)
                swapped[i], swapped[i - 1] = swapped[i - 1], swapped[i]
                text = ast.unparse(ast.Call(func=call.func, args=swapped, keywords=[]))
                assert _mismatches(text), text
                tried += 1
    assert tried > 100


def test_what_a_matrix_hands_over() -> None:
    require_backend("cpu")
    from rlhf_kernels.backends.cpu import losses

    x = torch.zeros(3, 5, dtype=torch.bfloat16)[:, :4]
    assert losses._matrix(x) == (x.data_ptr(), losses.DTYPES[torch.bfloat16], 5)


@pytest.mark.parametrize("function", KEYWORDS)
def test_long_calls_take_keywords_alone(function: str) -> None:
    require_backend("cpu")
    native = dispatch.backend_module("cpu")._native
    with pytest.raises(TypeError, match="incompatible function arguments"):
        getattr(native, function)(*[0] * len(KEYWORDS[function]))


def test_which_functions_take_keywords() -> None:
    families = ("full_kl", "linear", "matmul", "online_softmax", "selected_logprobs", "sample_tokens")
    for name in FUNCTIONS:
        assert (name in KEYWORDS) == name.startswith(families), name


def test_the_stub_is_that_of_the_module() -> None:
    require_backend("cpu")
    made = runpy.run_path(str(ROOT / "csrc" / "bind" / "stub.py"))["stub"]()
    assert made == STUB.read_text(), "python csrc/bind/stub.py > rlhf_kernels/_native.pyi"
    assert inspect.isbuiltin(dispatch.backend_module("cpu")._native.gae)
