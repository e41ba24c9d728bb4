"""A constitution: rules by which a model criticises, revises and compares answers. `rlhf cai constitution` shows one.

The form of the file is that of constitution.yaml beside this module, which is the default.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlhf_trainer.base.config import option, read_yaml, unknown
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.judging.shots import Rule, WorkedExample

SUMMARY = """Show the constitution: the rules by which `rlhf cai` criticises, revises and compares answers.

Without --constitution it is the default one, to be copied with --output and edited; a file of your own is checked."""
EXAMPLE = (
    "rlhf cai constitution --output mine.yaml\n"
    "  rlhf cai revise --constitution mine.yaml --model runs/sft --prompts red_team.jsonl --output revised.jsonl"
)
POSITIONAL = "constitution"
DEFAULT = Path(__file__).with_name("constitution.yaml")


@dataclass
class Config:
    constitution: str | None = option(None, "YAML file with the rules; none: the default constitution")
    output: str | None = option(None, "file to write it to, which must not exist; none: it is printed")


@dataclass(frozen=True)
class Constitution:
    """rules: at least one; shots: worked examples of them, maybe none; text: the YAML it was read from."""

    rules: tuple[Rule, ...]
    shots: tuple[WorkedExample, ...] = ()
    text: str = ""

    def only(self, names: Sequence[str]) -> Constitution:
        """With the named rules alone, all if there are no names. UserError for a name that is none."""
        known = [rule.name for rule in self.rules]
        for name in names:
            if name not in known:
                raise UserError(f"--rules: {unknown(name, known, 'rule ', 'there are ' + ', '.join(known))}")
        return replace(self, rules=tuple(r for r in self.rules if r.name in names)) if names else self

    def draw(self, count: int, *key: int) -> list[Rule]:
        """`count` rules in proportion to their weights, decided by `key`; none twice before all have come."""
        rng, drawn, left = random.Random(repr(key)), [], list(self.rules)
        for _ in range(count):
            (rule,) = rng.choices(left, [rule.weight for rule in left])
            drawn.append(rule)
            left.remove(rule)
            left = left or list(self.rules)
        return drawn


def load_constitution(path: str | Path | None = None) -> Constitution:
    """The rules of a YAML file, or of the default one.

    Raises:
        UserError: `file:line: reason` for YAML that cannot be read, an unknown, missing or repeated key, an empty text.
    """
    path = DEFAULT if path is None else path
    text, node = read_yaml(path)
    if node is None:
        raise UserError(f"{path}: empty; expected `rules:`")
    found = _mapping(node, ("rules", "examples"), ("rules",), path)
    rules = [_rule(entry, path) for entry in _entries(found["rules"], path)]
    names = [rule.name for rule in rules]
    for name, entry in zip(names, found["rules"].value, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{_where(entry, path)}: two rules are called {name!r}")
    by_name = dict(zip(names, rules, strict=True))
    shots = [_shot(entry, by_name, path) for entry in _entries(found["examples"], path)] if "examples" in found else []
    return Constitution(tuple(rules), tuple(shots), text)


def _where(node: yaml.Node, path: str | Path) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _mapping(
    node: yaml.Node, allowed: Sequence[str], needed: Sequence[str], path: str | Path
) -> dict[str, Any]:  # values are nodes
    """Key -> node of a mapping with these keys alone."""
    where = _where(node, path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: expected `key: value` lines with the keys {', '.join(allowed)}")
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = str(key.value)
        if name not in allowed:
            raise UserError(f"{_where(key, path)}: {unknown(name, allowed, 'key ', 'it takes ' + ', '.join(allowed))}")
        if name in found:
            raise UserError(f"{_where(key, path)}: {name} is there twice")
        found[name] = value
    for name in needed:
        if name not in found:
            raise UserError(f"{where}: no `{name}:`; it takes {', '.join(allowed)}")
    return found


def _entries(node: yaml.Node, path: str | Path) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise UserError(f"{_where(node, path)}: expected a list of entries, each beginning with `- `")
    return node.value


def _text(node: yaml.Node, key: str, path: str | Path) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
        raise UserError(f"{_where(node, path)}: {key} is empty, expected text")
    return node.value.strip()


def _rule(node: yaml.Node, path: str | Path) -> Rule:
    texts = ("name", "critique", "revision", "question")
    found = _mapping(node, (*texts, "weight"), texts, path)
    weight = 1.0
    if "weight" in found:
        given = getattr(found["weight"], "value", None)
        try:
            weight = float(str(given))
        except (TypeError, ValueError):
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"{_where(found['weight'], path)}: weight is {given!r}, expected a number above 0")
    return Rule(**{key: _text(found[key], key, path) for key in texts}, weight=weight)


def _shot(node: yaml.Node, rules: dict[str, Rule], path: str | Path) -> WorkedExample:
    keys = ("rule", "prompt", "answer", "critique", "revision")
    found = _mapping(node, keys, keys, path)
    name, *texts = (_text(found[key], key, path) for key in keys)
    if name not in rules:
        raise UserError(
            f"{_where(found['rule'], path)}: {unknown(name, list(rules), 'rule ', 'there are ' + ', '.join(rules))}"
        )
    return WorkedExample(rules[name], *texts)


def run(cfg: Config) -> dict[str, Any]:
    constitution = load_constitution(cfg.constitution)
    if cfg.output is None:
        print(constitution.text, end="")
    else:
        path = Path(cfg.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(constitution.text)
        except FileExistsError:
            raise UserError(f"{path} exists; choose another --output") from None
    total = sum(rule.weight for rule in constitution.rules)
    shares = ", ".join(f"{rule.name} {rule.weight / total:.0%}" for rule in constitution.rules)
    say(f"{len(constitution.rules)} rules (how often each is drawn: {shares}), {len(constitution.shots)} examples")
    return {"rules": len(constitution.rules)}
