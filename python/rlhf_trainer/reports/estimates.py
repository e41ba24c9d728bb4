"""Statistics of completions with 95 % intervals: means, perplexity, diversity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def bootstrap(values: Values, resamples: int, seed: int) -> dict[str, float]:
    """Mean of values [N] with the 95 % percentile interval over `resamples` draws of N with replacement."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def bootstrap_sums(
    statistic: Callable[[Values], Values], columns: Values, resamples: int, seed: int
) -> dict[str, float]:
    """`statistic` of the sums of columns [K, N], with the 95 % percentile interval over draws of N with replacement.

    The K numbers of a completion are drawn together, because a long completion adds to both sums of a ratio.
    `statistic` maps sums [..., K] to values [...].
    """
    rng = np.random.default_rng(seed)
    count = columns.shape[1]
    sums = np.stack([columns[:, rng.integers(0, count, count)].sum(-1) for _ in range(resamples)])
    with np.errstate(over="ignore"):  # beyond exp's range a perplexity is infinite
        low, high = np.quantile(statistic(sums), (0.025, 0.975), method="nearest")
        value = statistic(columns.sum(-1))
    return {"mean": float(value), "low": float(low), "high": float(high)}


def perplexity(sums: Values) -> Values:
    """exp(nats / tokens) of sums [..., 2]: -log p of completions, and how many tokens they have."""
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))


def perplexity_change(sums: Values) -> Values:
    """Perplexity of the first two of sums [..., 4] minus that of the last two."""
    return perplexity(sums[..., :2]) - perplexity(sums[..., 2:])


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(completions: Sequence[str], n: int) -> tuple[float, Values]:
    """Distinct n-grams of words over all n-grams (Li et al. 2016), 0 if there are none.

    And the same with each completion left out [N].
    """
    each = [_grams(text, n) for text in completions]
    everywhere: Counter[tuple[str, ...]] = Counter()
    for grams in each:
        everywhere.update(grams)
    without = []
    for grams in each:
        lost = sum(count == everywhere[gram] for gram, count in grams.items())
        without.append((len(everywhere) - lost) / max(everywhere.total() - grams.total(), 1))
    return len(everywhere) / max(everywhere.total(), 1), np.array(without)


def jackknife(value: float, left_out: Values) -> dict[str, float]:
    """A statistic of N completions together with its 95 % interval from the N leave-one-out values.

    For diversity: a bootstrap draws some completions twice, and would find less diversity than there is.
    """
    count = len(left_out)
    error = 1.96 * math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))
    return {"mean": value, "low": value - error, "high": value + error}
