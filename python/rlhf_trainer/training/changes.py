"""What has changed between a run and its resumption, told by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError

UP_TO_ROUNDING = {"micro_batch_size"}  # may change, which is said: the sums are the same, their order is not


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], accepted: set[str], path: Path) -> None:
    """UserError naming everything that has changed since the checkpoint, but for what is accepted or harmless.

    saved, now: "config", the options by name, and "inputs", a `Fingerprint`.
    """
    unknown_names = accepted - {*now["config"], *now["inputs"]}
    if unknown_names:
        known = ", ".join([*now["inputs"], "or an option"])
        raise UserError(f"--accept_changes {sorted(unknown_names)[0]}: nothing is called so; it takes {known}")
    was, changes = saved["config"], {}
    length = "updates" if "updates" in now["config"] else "epochs"
    for key, value in now["config"].items():
        if was.get(key) == value:
            continue
        change = f"{key}={value!r}, not {was.get(key)!r} as before"
        if key == length and value > was.get(key, value):
            say(f"{change}: the learning rate follows the longer schedule from here on")
        elif key in UP_TO_ROUNDING:
            say(f"{change}: the result is equal up to rounding")
        else:
            changes[key] = f"it was made with {key}={was.get(key)!r}, not {value!r}"
    for key, part in now["inputs"].items():
        before = saved.get("inputs", {}).get(key, {})
        aspects = [name for name in {**part, **before} if part.get(name) != before.get(name)]
        if aspects:
            changes[key] = f"the {key.replace('_', ' ')} changed ({', '.join(aspects)})"
    refused = [key for key in changes if key not in accepted]
    if refused:
        told = "; ".join(changes[key] for key in refused)
        raise UserError(f"{path}: cannot resume: {told}. --accept_changes {' '.join(changes)} goes on all the same")
    if changes:
        say(f"{path}: accepted: {'; '.join(changes.values())}")
