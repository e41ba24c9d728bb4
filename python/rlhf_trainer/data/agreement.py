"""How far labellers agree: Krippendorff's alpha, each against the others, and who stands out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.rankings import FAIL, Rank, RankedPrompt, compared

MIN_PROMPTS = 5  # fewer say nothing about a labeller
FAR = 0.1  # an outlier agrees less than the others do among themselves, by at least this and three standard errors


@dataclass(frozen=True)
class Labeller:
    """One labeller. Agreements are shares of the comparisons that both sides decided; 0.5 is chance."""

    name: str
    prompts: int
    tie_share: float | None  # of own comparisons
    fail_share: float  # of completions judged
    agreement: float | None  # with each of the others
    others: float | None  # of the others with one another, on all prompts
    outlier: bool
    remark: str


@dataclass(frozen=True)
class Agreement:
    alpha: float | None  # Krippendorff's, ordinal; None where undefined
    alpha_without_outliers: float | None
    labellers: tuple[Labeller, ...]
    missing: str = ""  # why alpha was not computed; empty where it was, or is undefined

    def record(self) -> dict[str, Any]:
        return asdict(self)


def positions(ranks: Sequence[Rank]) -> list[float]:
    """Ranks as positions 1 to N: ties share their mean position, "F" comes last, NaN where nothing was judged."""
    keys = [None if rank is None else (rank == FAIL, 0.0 if rank == FAIL else float(rank)) for rank in ranks]
    judged = [key for key in keys if key is not None]
    return [float("nan") if key is None else sum(k < key for k in judged) + (judged.count(key) + 1) / 2 for key in keys]


def krippendorff_alpha(records: Sequence[RankedPrompt], without: Sequence[str] = ()) -> float | None:
    """Krippendorff's alpha (2011), ordinal, over every completion that at least two labellers judged.

    A completion's value is its place in the labeller's ranking, or its score where scores were given. None if nobody
    overlaps or all values are equal. 1 is perfect agreement, 0 that of chance.

    Raises:
        UserError: the krippendorff package is not installed. Its licence is the GPL, so that it is only used from here.
    """
    units: list[list[float]] = []
    for record in records:
        kept = [ranking for ranking in record.rankings if ranking.labeller not in without]
        rows = [
            [float("nan") if r is None else -float(r) for r in ranking.ranks]
            if record.scored
            else positions(ranking.ranks)
            for ranking in kept
        ]
        for values in zip(*rows, strict=True):
            judged = [value for value in values if value == value]
            if len(judged) >= 2:
                units.append(judged)
    domain, codes = np.unique([value for unit in units for value in unit], return_inverse=True)
    if len(domain) < 2:
        return None
    try:
        import krippendorff
    except ImportError:
        raise UserError(
            "Krippendorff's alpha needs `pip install krippendorff`, which rlhf-kernels[trainer] does"
        ) from None
    counts = np.zeros((len(units), len(domain)))
    np.add.at(counts, (np.repeat(np.arange(len(units)), [len(unit) for unit in units]), codes), 1)
    return float(krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement="ordinal"))


def agreement(records: Sequence[RankedPrompt], fails: Literal["remove", "lose"] = "lose") -> Agreement:
    """Alpha, and for every labeller how often they side with another one, against how often the others do.

    An outlier agrees with the others by FAR and by three standard errors (prompts as the independent units) less than
    the others agree among themselves: where one of three differs, it alone is the outlier.
    """
    tally = _Tally(records, fails)
    labellers = tuple(tally.labeller(name) for name in sorted(tally.prompts))
    outliers = [labeller.name for labeller in labellers if labeller.outlier]
    try:
        without = krippendorff_alpha(records, outliers) if outliers else None
        return Agreement(krippendorff_alpha(records), without, labellers)
    except UserError as error:  # the library is not installed; all else does not need it
        return Agreement(None, None, labellers, missing=str(error))


class _Tally:
    """Counts per record: comparisons that two labellers both decided, and in which they agreed."""

    def __init__(self, records: Sequence[RankedPrompt], fails: Literal["remove", "lose"]) -> None:
        self.size = len(records)
        self.total = np.zeros((2, self.size))  # agreed, decided by both; over all pairs of labellers
        self.own: dict[str, dict[int, list[int]]] = defaultdict(dict)  # labeller -> record -> [agreed, decided]
        self.prompts: Counter[str] = Counter()
        self.votes: Counter[str] = Counter()
        self.ties: Counter[str] = Counter()
        self.judged: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        for index, record in enumerate(records):
            for ranking in record.rankings:
                self.prompts[ranking.labeller] += 1
                self.judged[ranking.labeller] += sum(rank is not None for rank in ranking.ranks)
                self.failed[ranking.labeller] += sum(rank == FAIL for rank in ranking.ranks)
            for _, _, votes in compared(record, fails):
                self._count(index, votes)

    def _count(self, index: int, votes: dict[str, int]) -> None:
        for name, vote in votes.items():
            self.votes[name] += 1
            self.ties[name] += vote == 0
        decided = Counter(vote for vote in votes.values() if vote)
        both = decided.total() * (decided.total() - 1) // 2
        self.total[:, index] += (sum(count * (count - 1) // 2 for count in decided.values()), both)
        for name, vote in votes.items():
            if vote and decided.total() > 1:
                own = self.own[name].setdefault(index, [0, 0])
                own[0] += decided[vote] - 1
                own[1] += decided.total() - 1

    def labeller(self, name: str) -> Labeller:
        own = np.zeros((2, self.size))
        for index, counts in self.own[name].items():
            own[:, index] = counts
        rest = self.total - own
        mine, theirs = (sums[0] / sums[1] if sums[1] else None for sums in (own.sum(1), rest.sum(1)))
        ties = self.ties[name] / self.votes[name] if self.votes[name] else None
        outlier, remark = False, ""
        if mine is not None and theirs is not None and np.count_nonzero(own[1]) >= MIN_PROMPTS:
            influence = (own[0] - mine * own[1]) / own[1].sum() - (rest[0] - theirs * rest[1]) / rest[1].sum()
            error = float(np.sqrt((influence**2).sum()))
            outlier = bool(theirs - mine > max(FAR, 3 * error))
            if outlier:
                remark = "outlier: far from the others" + (", as if rank 1 were the worst" if mine < 0.35 else "")
        if not outlier and ties is not None and ties > 0.9 and self.prompts[name] >= MIN_PROMPTS:
            remark = "calls nearly everything a tie"
        failed = self.failed[name] / max(self.judged[name], 1)
        return Labeller(name, self.prompts[name], ties, failed, mine, theirs, outlier, remark)


def table(report: Agreement) -> list[str]:
    """The report as lines of text."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    name_width = max([8, *(len(labeller.name) for labeller in report.labellers)])
    head = f"{'labeller':{name_width}}  prompts  ties  failed  agrees with others  others among themselves"
    lines = [head]
    for one in report.labellers:
        cells = f"{one.name:{name_width}}  {one.prompts:7}  {share(one.tie_share):>4}  {share(one.fail_share):>6}"
        lines.append(f"{cells}  {share(one.agreement):>18}  {share(one.others):>23}  {one.remark}".rstrip())
    return lines
