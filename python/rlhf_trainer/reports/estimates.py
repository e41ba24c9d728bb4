"""Statistics of completions: perplexity and diversity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_trainer.reports.intervals import Values


def perplexity(sums: Values) -> Values:
    """exp(nats / tokens) of sums [..., 2]: -log p of completions, and how many tokens they have."""
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))


def perplexity_change(sums: Values) -> Values:
    """Perplexity of the first two of sums [..., 4] minus that of the last two."""
    return perplexity(sums[..., :2]) - perplexity(sums[..., 2:])


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(completions: Sequence[str], n: int, units: NDArray[np.int64] | None = None) -> tuple[float, Values]:
    """Distinct n-grams of words over all n-grams (Li et al. 2016), 0 if there are none.

    And the same with each unit's completions left out [U]; units: [N], by default each completion is one.
    """
    owners = range(len(completions)) if units is None else units.tolist()
    each: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(max(owners, default=-1) + 1)]
    for owner, text in zip(owners, completions, strict=True):
        each[owner].update(_grams(text, n))
    everywhere: Counter[tuple[str, ...]] = Counter()
    for grams in each:
        everywhere.update(grams)
    without = []
    for grams in each:
        lost = sum(count == everywhere[gram] for gram, count in grams.items())
        without.append((len(everywhere) - lost) / max(everywhere.total() - grams.total(), 1))
    return len(everywhere) / max(everywhere.total(), 1), np.array(without)
