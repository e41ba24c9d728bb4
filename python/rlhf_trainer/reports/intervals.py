"""95 % intervals from a sample of units: prompts, conversations, whatever was drawn, each with one value or several.

Values of one unit are not independent, so that every interval is over the units. From a single unit there is none
(None): its values say nothing about the next one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
Estimate = dict[str, Any]  # "mean", "low", "high"; None where there is no interval
LEVEL = 0.95
CHUNK = 1 << 20  # numbers drawn at once


def units_of(keys: Sequence[Hashable]) -> NDArray[np.int64]:
    """[N] number of the unit that each value belongs to: equal keys, equal unit."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def renumbered(units: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same units numbered without gaps, where some have no value."""
    return np.unique(units, return_inverse=True)[1]


def estimate(
    values: Values,
    resamples: int,
    seed: int,
    units: NDArray[np.int64] | None = None,
    *,
    share: bool | None = None,
) -> Estimate:
    """Mean of values [N] with its interval.

    A share, of values 0 and 1 (a half is a tie), has Wilson's interval: a bootstrap of 0 out of 10 would say that it
    can be nothing else. Other values have the bootstrap's. share: None looks at the values.
    """
    if is_share(values) if share is None else share:
        return share_interval(values, units)
    own = np.arange(len(values)) if units is None else units
    columns = np.stack([values, np.ones(len(values))])
    return bootstrap_sums(lambda sums: sums[..., 0] / sums[..., 1], columns, resamples, seed, own)


def is_share(values: Values) -> bool:
    return bool(np.isin(values, (0.0, 0.5, 1.0)).all())


def estimate_change(
    after: Values, before: Values, resamples: int, seed: int, units: NDArray[np.int64], *, share: bool | None = None
) -> Estimate:
    """Mean of after - before [N], paired, with its interval: Bonett and Price's (2012) where both are shares."""
    both = is_share(after) and is_share(before) if share is None else share
    if not both:
        return estimate(after - before, resamples, seed, units, share=False)
    change = after - before
    found: Estimate = {"mean": float(change.mean()), "low": None, "high": None}
    count, quantile = effective_count(change, units, float(np.abs(change).mean() - change.mean() ** 2))
    if count is None:
        return found
    # A pair more of either kind: where no answer changed, the next one still may.
    up = (count * float(np.maximum(change, 0).mean()) + 1) / (count + 2)
    down = (count * float(np.maximum(-change, 0).mean()) + 1) / (count + 2)
    half = quantile * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return found | {"low": min(low, found["mean"]), "high": max(high, found["mean"])}


def effective_count(values: Values, units: NDArray[np.int64] | None, variance: float) -> tuple[float | None, float]:
    """How many independent values of this variance know the mean as well, and the quantile for the units' number.

    None for one unit. At most N; where the values do not vary, as many as there are units.
    """
    count = len(values)
    sizes = np.ones(count) if units is None else np.bincount(units).astype(np.float64)
    if len(sizes) < 2:
        return None, math.inf
    if len(sizes) == count:
        return float(count), float(stats.norm.ppf((1 + LEVEL) / 2))
    sums = np.bincount(units, weights=values)  # type: ignore[arg-type]  # there are units here
    of_mean = len(sizes) / (len(sizes) - 1) * float(((sums - values.mean() * sizes) ** 2).sum()) / count**2
    effective = variance / of_mean if variance > 0 and of_mean > 0 else float(len(sizes))
    return min(effective, float(count)), float(stats.t.ppf((1 + LEVEL) / 2, len(sizes) - 1))


def share_interval(values: Values, units: NDArray[np.int64] | None = None) -> Estimate:
    """Wilson's (1927) interval of the mean of values in [0, 1], with the number that their clustering leaves."""
    share = float(values.mean())
    count, z = effective_count(values, units, share * (1 - share))
    if count is None:
        return {"mean": share, "low": None, "high": None}
    scale, centre = 1 + z * z / count, share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
    return {"mean": share, "low": min(low, share), "high": max(high, share)}  # an ulp must not part them


def bootstrap_sums(
    statistic: Callable[[Values], Values],
    columns: Values,
    resamples: int,
    seed: int,
    units: NDArray[np.int64] | None = None,
) -> Estimate:
    """`statistic` of the sums of columns [K, N], with the percentile interval over draws of units with replacement.

    The K numbers of a value are drawn together, because a long completion adds to both sums of a ratio. `statistic`
    maps sums [..., K] to values [...]. The percentiles are those at which the mean of few normal values would be
    covered as often as said (Hesterberg 2015): plain ones are too narrow by sqrt((n - 1) / n), and know no t.
    """
    if units is not None:
        columns = np.stack([np.bincount(units, weights=column) for column in columns])
    count = columns.shape[1]
    with np.errstate(over="ignore"):  # beyond exp's range a perplexity is infinite
        found = {"mean": float(statistic(columns.sum(-1))), "low": None, "high": None}
        if count < 2:
            return found
        drawn = statistic(_resampled(columns, resamples, seed))
    tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - LEVEL) / 2, count - 1))
    low, high = np.quantile(drawn, (tail, 1 - tail), method="nearest")
    return found | {"low": float(low), "high": float(high)}


def _resampled(columns: Values, resamples: int, seed: int) -> Values:
    """[resamples, K] sums over as many draws with replacement as there are columns' entries."""
    rng, count, parts, left = np.random.default_rng(seed), columns.shape[1], [], resamples
    while left:
        rows = min(left, max(1, CHUNK // count))
        parts.append(columns[:, rng.integers(0, count, (rows, count))].sum(-1).T)
        left -= rows
    return np.concatenate(parts)


def jackknife(value: float, left_out: Values, limits: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """A statistic of U units together with its interval from the U leave-one-unit-out values.

    For diversity: a bootstrap draws some completions twice, and would find less diversity than there is.
    """
    count = len(left_out)
    if count < 2:
        return {"mean": value, "low": None, "high": None}
    error = math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return {"mean": value, "low": max(limits[0], value - half), "high": min(limits[1], value + half)}
