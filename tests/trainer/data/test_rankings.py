"""Rankings -> pairs: majority, ties, fail marks, labellers who disagree."""

from __future__ import annotations

import json

import pytest

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.rankings import RankedPrompt, Ranking, merge, pairs_from_rankings, read_rankings
from rlhf_trainer.data.records import DataReport, Pair


def ranked(*rankings, completions="abc"):
    named = tuple(Ranking(f"labeller {i}", tuple(ranks)) for i, ranks in enumerate(rankings))
    return RankedPrompt("p", tuple(completions), named)


def preferences(record, **options):
    pairs, votes = pairs_from_rankings([record], **options)
    assert votes.pairs == len(pairs)
    return {(pair.chosen, pair.rejected, pair.label) for pair in pairs}, votes


def test_one_labeller_gives_every_pair_preferred_first():
    assert preferences(ranked([2, 1, 3]))[0] == {("b", "a", 1.0), ("a", "c", 1.0), ("b", "c", 1.0)}


def test_ranks_count_by_order_not_by_size():
    assert preferences(ranked([20, -1.5, 300]))[0] == preferences(ranked([2, 1, 3]))[0]


def test_majority_overrules_one_labeller():
    found, votes = preferences(ranked([1, 2], [1, 2], [2, 1], completions="ab"))
    assert found == {("a", "b", 1.0)}
    # each of the first two faces one vote for and one against, so no majority of the others to agree with
    assert votes.agreement() == {"labeller 2": 0.0}


def test_agreement_shows_who_misread_the_task():
    records = [ranked([1, 2, 3], [1, 2, 3], [1, 2, 3], [3, 2, 1])] * 5
    _, votes = pairs_from_rankings(records)
    assert votes.agreement() == {"labeller 0": 1.0, "labeller 1": 1.0, "labeller 2": 1.0, "labeller 3": 0.0}


def test_disagreement_gives_no_pair_and_is_counted():
    found, votes = preferences(ranked([1, 2], [2, 1], completions="ab"))
    assert found == set()
    assert votes.disagreements == 1
    # two say tie, two say a: no outcome leads
    assert preferences(ranked([1, 1], [1, 1], [1, 2], [1, 2], completions="ab"))[1].disagreements == 1


def test_ties_are_dropped_or_kept_as_half_labels():
    tie = ranked([1, 1], [1, 1], [1, 2], completions="ab")
    found, votes = preferences(tie)
    assert found == set()
    assert (votes.ties, votes.disagreements) == (1, 0)
    assert preferences(tie, ties="half")[0] == {("a", "b", 0.5)}


def test_fail_marks_lose_to_every_ranked_one():
    assert preferences(ranked(["F", 1, 2]), fails="lose")[0] == {("b", "a", 1.0), ("c", "a", 1.0), ("b", "c", 1.0)}
    # two failed ones are not comparable
    assert preferences(ranked(["F", 1, "F"]), fails="lose")[0] == {("b", "a", 1.0), ("b", "c", 1.0)}


def test_fail_marks_remove():
    found, votes = preferences(ranked(["F", 1, 2], ["F", 1, 2], [1, 2, 3]), fails="remove")
    assert found == {("b", "c", 1.0)}
    assert votes.failed_completions == 1
    # marked by half, not by most: still compared by those who ranked it
    assert ("a", "b", 1.0) in preferences(ranked(["F", 2, 3], [1, 2, 3]), fails="remove")[0]
    # marked by a minority: those who ranked it decide
    assert ("a", "b", 1.0) in preferences(ranked(["F", 1, 2], [1, 2, 3], [1, 2, 3]), fails="remove")[0]


def test_the_same_text_twice_is_no_pair():
    assert preferences(ranked([1, 2], completions="aa"))[0] == set()


def test_prompts_stay_apart():
    records = [ranked([1, 2], completions="ab"), RankedPrompt("q", ("a", "b"), (Ranking("x", (2, 1)),))]
    pairs, _ = pairs_from_rankings(records)
    assert pairs == [Pair("p", "a", "b"), Pair("q", "b", "a")]


def line(**changes):
    record = {"prompt": "p", "completions": ["a", "b"], "rankings": [{"labeller": "x", "ranks": [1, "F"]}]}
    return json.dumps({**record, **changes}) + "\n"


def test_reads_what_the_docstring_shows(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(line())
    assert read_rankings(path) == [RankedPrompt("p", ("a", "b"), (Ranking("x", (1, "F")),))]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"completions": ["a"]}, "at least two texts"),
        ({"completions": ["a", 3]}, "'completions' is int"),
        ({"rankings": []}, "at least one ranking"),
        ({"rankings": [[1, 2]]}, "a ranking must be"),
        ({"rankings": [{"labeller": "x", "ranks": [1]}]}, "1 ranks for 2 completions"),
        ({"rankings": [{"labeller": "x", "ranks": [1, "best"]}]}, "rank 'best' is neither"),
        ({"rankings": [{"labeller": "x", "ranks": [1, None]}]}, "rank None is neither"),
        ({"rankings": [{"labeller": "x", "ranks": [1, float("nan")]}]}, "rank nan is neither"),
        ({"rankings": [{"ranks": [1, 2]}]}, "no field 'labeller'"),
        ({"rankings": [{"labeller": "x", "ranks": [1, 2]}] * 2}, "one labeller ranks it twice"),
        ({"prompt": None}, "'prompt' is NoneType"),
    ],
)
def test_malformed_rankings_name_file_and_line(tmp_path, changes, reason):
    path = tmp_path / "r.jsonl"
    path.write_text(line() + line(**changes))
    with pytest.raises(UserError, match=rf"r\.jsonl:2: .*{reason}"):
        read_rankings(path)


def test_merging_puts_ranks_where_their_completions_stand(tmp_path):
    findings = DataReport(tmp_path, strict=False)
    one = RankedPrompt("p", ("c", "a", "b", "a"), (Ranking("x", (1, 2, 3, 4)),))
    two = RankedPrompt("p", ("b", "a", "a", "c"), (Ranking("y", (10, 20, 30, 40)),))
    other = RankedPrompt("p", ("b", "a", "c"), (Ranking("y", (1, 2, 3)),))
    merged = [record for record, _ in merge((record, findings) for record in (one, two, other))]
    rankings = (Ranking("x", (1, 2, 3, 4)), Ranking("y", (40, 20, 10, 30)))
    assert merged == [RankedPrompt("p", ("c", "a", "b", "a"), rankings), other]
    assert not findings.lines
