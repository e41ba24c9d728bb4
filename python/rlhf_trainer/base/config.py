"""Configs: one dataclass a stage, filled from its defaults, then a YAML file, then the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError

C = TypeVar("C")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the text that --help shows; `default` may be a list."""
    metadata = {"help": help.replace("%", "%%"), **metadata}  # argparse fills in %(default)s
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(message)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parser_for(config: type[C], prog: str, summary: str, example: str = "") -> HfArgumentParser:
    options: Any = config
    return _Parser(
        options,
        prog=prog,
        description=f"{summary}\n\nOptions come from --config FILE.yaml (the same keys) and from here; here wins.",
        epilog=example and f"example:\n  {example}",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def parse_config(config: type[C], argv: list[str], prog: str = "rlhf", summary: str = "", example: str = "") -> C:
    """An instance of `config` from `--config file.yaml` and `--key value`.

    Raises UserError for an unknown key (with the nearest known one), a value of the wrong type, an unreadable file.
    """
    parser = parser_for(config, prog, summary, example)
    parser.add_argument("--config", metavar="FILE.yaml", default=None, help="YAML file with any of these options")
    known = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    several = {action.dest for action in parser._actions if action.nargs == "+"}
    arguments, path = _take_config(argv)
    from_file = [] if path is None else _yaml_arguments(path, known, several)
    (parsed, rest) = parser.parse_known_args([*from_file, *arguments])
    if rest:
        if not rest[0].startswith("-"):
            raise UserError(f"{rest[0]!r} belongs to no option; --help lists them all")
        raise UserError(unknown(rest[0].lstrip("-").split("=")[0], known, "option --"))
    values = {key: value for key, value in vars(parsed).items() if key in known}
    return config(**values)


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    taker = _Parser((), add_help=False, allow_abbrev=False)
    taker.add_argument("--config")
    taken, rest = taker.parse_known_args(argv)
    return rest, taken.config


def _yaml_arguments(path: str, known: list[str], several: Collection[str]) -> list[str]:
    """The file's keys as command-line arguments, so that both go through the same checks.

    several: the keys that take a list.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected `key: value` lines")
    written = [str(key.value) for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    repeated = next((name for name in written if written.count(name) > 1), None)
    if repeated is not None:  # YAML would silently take the last one
        raise UserError(f"{path}: {repeated} is there twice")
    arguments: list[str] = []
    for key, value in content.items():
        key = str(key).replace("-", "_")  # as on the command line, where both are taken
        if key not in known:
            raise UserError(f"{path}: {unknown(key, known, 'key ')}")
        if value is None or value == []:  # not given
            continue
        if isinstance(value, dict) or (isinstance(value, list) and key not in several):
            wanted = "a list" if key in several else "one value"
            raise UserError(f"{path}: {key} takes {wanted}, not a {type(value).__name__}")
        # One word with "=", so that a value such as "--end" is not taken for an option.
        arguments += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return arguments


def unknown(key: str, known: Sequence[str], kind: str, otherwise: str = "--help lists them all") -> str:
    """What to say of a name that is not known: the nearest one, or `otherwise` where none is near."""
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"unknown {kind}{key}; " + (f"did you mean {near[0]}?" if near else otherwise)


def save_config(cfg: Any, folder: str | Path, name: str = "config_resolved.yaml") -> None:
    """Write every option's value as YAML, so that `--config` on it repeats the run."""
    values = {key: value for key, value in dataclasses.asdict(cfg).items() if not callable(value)}
    save_options(values, Path(folder) / name)


def save_options(values: dict[str, Any], path: Path) -> None:
    """Write options as YAML, from rank 0 alone. A process killed here leaves the old file or the new one, whole."""
    if not distributed_context().main:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    temporary.replace(path)


def require(cfg: Any, *names: str) -> None:
    """UserError for the first of these options that was not given."""
    for name in names:
        if getattr(cfg, name) in (None, "", []):
            raise UserError(f"--{name} is needed (or `{name}:` in the YAML file)")


def refuse_overwriting(option: str, path: str | Path | None, *read: str | Path | None) -> None:
    """UserError if the file that `option` names is also one of those that are read, and would be lost."""
    if path and os.path.realpath(path) in [os.path.realpath(each) for each in read if each]:
        raise UserError(f"--{option} {path} is a file that is read; the result needs one of its own")
