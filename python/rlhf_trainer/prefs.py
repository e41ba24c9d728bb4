"""Rankings of several labellers -> preference pairs: a vote on every two completions of a prompt.

A line of the rankings file, rank 1 best, equal ranks a tie, "F" a completion that fails the task:
{"prompt": ..., "completions": [...], "rankings": [{"labeller": "a", "ranks": [2, 1, "F"]}, ...]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from rlhf_trainer.data import Pair, read_jsonl, text_field
from rlhf_trainer.errors import UserError

Rank = float | Literal["F"]
FAIL: Literal["F"] = "F"


@dataclass(frozen=True)
class Ranking:
    labeller: str
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class Ranked:
    """One prompt, its completions, and how each labeller ranked them."""

    prompt: str
    completions: tuple[str, ...]
    rankings: tuple[Ranking, ...]


@dataclass
class Votes:
    """What became of the comparisons, and how often each labeller sided with the others."""

    pairs: int = 0
    ties: int = 0
    disagreements: int = 0
    failed_completions: int = 0
    agreed: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)

    def agreement(self) -> dict[str, float]:
        """Share of each labeller's decided comparisons in which the majority of the others decided the same way."""
        return {name: self.agreed[name] / count for name, count in sorted(self.compared.items())}


def _ranking(value: Any, count: int, where: str) -> Ranking:
    if not isinstance(value, dict) or not isinstance(value.get("ranks"), list):
        raise UserError(f'{where}: a ranking must be {{"labeller": ..., "ranks": [...]}}')
    ranks = value["ranks"]
    if len(ranks) != count:
        raise UserError(f"{where}: {len(ranks)} ranks for {count} completions")
    for rank in ranks:
        if rank != FAIL and (isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != rank):
            raise UserError(f'{where}: rank {rank!r} is neither a number nor "F"')
    return Ranking(text_field(value, "labeller", where), tuple(ranks))


def read_rankings(path: str | Path) -> list[Ranked]:
    """Every line of a rankings file; UserError `file:line: reason` for one that is malformed."""
    found = []
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        completions, rankings = record.get("completions"), record.get("rankings")
        if not isinstance(completions, list) or len(completions) < 2:
            raise UserError(f"{where}: field 'completions' must be a list of at least two texts")
        if not isinstance(rankings, list) or not rankings:
            raise UserError(f"{where}: field 'rankings' must be a list of at least one ranking")
        texts = tuple(text_field({"completions": text}, "completions", where) for text in completions)
        ranked = tuple(_ranking(value, len(texts), where) for value in rankings)
        if len({ranking.labeller for ranking in ranked}) < len(ranked):
            raise UserError(f"{where}: one labeller ranks it twice")
        found.append(Ranked(text_field(record, "prompt", where), texts, ranked))
    if not found:
        raise UserError(f"{path}: no ranking in it")
    return found


def _vote(a: Rank, b: Rank, fails: Literal["remove", "lose"]) -> int | None:
    """1: a is better, -1: b is, 0: a tie, None: no opinion."""
    if FAIL in (a, b):
        if a == b or fails == "remove":
            return None
        return 1 if b == FAIL else -1
    return (a < b) - (a > b)  # type: ignore[operator]  # neither is "F" here


def _majority(votes: Iterable[int]) -> int | None:
    """The outcome with most votes; None if two outcomes share the lead."""
    counts = Counter(votes).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return counts[0][0]


def _failed(record: Ranked) -> set[int]:
    """Completions that more than half of the labellers marked "F"."""
    marks = Counter(i for ranking in record.rankings for i, rank in enumerate(ranking.ranks) if rank == FAIL)
    return {i for i, count in marks.items() if 2 * count > len(record.rankings)}


def pairs_from_rankings(
    records: Iterable[Ranked],
    *,
    ties: Literal["drop", "half"] = "drop",
    fails: Literal["remove", "lose"] = "lose",
) -> tuple[list[Pair], Votes]:
    """A majority vote on every two completions of each prompt; the winner becomes `chosen`.

    Args:
        ties: "drop" pairs whose majority says tie, or keep them with label 0.5 ("half").
        fails: completions marked "F" "lose" to every ranked one, or "remove": a mark is no opinion on the pair, and
            a completion that most labellers marked takes part in no pair.

    Returns:
        the pairs, prompt by prompt, and what became of all comparisons. Outcomes that share the lead are a
        disagreement and give no pair; the same text twice gives none either.
    """
    pairs, outcome = [], Votes()
    for record in records:
        failed = _failed(record)
        outcome.failed_completions += len(failed)
        for i, j in combinations(range(len(record.completions)), 2):
            a, b = record.completions[i], record.completions[j]
            if a == b or (fails == "remove" and failed & {i, j}):
                continue
            opinions = {r.labeller: _vote(r.ranks[i], r.ranks[j], fails) for r in record.rankings}
            votes = {name: vote for name, vote in opinions.items() if vote is not None}
            _count_agreement(votes, outcome)
            result = _majority(votes.values())
            if result is None:
                outcome.disagreements += bool(votes)
            elif result == 0:
                outcome.ties += 1
                if ties == "half":
                    pairs.append(Pair(record.prompt, a, b, label=0.5))
            else:
                pairs.append(Pair(record.prompt, a, b) if result > 0 else Pair(record.prompt, b, a))
    outcome.pairs = len(pairs)
    return pairs, outcome


def _count_agreement(votes: dict[str, int], outcome: Votes) -> None:
    for name, vote in votes.items():
        others = _majority(other for who, other in votes.items() if who != name)
        if vote != 0 and others not in (None, 0):
            outcome.compared[name] += 1
            outcome.agreed[name] += vote == others
