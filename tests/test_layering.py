"""Who may import whom: the rule of CONTRIBUTING.md, read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf_kernels as rk

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {*rk.__all__, "__version__"}
# Folder or file -> what it may import besides the standard library and itself, as prefixes of dotted names.
ALLOWED = {
    "rlhf_kernels/reference/": {"torch", "rlhf_kernels.reference"},
    "rlhf_kernels/ops/": {"torch", "rlhf_kernels.ops", "rlhf_kernels.reference", "rlhf_kernels.dispatch"},
    "rlhf_kernels/dispatch.py": {"torch", "rlhf_kernels.backends"},
    "rlhf_kernels/backends/cpu/": {"torch", "rlhf_kernels._native", "rlhf_kernels.backends.cpu"},
    "rlhf_kernels/backends/cuda/": {"torch", "rlhf_kernels._cuda", "rlhf_kernels.backends.cuda"},
    "rlhf_kernels/backends/triton/": {"torch", "triton", "rlhf_kernels.backends.triton"},
    "rlhf_kernels/backends/__init__.py": set(),
}


def _imports(path: Path) -> Iterator[str]:
    """Every imported dotted name, as far down as the source says: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _breaches(path: Path, allowed: set[str]) -> list[str]:
    def fine(name: str) -> bool:
        top = name.split(".")[0]
        return top in sys.stdlib_module_names or any(name == a or name.startswith(a + ".") for a in allowed)

    return [name for name in _imports(path) if not fine(name)]


@pytest.mark.parametrize("place", ALLOWED)
def test_layers_of_the_kernels(place: str) -> None:
    target = ROOT / place
    files = sorted(target.rglob("*.py")) if place.endswith("/") else [target]
    assert files
    breaches = {str(path.relative_to(ROOT)): _breaches(path, ALLOWED[place]) for path in files}
    assert not {path: names for path, names in breaches.items() if names}


def test_every_file_of_the_backends_has_a_rule() -> None:
    covered = {path for place in ALLOWED for path in [ROOT / place, *(ROOT / place).rglob("*.py")]}
    assert set((ROOT / "rlhf_kernels" / "backends").rglob("*.py")) <= covered


def test_the_trainer_uses_public_names_only() -> None:
    """Both `from rlhf_kernels import gae` and `rk.gae`, whatever the module is called."""
    files = sorted((ROOT / "python" / "rlhf_trainer").rglob("*.py"))
    assert files
    breaches = []
    for path in files:
        tree = ast.parse(path.read_text())
        aliases = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == "rlhf_kernels"
        }
        used = [name.removeprefix("rlhf_kernels.") for name in _imports(path) if name.startswith("rlhf_kernels.")]
        used += [
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
        ]
        breaches += [f"{path.name}: {name}" for name in used if name not in PUBLIC]
    assert not breaches


def test_the_kernels_do_not_know_the_trainer() -> None:
    for path in (ROOT / "rlhf_kernels").rglob("*.py"):
        assert not [name for name in _imports(path) if name.split(".")[0] == "rlhf_trainer"], path


def test_a_breach_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import math\nimport torch.nn\ndef f():\n    from rlhf_kernels.ops import logits\n")
    assert _breaches(path, {"torch"}) == ["rlhf_kernels.ops.logits"]
