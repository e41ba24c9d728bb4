"""Rankings of several labellers -> preference pairs: a vote on every two completions of a prompt.

A line of the rankings file, rank 1 best, equal ranks a tie, "F" a completion that fails the task:
{"prompt": ..., "completions": [...], "rankings": [{"labeller": "a", "ranks": [2, 1, "F"]}, ...]}
Scores, higher better, are rankings too, in which a completion may be left out (null):
{"prompt": ..., "completions": [...], "scores": [{"labeller": "a", "scores": [1, 0, null]}, ...]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import read_jsonl
from rlhf_trainer.data.records import DataReport, Pair, is_finite, text_field

Rank = float | Literal["F"] | None  # None: this labeller did not judge it
FAIL: Literal["F"] = "F"


@dataclass(frozen=True)
class Ranking:
    labeller: str
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class RankedPrompt:
    """One prompt, its completions, and how each labeller ranked them.

    `scored`: the ranks are negated scores, which can be compared between prompts. `line`: its line in the file.
    """

    prompt: str
    completions: tuple[str, ...]
    rankings: tuple[Ranking, ...]
    scored: bool = False
    line: int = field(default=0, compare=False)


@dataclass
class VoteTally:
    """What became of the comparisons, and how often each labeller sided with the others."""

    pairs: int = 0
    comparisons: int = 0  # two completions of different text that at least one labeller compared
    ties: int = 0  # the majority calls it a tie
    disagreements: int = 0  # no outcome has the most votes
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
        if rank != FAIL and not is_finite(rank):
            raise UserError(f'{where}: rank {rank!r} is neither a number nor "F"')
    return Ranking(text_field(value, "labeller", where), tuple(ranks))


def _scores(value: Any, count: int, where: str) -> Ranking:
    if not isinstance(value, dict) or not isinstance(value.get("scores"), list):
        raise UserError(f'{where}: scores must be [{{"labeller": ..., "scores": [...]}}, ...]')
    scores = value["scores"]
    if len(scores) != count:
        raise UserError(f"{where}: {len(scores)} scores for {count} completions")
    for score in scores:
        if score is not None and not isinstance(score, bool) and not is_finite(score):
            raise UserError(f"{where}: score {score!r} is not a number")
    return Ranking(
        text_field(value, "labeller", where), tuple(None if score is None else -float(score) for score in scores)
    )


def completions_of(record: dict[str, Any], where: str) -> tuple[str, ...]:
    completions = record.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        raise UserError(f"{where}: field 'completions' must be a list of at least two texts")
    return tuple(text_field({"completions": text}, "completions", where) for text in completions)


def ranked_of(record: dict[str, Any], where: str, line: int = 0) -> RankedPrompt:
    """One line of a rankings or scores file; UserError `where: reason` if it is malformed."""
    key, parse = ("scores", _scores) if "scores" in record and "rankings" not in record else ("rankings", _ranking)
    texts, rankings = completions_of(record, where), record.get(key)
    if not isinstance(rankings, list) or not rankings:
        raise UserError(f"{where}: field {key!r} must be a list of at least one {key.removesuffix('s')}")
    if key == "scores" and not any(isinstance(value, dict) for value in rankings):
        rankings = [{"labeller": "scores", "scores": rankings}]  # those of one labeller without a name
    ranked = tuple(parse(value, len(texts), where) for value in rankings)
    if len({ranking.labeller for ranking in ranked}) < len(ranked):
        raise UserError(f"{where}: one labeller ranks it twice")
    return RankedPrompt(text_field(record, "prompt", where), texts, ranked, key == "scores", line)


def read_rankings(path: str | Path) -> list[RankedPrompt]:
    """Every line of a rankings file; UserError `file:line: reason` for one that is malformed."""
    found = [ranked_of(record, f"{path}:{number}", number) for number, record in read_jsonl(path)]
    if not found:
        raise UserError(f"{path}: no ranking in it")
    return found


def clean(records: Iterable[RankedPrompt], report: DataReport) -> Iterator[RankedPrompt]:
    """The records without empty completions; what is odd about each is counted in `report`."""
    for record in records:
        if not record.prompt.strip():
            report.warn("empty prompt", record.line)
        kept = [i for i, text in enumerate(record.completions) if text.strip()]
        if len(kept) < len(record.completions):
            report.warn("empty completion, dropped", record.line)
            record = _subset(record, kept)
        if len(set(record.completions)) < len(record.completions):
            report.count("the same completion twice, not compared", record.line)
            if any(
                len(set(zip(record.completions, r.ranks, strict=True))) > len(set(record.completions))
                for r in record.rankings
            ):
                report.warn("different ranks for the same completion", record.line)
        if len(set(record.completions)) < 2:
            report.count("one completion, nothing to compare", record.line)
            continue
        yield record


def _subset(record: RankedPrompt, indices: Sequence[int]) -> RankedPrompt:
    """The record with these completions, in this order."""
    return replace(
        record,
        completions=tuple(record.completions[i] for i in indices),
        rankings=tuple(Ranking(r.labeller, tuple(r.ranks[i] for i in indices)) for r in record.rankings),
    )


def merge(records: Iterable[tuple[RankedPrompt, DataReport]]) -> list[tuple[RankedPrompt, DataReport]]:
    """Records of the same prompt and completions become one, wherever each labeller's ranking stands.

    Where one labeller ranks the same completions again, the later ranking counts, and the report says so.
    """
    merged: dict[tuple[Any, ...], tuple[RankedPrompt, DataReport]] = {}
    for record, report in records:
        order = sorted(range(len(record.completions)), key=lambda i: record.completions[i])
        key = (record.prompt, tuple(record.completions[i] for i in order), record.scored)
        if key not in merged:
            merged[key] = record, report
            continue
        first, origin = merged[key]
        place = sorted(range(len(order)), key=lambda i: first.completions[i])
        indices = [index for _, index in sorted(zip(place, order, strict=True))]
        own = {ranking.labeller: ranking for ranking in first.rankings}
        for ranking in _subset(record, indices).rankings:
            if ranking.labeller in own:
                report.warn("ranked again by the same labeller, the later ranking counts", record.line)
            own[ranking.labeller] = ranking
        merged[key] = replace(first, rankings=tuple(own.values())), origin
    return list(merged.values())


def vote(a: Rank, b: Rank, fails: Literal["remove", "lose"]) -> int | None:
    """1: a is better, -1: b is, 0: a tie, None: no opinion."""
    if a is None or b is None:
        return None
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


def _failed(record: RankedPrompt) -> set[int]:
    """Completions that more than half of the labellers marked "F"."""
    marks = Counter(i for ranking in record.rankings for i, rank in enumerate(ranking.ranks) if rank == FAIL)
    return {i for i, count in marks.items() if 2 * count > len(record.rankings)}


def compared(record: RankedPrompt, fails: Literal["remove", "lose"]) -> Iterator[tuple[int, int, dict[str, int]]]:
    """(i, j, labeller -> vote) for every two completions of different text; only those who have an opinion vote."""
    failed = _failed(record) if fails == "remove" else set()
    for i, j in combinations(range(len(record.completions)), 2):
        if record.completions[i] == record.completions[j] or failed & {i, j}:
            continue
        opinions = {r.labeller: vote(r.ranks[i], r.ranks[j], fails) for r in record.rankings}
        yield i, j, {name: opinion for name, opinion in opinions.items() if opinion is not None}


def voted_pairs(
    record: RankedPrompt, tally: VoteTally, ties: Literal["drop", "half"], fails: Literal["remove", "lose"]
) -> Iterator[Pair]:
    """The pairs of one prompt; what became of its comparisons is added to `tally`."""
    tally.failed_completions += len(_failed(record))
    for i, j, votes in compared(record, fails):
        a, b = record.completions[i], record.completions[j]
        tally.comparisons += bool(votes)
        _count_agreement(votes, tally)
        result = _majority(votes.values())
        tally.disagreements += result is None and bool(votes)
        tally.ties += result == 0
        if result is None or (result == 0 and ties == "drop"):
            continue
        tally.pairs += 1
        winner, loser = (b, a) if result < 0 else (a, b)
        yield Pair(record.prompt, winner, loser, label=1.0 if result else 0.5, line=record.line)


def pairs_from_rankings(
    records: Iterable[RankedPrompt],
    *,
    ties: Literal["drop", "half"] = "drop",
    fails: Literal["remove", "lose"] = "lose",
) -> tuple[list[Pair], VoteTally]:
    """A majority vote on every two completions of each prompt; the winner becomes `chosen`.

    Args:
        ties: "drop" pairs whose majority says tie, or keep them with label 0.5 ("half").
        fails: completions marked "F" "lose" to every ranked one, or "remove": a mark is no opinion on the pair, and
            a completion that most labellers marked takes part in no pair.

    Returns:
        the pairs, prompt by prompt, and what became of all comparisons. Outcomes that share the lead are a
        disagreement and give no pair; the same text twice gives none either.
    """
    tally = VoteTally()
    return [pair for record in records for pair in voted_pairs(record, tally, ties, fails)], tally


def _count_agreement(votes: dict[str, int], tally: VoteTally) -> None:
    for name, opinion in votes.items():
        others = _majority(other for who, other in votes.items() if who != name)
        if opinion != 0 and others not in (None, 0):
            tally.compared[name] += 1
            tally.agreed[name] += opinion == others
