"""Who may import whom: the rule of CONTRIBUTING.md, read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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


# The trainer's floors, lowest first. A module imports from its own wing and from those below.
WINGS = ("base", "reports", "data", "models", "sampling", "judging", "labelling", "worlds", "training", "onpolicy")
WINGS += ("constitutional",)
COMMANDS = {"init", "generate", "label", "prefs", "sft", "reward", "dpo", "bon", "ppo", "cai", "eval"}
FLOORS = [*({wing} for wing in WINGS), COMMANDS, {"verification"}, {"verify"}, {"demo"}, {"cli"}, {"__main__"}]
MOST_MODULES = 14  # a wing; the top level, one file a command, is none
PACKAGE = "rlhf_trainer"


def _floor(module: str) -> int:
    room = module.split(".")[1]
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def _trainer_imports(source: Path) -> dict[str, set[str]]:
    """Module -> the trainer's modules that it imports, lazily and for type checkers alone too; without the package."""
    paths = {path: path.relative_to(source).with_suffix("") for path in sorted((source / PACKAGE).rglob("*.py"))}
    names = {path: ".".join(relative.parts).removesuffix(".__init__") for path, relative in paths.items()}
    modules = set(names.values())
    found: dict[str, set[str]] = {}
    for path, module in names.items():
        if module == PACKAGE:  # it names its modules and imports none
            continue
        imported = (name for name in _imports(path) if name.split(".")[0] == PACKAGE)
        targets = {name if name in modules else name.rpartition(".")[0] for name in imported}
        assert targets <= modules, f"{module}: {sorted(targets - modules)}"
        assert PACKAGE not in targets, f"{module} takes a name from the package, whose own modules stand above it"
        found[module] = targets - {module}
    return found


def _upward(imports: dict[str, set[str]]) -> list[str]:
    """Imports that go up, or from one command to another (demo apart, which stands above them)."""
    return [
        f"{module} -> {target}"
        for module, targets in imports.items()
        for target in targets
        if _floor(target) > _floor(module) or (_floor(target) == _floor(module) and module.split(".")[1] in COMMANDS)
    ]


def _circles(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, directly or through others."""
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_the_trainers_imports_go_down_and_in_no_circle() -> None:
    imports = _trainer_imports(ROOT / "python")
    assert len(imports) > 70
    assert not _upward(imports)
    assert not _circles(imports)


def test_no_wing_of_the_trainer_is_crowded() -> None:
    for wing in (ROOT / "python" / PACKAGE).iterdir():
        if wing.is_dir() and wing.name != "__pycache__":
            assert {wing.name} in FLOORS, f"{wing.name} has no floor"
            modules = [path.name for path in wing.glob("*.py") if path.name != "__init__.py"]
            assert len(modules) <= MOST_MODULES, f"{wing.name} has {len(modules)} modules: {modules}"


@pytest.mark.parametrize(
    ("files", "upward", "circle"),
    [
        ({"data/a.py": "from rlhf_trainer.base.b import f", "base/b.py": ""}, 0, False),
        ({"data/a.py": "", "base/b.py": "def f():\n    from rlhf_trainer.data import a"}, 1, False),
        ({"data/a.py": "", "base/b.py": "if TYPE_CHECKING:\n    from rlhf_trainer.data.a import A"}, 1, False),
        ({"sft.py": "from rlhf_trainer.dpo import f", "dpo.py": ""}, 1, False),
        ({"data/a.py": "from rlhf_trainer.data.b import f", "data/b.py": "from rlhf_trainer.data import a"}, 0, True),
        ({"demo.py": "from rlhf_trainer.sft import run", "sft.py": ""}, 0, False),
    ],
    ids=["down", "up, lazily", "up, for types", "between commands", "circle", "demo"],
)
def test_a_wrong_import_of_the_trainer_is_found(
    files: dict[str, str], upward: int, circle: bool, tmp_path: Path
) -> None:
    for name, text in {"__init__.py": "", "data/__init__.py": "", "base/__init__.py": "", **files}.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    imports = _trainer_imports(tmp_path)
    assert len(_upward(imports)) == upward
    assert bool(_circles(imports)) == circle


def test_the_kernels_do_not_know_the_trainer() -> None:
    for path in (ROOT / "rlhf_kernels").rglob("*.py"):
        assert not [name for name in _imports(path) if name.split(".")[0] == "rlhf_trainer"], path


def test_a_breach_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import math\nimport torch.nn\ndef f():\n    from rlhf_kernels.ops import logits\n")
    assert _breaches(path, {"torch"}) == ["rlhf_kernels.ops.logits"]


def _borrowed(tests: Path) -> list[str]:
    """What files under `tests` import from test files or a conftest, as `file: name`."""
    lenders = {path.stem for path in tests.rglob("*.py") if _collected(path)}
    return [
        f"{path.relative_to(tests)}: {name}"
        for path in sorted(tests.rglob("*.py"))
        for name in _imports(path)
        if lenders & set(name.split("."))
    ]


def _collected(path: Path) -> bool:
    return path.name.startswith("test_") or path.name == "conftest.py"


def test_no_test_file_imports_another() -> None:
    """Nor does a helper: what several files need is a module of tests/support, and no helper lies elsewhere."""
    tests = ROOT / "tests"
    assert not _borrowed(tests), "move what is shared into a module of tests/support"
    helpers = [path.relative_to(tests) for path in tests.rglob("*.py") if not _collected(path)]
    assert len(helpers) > 20
    assert not [str(path) for path in helpers if path.parts[0] != "support"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import test_a", True),
        ("def f():\n    import test_a as a", True),
        ("from test_a import check", True),
        ("from trainer import test_a", True),
        ("from tests.trainer.test_a import check", True),
        ("from conftest import Backend", True),
        ("from support.checks.scan import check\nimport testing", False),
    ],
)
def test_a_borrowed_name_is_found(text: str, found: bool, tmp_path: Path) -> None:
    for name, content in {"conftest.py": "", "trainer/test_a.py": "", "support/b.py": text}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    assert bool(_borrowed(tmp_path)) == found
