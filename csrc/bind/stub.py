"""Prints rlhf_kernels/_native.pyi from the module itself: python csrc/bind/stub.py > rlhf_kernels/_native.pyi"""

from __future__ import annotations

import re

from rlhf_kernels import _native

HEAD = """\
# Made by csrc/bind/stub.py from the compiled module: addresses, sizes and strides in elements, 0 for an absent tensor.
"""
LINE = 120  # as ruff formats
# What pybind11 accepts for a C++ number (its spelling differs between versions) -> what the callers pass.
NUMBERS = (("float", "float"), ("Float", "float"), ("bool", "bool"), ("str", "str"), ("", "int"))


def _type(written: str) -> str:
    return next(ours for pattern, ours in NUMBERS if pattern in written)


def stub() -> str:
    """Each function of the module, in alphabetical order."""
    lines = []
    for name in sorted(n for n in dir(_native) if callable(getattr(_native, n)) and not n.startswith("_")):
        signature = str(getattr(_native, name).__doc__).splitlines()[0]
        parsed = re.fullmatch(rf"{name}\((.*)\) -> (.*)", signature)
        if parsed is None:
            raise ValueError(f"{name}: cannot read {signature!r}")
        parameters = []
        for parameter in filter(None, parsed[1].split(", ")):
            named, _, written = parameter.partition(": ")
            parameters.append(f"{named}: {_type(written)}" if written else named)
        line = f"def {name}({', '.join(parameters)}) -> {parsed[2]}: ...\n"
        if len(line) > LINE:
            line = f"def {name}(\n" + "".join(f"    {p},\n" for p in parameters) + f") -> {parsed[2]}: ...\n"
        lines.append(line)
    return HEAD + "".join(lines)


if __name__ == "__main__":
    print(stub(), end="")
