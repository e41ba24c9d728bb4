"""Held-out records: no conversation stands on both sides, overlap is counted, samples are drawn from the whole."""

from __future__ import annotations

import itertools

import pytest

from rlhf_trainer.data.records import DataReport, Example, Pair
from rlhf_trainer.data.splits import KNOWN, RESPELLED, conversations, drawn, load_train_and_heldout

TURN = "<|user|>{}<|assistant|>"


def chat(name, turns):
    """The examples of a chat, one for each answer, as its template writes them."""
    prompt, found = "<|system|>be kind", []
    for turn in range(turns):
        prompt += TURN.format(f"{name} asks {turn}")
        found.append(Example(prompt, f"{name} is told {turn}"))
        prompt += found[-1].completion
    return found


def dialogue(name, turns):
    """Pairs of a transcript, whose prompts go on from an answer that is neither of the two."""
    texts = itertools.accumulate(f"\n\nHuman: {name} {i}\n\nAssistant: so {i}" for i in range(turns))
    return [Pair(text[: text.rindex(":") + 1], f" good {name}", f" bad {name}") for text in texts]


def split(records, **options):
    given = {"data": "data", "eval_data": None, "heldout": 0.3, "seed": 0, "strict": False, "given": records}
    return load_train_and_heldout(lambda *_: pytest.fail("read"), None, **{**given, **options})


@pytest.mark.parametrize("make", [chat, dialogue])
@pytest.mark.parametrize("seed", range(3))
def test_no_conversation_is_on_both_sides(make, seed):
    records = [record for i in range(18) for record in make(f"person{i}x", 4)]
    found = split(records, seed=seed)
    assert 0 < len(found.heldout) < len(found.training)
    assert len(found.training) + len(found.heldout) == len(records)
    names = [
        {next(w for w in r.prompt.replace("<", " ").replace(">", " ").split() if "person" in w) for r in side}
        for side in (found.training, found.heldout)
    ]
    assert not names[0] & names[1]


def test_transcripts_that_part_after_their_first_turn_are_one():
    first = "\n\nHuman: hello\n\nAssistant:"
    parted = [f"{first} hi\n\nHuman: {x}\n\nAssistant:" for x in ("red", "blue")]
    assert len(set(conversations(parted))) == 1
    assert len(set(conversations([*parted, "\n\nHuman: hello you\n\nAssistant:"]))) == 2


def test_a_longer_word_or_an_empty_prompt_is_no_conversation():
    assert len(set(conversations(["a", "ab", "abc", "", "", "a day", "a day"]))) == 6


def test_unicode_form_and_outer_spaces_do_not_part_prompts(capsys):
    texts = ["caf\u00e9?", "cafe\u0301?", " caf\u00e9?\n", "tea?"]
    assert [group == conversations(texts)[0] for group in conversations(texts)] == [True, True, True, False]
    found = split([Example(text, "yes", line=i) for i, text in enumerate(texts, start=1)], heldout=1)
    assert found.report.lines[RESPELLED] == [2, 3]
    found.say("examples", training=1, heldout=3)
    assert f"2 x {RESPELLED}" in " ".join(capsys.readouterr().err.split())


def test_eval_data_that_is_known_is_counted():
    training = [record for name in ("ann", "bob") for record in chat(name, 3)]
    other = [*chat("bob", 1), *chat("cid", 2)]
    read = lambda path, *_: (other, DataReport(path))  # noqa: E731
    found = load_train_and_heldout(
        read, None, data="data", eval_data="other", heldout=0.1, seed=0, strict=False, given=training
    )
    assert found.heldout == other
    assert found.heldout_report[KNOWN] == 1


def test_a_sample_is_of_the_whole():
    found = drawn(range(1000), 100, seed=0)
    assert found == sorted(set(found))
    assert len(found) == 100
    assert max(found) > 900
    assert drawn(range(1000), 100, seed=1) != found == drawn(range(1000), 100, seed=0)
    assert drawn([3, 1, 2], 5, seed=0) == [3, 1, 2]
