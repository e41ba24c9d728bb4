"""`--alert 'objective/kl>20'`: a warning when a metric of a training step crosses a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_trainer.base.conditions import parse_gates
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.training.runlog import RunLog

SHOWN = 3  # texts with each warning


@dataclass(frozen=True)
class Alert:
    """A metric that looks wrong: its value, and why that is said."""

    metric: str
    value: float
    reason: str


class Alerts:
    """Checks every step's metrics against the bounds.

    An alert is given when its bound is crossed, and again only after the metric has been back within it.

    Args:
        conditions: as `rlhf eval --fail_if` takes them, of metrics; a change is against the metric's first value.
        past: metrics of the steps before a resumed run, whose alerts were given then.
    """

    def __init__(self, conditions: Iterable[str], past: Iterable[Mapping[str, Any]] = ()) -> None:
        self.gates = parse_gates(conditions, None, "--alert")
        self.first: dict[str, float] = {}
        self.beyond: set[str] = set()
        self.checked = False
        for metrics in past:
            self.check(metrics)

    def check(self, metrics: Mapping[str, Any]) -> list[Alert]:
        """The alerts of a step. UserError at the first step for a metric that no step can have."""
        found = []
        for gate in self.gates:
            if gate.measure not in metrics:
                if not self.checked and not gate.measure.startswith("heldout/"):  # those come with some steps only
                    raise UserError(
                        f"--alert {gate.text!r}: no metric {gate.measure!r}; there are {', '.join(metrics)}"
                    )
                continue
            first = self.first.setdefault(gate.measure, metrics[gate.measure])
            value = metrics[gate.measure] - (first if gate.change else 0.0)
            if not gate.fails(value):
                self.beyond.discard(gate.text)
            elif gate.text not in self.beyond:
                self.beyond.add(gate.text)
                change = "changed by " if gate.change else ""
                found.append(Alert(gate.measure, value, f"{change}{value:.4g}, --alert {gate.text.strip()!r}"))
        self.checked = True
        return found


def announce(log: RunLog | None, step: int, alerts: Sequence[Alert], texts: Sequence[str]) -> None:
    """Warn of each alert, with the first of the step's texts: on the terminal, and where `log` writes and reports."""
    shown = list(texts[:SHOWN])
    for alert in alerts:
        title = f"warning: {alert.metric}: {alert.reason}"
        examples = "".join(f"\n    {text[:100]!r}" for text in shown)
        message = f"{title}; at step {step}:{examples}"
        if log is None:
            say(message)
        else:
            record = {"metric": alert.metric, "value": alert.value, "reason": alert.reason, "texts": shown}
            log.alert(step, record, title, message)
