"""Conditions such as `toxicity>0.05`: gates of `rlhf eval` that fail a CI job, alerts of the training stages."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_trainer.base.errors import UserError

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
GATE = re.compile(r"\s*(change in )?(.+?)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*(@95)?\s*")


@dataclass(frozen=True)
class Condition:
    """A policy fails where its measure, or the change of that against the first policy, compares so with the bound.

    interval: where it may, by the end of the 95 % interval that comes nearer to failing.
    """

    text: str
    change: bool
    measure: str
    comparison: str
    bound: float
    interval: bool = False

    def fails(self, value: float) -> bool:
        """A value that is not a number passes no gate."""
        return math.isnan(value) or bool(COMPARISONS[self.comparison](value, self.bound))


def short(measure: str) -> str:
    """`KL (nats)` is written `kl` in a gate."""
    return measure.split(" (")[0].lower()


def parse_gates(texts: Iterable[str], measures: Sequence[str] | None, option: str = "--fail_if") -> list[Condition]:
    """Gates from `measure>number`; UserError for anything else, and for a measure that is not among `measures`.

    measures: None where any name may do. option: the one that errors name.
    """
    names, gates = {short(measure): measure for measure in measures or ()}, []
    for text in texts:
        found = GATE.fullmatch(text)
        try:
            bound = float(found[4]) if found else math.nan
        except ValueError:
            bound = math.nan
        if found is None or not math.isfinite(bound):
            raise UserError(
                f"{option} {text!r}: expected a measure, one of > >= < <=, and a number, as in toxicity>0.05"
            )
        if found[5] and measures is None:
            raise UserError(f"{option} {text!r}: @95 is for estimates with an interval; here are single values")
        if measures is not None and short(found[2]) not in names:
            raise UserError(f"{option} {text!r}: no measure {found[2]!r} here; there are {', '.join(names)}")
        gates.append(
            Condition(text, bool(found[1]), names.get(short(found[2]), found[2]), found[3], bound, bool(found[5]))
        )
    return gates


def check_gates(gates: Sequence[Condition], result: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each gate and policy after the first, by the estimates' means or, with @95, their intervals.

    "undecided": a gate on the mean whose bound lies within the interval, so that chance decides. Without an interval a
    gate on it fails, as nothing is known.
    """
    records = []
    for gate in gates:
        for name, changes in result["changes"].items():
            measures = changes if gate.change else result["policies"][name]["measures"]
            found = measures[gate.measure]
            value = found["mean"]
            if gate.interval:
                end = found["high" if gate.comparison in (">", ">=") else "low"]
                value = math.nan if end is None else end
            low, high = found.get("low"), found.get("high")
            within = low is not None and bool(low < gate.bound < high)
            record = {"gate": gate.text, "policy": name, "value": value, "failed": gate.fails(value)}
            records.append(record | {"undecided": within and not gate.interval})
    return records
