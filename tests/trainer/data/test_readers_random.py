"""Preferences at random: laws of the vote, and readers that answer any record with a result or one sentence."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from itertools import combinations
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support.preferences import BAD, GOOD, PROMPTED, RANKED, USER, argilla_answers, chat_options, studio

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.agreement import agreement, table
from rlhf_trainer.data.rankings import FAIL, RankedPrompt, Ranking, pairs_from_rankings
from rlhf_trainer.data.readers import read_preferences

RANKS = st.one_of(st.integers(1, 4), st.just(FAIL), st.none())
OPTIONS = st.fixed_dictionaries(
    {"ties": st.sampled_from(["drop", "half"]), "fails": st.sampled_from(["lose", "remove"])}
)

OPTIONS_FOR_CHAT = chat_options()


@st.composite
def records(draw):
    count = draw(st.integers(2, 5))
    texts = draw(st.lists(st.sampled_from("abcde"), min_size=count, max_size=count))
    ranks = st.tuples(*[RANKS] * count)
    given = draw(st.lists(ranks, min_size=1, max_size=5))
    return RankedPrompt("p", tuple(texts), tuple(Ranking(f"l{i}", one) for i, one in enumerate(given)))


def votes(record, **options):
    pairs, outcome = pairs_from_rankings([record], **options)
    sides = [(pair.label, [pair.chosen, pair.rejected]) for pair in pairs]
    # A tie has no order of its own.
    return sorted((label, *(sorted(both) if label == 0.5 else both)) for label, both in sides), outcome


@settings(max_examples=150, deadline=None)
@given(records(), OPTIONS, st.randoms(use_true_random=False))
def test_order_of_completions_and_labellers_does_not_matter(record, options, random):
    columns, rows = list(range(len(record.completions))), list(record.rankings)
    random.shuffle(columns)
    random.shuffle(rows)
    turned = RankedPrompt(
        "p",
        tuple(record.completions[i] for i in columns),
        tuple(Ranking(row.labeller, tuple(row.ranks[i] for i in columns)) for row in rows),
    )
    found, outcome = votes(record, **options)
    again, other = votes(turned, **options)
    assert again == found
    assert vars(other) == vars(outcome)


@settings(max_examples=150, deadline=None)
@given(records(), OPTIONS)
def test_every_comparison_becomes_one_thing(record, options):
    found, outcome = votes(record, **options)
    half = options["ties"] == "half"
    assert outcome.comparisons == outcome.pairs + outcome.disagreements + (0 if half else outcome.ties)
    assert outcome.comparisons <= sum(a != b for a, b in combinations(record.completions, 2))
    assert all(one != other for _, one, other in found)


@settings(max_examples=150, deadline=None)
@given(records(), OPTIONS)
def test_reversed_ranks_reverse_the_pairs(record, options):
    """Of whole rankings; without "F", which has no opposite."""
    rows = tuple(Ranking(r.labeller, tuple(1 if x in (None, FAIL) else x for x in r.ranks)) for r in record.rankings)
    back = tuple(Ranking(r.labeller, tuple(-x for x in r.ranks)) for r in rows)
    found, _ = votes(RankedPrompt("p", record.completions, rows), **options)
    other, _ = votes(RankedPrompt("p", record.completions, back), **options)
    assert sorted((label, b, a) if label == 1 else (label, a, b) for label, a, b in found) == other


@settings(max_examples=100, deadline=None)
@given(st.lists(records(), min_size=1, max_size=8))
def test_the_report_holds_shares(found):
    report = agreement(found)
    assert report.alpha is None or -1 <= report.alpha <= 1
    for one in report.labellers:
        for share in (one.tie_share, one.fail_share, one.agreement, one.others):
            assert share is None or 0 <= share <= 1


WHOLE = [
    PROMPTED,
    RANKED,
    {**RANKED, "rankings": None, "scores": [{"labeller": "x", "scores": [1, 0]}]},
    {"prompt": "p", "completion": "a", "label": True, "labeller": "x"},
    {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]},
    {"chosen": "\n\nHuman: p\n\nAssistant: yes", "rejected": "\n\nHuman: p\n\nAssistant: no"},
    *(argilla_answers(version) for version in ("2", "2 flat", "1", "1 as a data set")),
    studio([{"type": "pairwise", "value": {"selected": "left"}}]),
    studio([{"type": "ranker", "value": {"ranker": {"rank": ["answer1", "answer2"]}}}]),
    studio([{"type": "rating", "to_name": name, "value": {"rating": 1}} for name in ("answer1", "answer2")]),
    studio([{"type": "choices", "value": {"choices": ["answer1"]}}]),
]
JUNK = st.sampled_from(
    [None, True, -1, 1e400, float("nan"), "", "left", "a\nb", "\ud800", [], [[]], {}, {"": []}, ["p", 0]]
)


def places(value, path=()):
    """The path to everything inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


@settings(max_examples=600, deadline=None)
@given(st.data(), st.sampled_from(WHOLE), st.booleans())
def test_readers_answer_a_spoilt_record_with_one_sentence(data, whole, first):
    """One or two places of a good record hold something else, or are gone; in the first record or in a later one."""
    record = json.loads(json.dumps(whole))
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(list(places(record)) or [("prompt",)]))
        parent = record
        for key in path:
            parent = parent[key]
        if data.draw(st.booleans()) and last in (parent if isinstance(parent, dict) else range(len(parent))):
            del parent[last]
        elif isinstance(parent, dict) or last < len(parent):
            parent[last] = deepcopy(data.draw(JUNK))  # the next place may be inside it
    read_or_refuse(json.dumps([record] if first else [whole, record]))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["", "[", "prompt,chosen,rejected\n", '[{"prompt": "p", ']))
def test_readers_answer_any_text_with_one_sentence(text, begin):
    read_or_refuse(begin + text)


def read_or_refuse(text):
    """Whatever is in a file, reading it gives preferences of text, or one sentence that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.any"
        path.write_text(text, encoding="utf-8")
        try:
            read = read_preferences([str(path)], options=OPTIONS_FOR_CHAT)
        except UserError as error:
            reason = str(error)
        else:
            reason = ""
            assert read.pairs or read.ranked
            pairs, _ = pairs_from_rankings(record for record, _ in read.ranked)
            for pair in [*pairs, *(pair for pair, _ in read.pairs)]:
                (pair.prompt + pair.chosen + pair.rejected).encode("utf-8")
            "\n".join(table(agreement([record for record, _ in read.ranked]))).encode("utf-8")
    assert not reason or ("f.any" in reason and "\n" not in reason)
