"""Intervals: how often they hold the truth, over shares and means, clustered or not, and what they are at the edges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from rlhf_trainer.data.records import Pair
from rlhf_trainer.reports.intervals import (
    bootstrap_sums,
    estimate,
    estimate_change,
    jackknife,
    share_interval,
    units_of,
)
from rlhf_trainer.reports.page import error_bars, excludes_zero, show_estimate, write_or_warn
from rlhf_trainer.training import pair_metrics

SHARES = (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99)
EACH = 4  # values of a unit where they are clustered
LIKENESS = 0.5  # correlation of two values of a unit


def drawn_shares(rng, share, count, clustered):
    """Values 0 and 1 of `count` units, and their units."""
    if not clustered:
        return (rng.random(count) < share).astype(float), np.arange(count)
    weight = 1 / LIKENESS - 1
    own = rng.beta(share * weight, (1 - share) * weight, count)
    return (rng.random((count, EACH)) < own[:, None]).astype(float).ravel(), np.repeat(np.arange(count), EACH)


def covered(found, truth):
    return found["low"] - 1e-12 <= truth <= found["high"] + 1e-12


def mean_coverage(draw, truth, count, repeats, clustered):
    """How often the interval of a mean holds the truth."""
    rng, hits = np.random.default_rng(1), 0
    for seed in range(repeats):
        values, units = draw(rng, count), np.arange(count)
        if clustered:
            values, units = np.repeat(values, EACH) + rng.normal(size=count * EACH), np.repeat(units, EACH)
        hits += covered(estimate(values, 400, seed, units), truth)
    return hits / repeats


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(
    ("counts", "repeats"), [((10, 50), 400), pytest.param((10, 50, 500), 4000, marks=pytest.mark.sweep)]
)
def test_shares_are_covered(counts, repeats, clustered):
    rng, found = np.random.default_rng(0), {}
    for count, share in itertools.product(counts, SHARES):
        drawn = (share_interval(*drawn_shares(rng, share, count, clustered)) for _ in range(repeats))
        found[count, share] = np.mean([covered(one, share) for one in drawn])
    assert 0.93 <= np.mean([*found.values()]) <= 0.98, found
    assert min(found.values()) >= 0.88 - 2 * (0.88 * 0.12 / repeats) ** 0.5, found


MEANS = {
    "normal": (lambda rng, n: rng.normal(1.0, 2.0, n), 1.0),
    "skewed": (lambda rng, n: rng.gamma(2.0, 1.0, n), 2.0),
}


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("kind", list(MEANS))
@pytest.mark.parametrize(
    ("count", "repeats"),
    [(10, 300), (50, 300), *(pytest.param(n, 3000, marks=pytest.mark.sweep) for n in (10, 50, 500))],
)
def test_means_are_covered(kind, clustered, count, repeats):
    found = mean_coverage(*MEANS[kind], count, repeats, clustered)
    error = 2.5 * (0.95 * 0.05 / repeats) ** 0.5
    assert (0.93 if count >= 50 else 0.90) - error <= found <= 0.97 + error


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_changes_of_shares_are_covered(share):
    """Paired: the second answer differs from the first in this share of the prompts, either way alike."""
    rng, hits = np.random.default_rng(2), 0
    for seed in range(400):
        before = (rng.random(20) < 0.5).astype(float)
        after = np.where(rng.random(20) < share, 1 - before, before)
        hits += covered(estimate_change(after, before, 10, seed, np.arange(20)), 0.0)
    assert hits / 400 >= 0.92


def test_pairs_of_one_prompt_are_one_observation():
    """The width of the interval of an accuracy on rankings of nine, against the spread of many such accuracies."""
    rng, accuracies, widths = np.random.default_rng(3), [], []
    for _ in range(200):
        own = rng.beta(4, 2, 30)
        right = (rng.random((30, 36)) < own[:, None]).astype(float)
        found = share_interval(right.ravel(), np.repeat(np.arange(30), 36))
        accuracies.append(found["mean"])
        widths.append(found["high"] - found["low"])
    assert np.mean(widths) / 2 == pytest.approx(2.045 * np.std(accuracies), rel=0.15)


def test_wilsons_interval_is_the_books():
    for right, count in ((5, 10), (20, 20), (0, 10), (1, 400)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        found = share_interval(np.array([1.0] * right + [0.0] * (count - right)))
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_no_share_leaves_its_interval():
    """A quarter of all n have an end that rounds to the wrong side of 1."""
    for count in range(2, 400):
        for value in (0.0, 1.0):
            found = share_interval(np.full(count, value))
            assert 0 <= found["low"] <= value <= found["high"] <= 1
            assert found["high"] - found["low"] > 0.005
            assert min(itertools.chain(*error_bars([found]))) >= 0


def test_what_never_changed_may_still_change():
    found = estimate_change(np.zeros(10), np.zeros(10), 50, 0, np.arange(10))
    assert found["low"] < -0.1
    assert found["high"] > 0.1
    assert not excludes_zero(found)


@pytest.mark.parametrize(
    "found",
    [
        estimate(np.array([1.0]), 50, 0),
        estimate(np.array([3.5, 4.0]), 50, 0, np.array([0, 0])),
        estimate_change(np.array([1.0]), np.array([0.0]), 50, 0, np.array([0])),
        estimate_change(np.array([2.5]), np.array([0.2]), 50, 0, np.array([0])),
        bootstrap_sums(lambda sums: sums[..., 0], np.array([[2.0]]), 50, 0),
        jackknife(0.5, np.array([0.5])),
    ],
)
def test_one_prompt_has_no_interval(found):
    assert found["low"] is None
    assert found["high"] is None
    assert not excludes_zero(found)
    assert "[" not in show_estimate(found)
    assert error_bars([found]) == [[0.0], [0.0]]


def test_diversity_stays_within_its_limits():
    assert jackknife(0.98, np.array([0.99, 0.9, 0.97]), (0.0, 1.0))["high"] == 1.0


def test_equal_keys_are_one_unit():
    assert units_of(["a", "b", "a", "c"]).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("pairs", [1, 2, 5, 12, 17])
def test_every_number_of_right_pairs_can_be_drawn(pairs):
    own = [Pair(f"p{i}", "a", "b") for i in range(pairs)]
    figures = pair_metrics.pair_metrics(torch.full((pairs,), 2.0), torch.zeros(pairs), own)
    pair_metrics.calibration_figure(figures)
    assert f"on {pairs} pairs of {pairs} prompts" in pair_metrics.summary(figures | {"length_baseline": 0.5})


def test_a_report_that_cannot_be_drawn_is_said_and_no_more(capsys):
    def broken():
        raise ValueError("'yerr' must not contain negative values")

    write_or_warn(broken, "the report")
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: the report could not be written (ValueError: 'yerr' must not" in said
