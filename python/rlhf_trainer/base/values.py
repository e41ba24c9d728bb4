"""Values of options, wherever they came from: finite numbers, text that a file system takes, expanded paths."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

from rlhf_trainer.base.errors import UserError

LARGEST = 2**63 - 1  # what torch holds
SEEDS = 2**32  # NumPy's seeds are below
# Options that name files or folders, in which `~` and environment variables are expanded.
PATHS = {
    "after",
    "before",
    "completions",
    "config",
    "constitution",
    "data",
    "eval_data",
    "eval_prompts",
    "gold_reward",
    "instructions",
    "judge",
    "measures",
    "model",
    "output",
    "output_dir",
    "pairs",
    "prompts",
    "ref_model",
    "reference_data",
    "reward",
    "text",
    "toxicity",
}
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def check_values(cfg: Any) -> None:
    """UserError for the first option whose value no stage can use."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            reason = _why_not(field.name, each)
            if reason is not None:
                raise UserError(f"--{field.name} {str(each)[:60]!r}: {reason}")


def _why_not(name: str, value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "beyond 64 bits"
    if name == "seed" and isinstance(value, int) and not 0 <= value < SEEDS:
        return f"must be at least 0 and below {SEEDS}"
    if isinstance(value, str):
        if "\0" in value:
            return "holds a NUL character"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "is not valid text (UTF-8)"
    return None


def expand_paths(values: dict[str, Any]) -> dict[str, Any]:
    """The values by name, with `~` and environment variables expanded in PATHS; a path that exists as written stays."""
    return {name: _expanded(name, value) if name in PATHS else value for name, value in values.items()}


def _expanded(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(name, each) for each in value]
    if not isinstance(value, str) or not ("~" in value or "$" in value) or os.path.exists(value):
        return value
    for braced, plain in VARIABLE.findall(value):
        if (braced or plain) not in os.environ:
            raise UserError(f"--{name} {value}: there is no environment variable {braced or plain}")
    label, equals, path = os.path.expandvars(value).rpartition("=")  # name=folder
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"--{name} {value}: there is no such user")
    return f"{label}{equals}{expanded}"
