"""Rules and worked examples that a judge is shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """critique, revision: requests to the model; question: asks which of two answers is better; weight: more than 0."""

    name: str
    critique: str
    revision: str
    question: str
    weight: float = 1.0


@dataclass(frozen=True)
class WorkedExample:
    """A worked example of a rule: an answer to a prompt, its critique and its revision."""

    rule: Rule
    prompt: str
    answer: str
    critique: str
    revision: str
