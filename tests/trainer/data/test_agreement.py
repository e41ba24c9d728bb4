"""Agreement of labellers: alpha against the definition, the odd one out named, others left alone."""

from __future__ import annotations

import math
import random
import sys
from itertools import permutations

import pytest

from rlhf_trainer.data.agreement import agreement, krippendorff_alpha, positions, table
from rlhf_trainer.data.rankings import RankedPrompt, Ranking
from rlhf_trainer.prefs import agreement_lines


def records(prompts, **labellers):
    """`labellers`: name -> function (prompt number) -> ranks."""
    return [
        RankedPrompt(f"p{i}", ("a", "b", "c", "d"), tuple(Ranking(name, tuple(f(i))) for name, f in labellers.items()))
        for i in range(prompts)
    ]


def truth(i):
    return random.Random(i).sample([1, 2, 3, 4], 4)


def noisy(seed, swaps=1):
    def ranks(i):
        rng, found = random.Random(f"{seed} {i}"), truth(i)
        for _ in range(swaps):
            k = rng.randrange(1, 4)
            one, two = found.index(k), found.index(k + 1)
            found[one], found[two] = found[two], found[one]
        return found

    return ranks


def reverse(i):
    return [5 - rank for rank in truth(i)]


def coin(i):
    return random.Random(f"coin {i}").sample([1, 2, 3, 4], 4)


def alpha_by_definition(units):
    """Krippendorff 2011, ordinal, straight from the definition: 1 - observed / expected disagreement."""
    units = [unit for unit in units if len(unit) >= 2]
    values = sorted(value for unit in units for value in unit)
    count = {value: values.count(value) for value in values}

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        between = sum(count[v] for v in count if low <= v <= high)
        return (between - (count[a] + count[b]) / 2) ** 2

    observed = sum(distance(a, b) / (len(unit) - 1) for unit in units for a, b in permutations(unit, 2))
    expected = sum(distance(a, b) for a, b in permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


def test_alpha_is_that_of_the_definition():
    found = records(12, a=noisy(1), b=noisy(2), c=coin)
    units = [
        [ranking.ranks[k] for ranking in record.rankings] for record in found for k in range(len(record.completions))
    ]
    assert krippendorff_alpha(found) == pytest.approx(alpha_by_definition(units), abs=1e-12)


def test_alpha_of_places_with_ties_fails_and_gaps():
    record = RankedPrompt(
        "p", ("a", "b", "c"), (Ranking("x", (1, 1, "F")), Ranking("y", (10, 30, 20)), Ranking("z", (1, 2, 3)))
    )
    units = [[1.5, 1, 1], [1.5, 3, 2], [3, 2, 3]]
    assert krippendorff_alpha([record]) == pytest.approx(alpha_by_definition(units), abs=1e-12)
    assert positions([1, 1, "F", None]) == pytest.approx([1.5, 1.5, 3, math.nan], nan_ok=True)


def test_alpha_of_scores_compares_sizes_not_places():
    """Both thumbs up on one prompt, both down on another: agreement that places within a prompt cannot show."""
    both_up = RankedPrompt("p", ("a", "b"), (Ranking("x", (-1, -1)), Ranking("y", (-1, -1))), scored=True)
    both_down = RankedPrompt("q", ("a", "b"), (Ranking("x", (0, 0)), Ranking("y", (0, 0))), scored=True)
    assert krippendorff_alpha([both_up, both_down]) == 1.0


def test_alpha_at_its_ends():
    assert krippendorff_alpha(records(5, a=truth, b=truth)) == 1.0
    assert krippendorff_alpha(records(200, a=truth, b=coin)) == pytest.approx(0.0, abs=0.1)
    assert krippendorff_alpha(records(50, a=truth, b=reverse)) < -0.9
    assert krippendorff_alpha(records(5, a=truth)) is None
    assert krippendorff_alpha(records(5, a=lambda i: [1] * 4, b=lambda i: [2] * 4)) is None


@pytest.mark.parametrize("others", [{"a": noisy(1), "b": noisy(2)}, {"a": noisy(1), "b": noisy(2), "c": noisy(3, 2)}])
@pytest.mark.parametrize("odd", [reverse, coin])
def test_the_odd_one_out_is_named_and_nobody_else(others, odd):
    report = agreement(records(30, **others, odd=odd))
    assert [one.name for one in report.labellers if one.outlier] == ["odd"]
    assert report.alpha_without_outliers > report.alpha + 0.2
    remark = next(one.remark for one in report.labellers if one.name == "odd")
    assert ("rank 1 were the worst" in remark) == (odd is reverse)


def test_agreement_counts_comparisons_that_both_decided():
    report = agreement(records(10, a=truth, b=truth, odd=reverse))
    by_name = {one.name: one for one in report.labellers}
    assert (by_name["a"].agreement, by_name["a"].others) == (0.5, 0.0)
    assert (by_name["odd"].agreement, by_name["odd"].others) == (0.0, 1.0)


def test_equals_of_different_noise_are_no_outliers():
    report = agreement(records(40, a=noisy(1), b=noisy(2), c=noisy(3), d=noisy(4)))
    assert not [one for one in report.labellers if one.outlier]
    assert report.alpha_without_outliers is None
    assert not [one for one in agreement(records(4, a=truth, b=truth, odd=reverse)).labellers if one.outlier]


def test_two_labellers_cannot_say_who_is_odd():
    report = agreement(records(30, a=truth, b=reverse))
    assert not [one for one in report.labellers if one.outlier]
    assert [one.others for one in report.labellers] == [None, None]


def test_ties_and_fails_are_shown():
    report = agreement(records(6, a=truth, lazy=lambda i: [1, 1, 1, "F"]))
    lazy = next(one for one in report.labellers if one.name == "lazy")
    assert (lazy.tie_share, lazy.fail_share, lazy.prompts) == (0.5, 0.25, 6)
    always = agreement(records(6, a=truth, same=lambda i: [1] * 4)).labellers[1]
    assert "a tie" in always.remark
    lines = table(report)
    assert len(lines) == 3
    assert lines[2].split()[:4] == ["lazy", "6", "50%", "25%"]


def test_without_the_library_everything_else_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "krippendorff", None)  # as if it were not installed
    report = agreement(records(20, a=truth, b=truth, c=lambda i: [5 - rank for rank in truth(i)]))
    assert report.alpha is None
    assert report.labellers[0].agreement == 0.5
    assert "pip install krippendorff" in agreement_lines(report, 20)[0]
