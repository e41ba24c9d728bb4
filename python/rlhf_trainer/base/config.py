"""Configs: one dataclass a stage, filled from its defaults, then a YAML file, then the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.values import check_values, expand_paths
from rlhf_trainer.base.writing import write_text

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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    known = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    arguments, path = _take_config(argv)
    if path is not None:
        arguments = _yaml_arguments(path, parser, known) + arguments
    (parsed, rest) = parser.parse_known_args(arguments)
    if rest:
        if not rest[0].startswith("-"):
            raise UserError(f"{rest[0]!r} belongs to no option; --help lists them all")
        raise UserError(unknown(rest[0].lstrip("-").split("=")[0], known, "option --"))
    values = expand_paths({key: value for key, value in vars(parsed).items() if key in known})
    cfg = config(**values)
    check_values(cfg)
    return cfg


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """The words without `--config FILE`, and that file."""
    rest, path, words = [], None, iter(argv)
    for word in words:
        if word == "--" or word.endswith("=--"):  # argparse drops a value that is `--`, and then misses it
            raise UserError(f"{word!r}: `--` is neither an option nor a value")
        option, equals, value = word.partition("=")
        if option != "--config":
            rest.append(word)
            continue
        path = value if equals else next(words, None)
        if not path or (not equals and path.startswith("-")):
            raise UserError("argument --config: expected one argument")
    return rest, None if path is None else expand_paths({"config": path})["config"]


def _yaml_arguments(path: str, parser: HfArgumentParser, known: Sequence[str]) -> list[str]:
    """The file's keys as command-line arguments, so that both go through the same checks.

    Every value is taken as it is written, and its option says what it means: a folder called `no` or `010` is no
    boolean and no octal number. Of a list the values become the option's default in `parser`: a value in it may look
    like an option.
    """
    several = {action.dest: action for action in parser._actions if action.nargs == "+"}
    _, root = read_yaml(path)
    if root is None or (isinstance(root, yaml.ScalarNode) and _is_null(root)):
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: holds {_kind(root)}, expected `key: value` lines")
    arguments: list[str] = []
    written: set[str] = set()
    for key_node, node in root.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = str(key_node.value).replace("-", "_")  # as on the command line, where both are taken
        if key not in known:
            raise UserError(f"{where}: {unknown(key, known, 'key ')}")
        if key in written:  # YAML would silently take the last one
            raise UserError(f"{where}: {key} is there twice")
        written.add(key)
        if isinstance(node, yaml.ScalarNode):
            values = [] if _is_null(node) else [node.value]
        elif isinstance(node, yaml.SequenceNode) and key in several:
            wrong = next((each for each in node.value if not isinstance(each, yaml.ScalarNode) or _is_null(each)), None)
            if wrong is not None:
                raise UserError(f"{where}: {key} takes a list of values, not of {_kind(wrong)}")
            values = [each.value for each in node.value]
        else:
            wanted = "a list" if key in several else "one value"
            raise UserError(f"{where}: {key} takes {wanted}, not {_kind(node)}")
        if key in several and values:
            parser.set_defaults(**{key: [parser._get_value(several[key], value) for value in values]})
        # One word with "=", so that a value such as "--end" is not taken for an option.
        arguments += [] if key in several else [f"--{key}={value}" for value in values]
    return arguments


def read_yaml(path: str | Path) -> tuple[str, yaml.Node | None]:
    """(text, nodes) of a YAML file; no node of an empty one. UserError where it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return text, yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except RecursionError:
        raise UserError(f"{path}: not usable YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a path that no file can have
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}{line}: not YAML: {reason}") from None


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "nothing" if _is_null(node) else "one value"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


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
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def require(cfg: Any, *names: str) -> None:
    """UserError for the first of these options that was not given."""
    for name in names:
        if getattr(cfg, name) in (None, "", []):
            raise UserError(f"--{name} is needed (or `{name}:` in the YAML file)")


def refuse_overwriting(option: str, path: str | Path | None, *read: str | Path | None) -> None:
    """UserError if the file that `option` names is also one of those that are read, and would be lost."""
    if path and os.path.realpath(path) in [os.path.realpath(each) for each in read if each]:
        raise UserError(f"--{option} {path} is a file that is read; the result needs one of its own")
