"""Gates of `rlhf eval`, and win rates by reward and judge."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support.tiny import tiny_folder

from rlhf_trainer.base import conditions as eval_gates
from rlhf_trainer.base.conditions import Condition, parse_gates
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.judging import win_rates

MEASURES = ["KL (nats)", "toxicity", "distinct-2", "win rate by reward"]
JUDGES = """
def longer(prompts, completions):
    return [float(len(completion)) for completion in completions]

def first_place(prompts, answers, others):
    return [0.9] * len(prompts)

def longer_wins(prompts, answers, others):
    return [1.0 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.0 for a, b in zip(answers, others)]

def percent(prompts, answers, others):
    return [50.0] * len(prompts)
"""


def test_a_gate_names_measure_comparison_and_bound():
    assert parse_gates(["toxicity>0.05"], MEASURES) == [Condition("toxicity>0.05", False, "toxicity", ">", 0.05)]
    assert parse_gates([" kl >= 1e1 "], MEASURES)[0] == Condition(" kl >= 1e1 ", False, "KL (nats)", ">=", 10.0)
    gate = parse_gates(["change in distinct-2 < -.1"], MEASURES)[0]
    assert (gate.change, gate.measure, gate.comparison, gate.bound) == (True, "distinct-2", "<", -0.1)
    assert parse_gates(["win rate by reward<=0.5"], MEASURES)[0].measure == "win rate by reward"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("toxicity", "expected a measure, one of > >= < <=, and a number"),
        ("toxicity>", "expected a measure"),
        ("toxicity>a", "expected a measure"),
        ("toxicity>1e", "expected a measure"),
        ("toxicity=0.1", "expected a measure"),
        (">0.1", "expected a measure"),
        ("reward<0", "no measure 'reward' here; there are kl, toxicity, distinct-2, win rate by reward"),
    ],
)
def test_what_is_no_gate_is_refused(text, reason):
    with pytest.raises(UserError) as error:
        parse_gates([text], MEASURES)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("comparison", "failing", "passing"), [(">", 0.6, 0.5), (">=", 0.5, 0.4), ("<", 0.4, 0.5), ("<=", 0.5, 0.6)]
)
def test_a_gate_fails_at_its_bound_as_written(comparison, failing, passing):
    gate = Condition("", False, "reward", comparison, 0.5)
    assert gate.fails(failing)
    assert not gate.fails(passing)
    assert gate.fails(math.nan)


def test_gates_are_checked_for_every_policy_after_the_first():
    result = {
        "policies": {name: {"measures": {"toxicity": {"mean": mean}}} for name, mean in (("a", 0.9), ("b", 0.2))},
        "changes": {"b": {"toxicity": {"mean": -0.7}}},
    }
    gates = parse_gates(["toxicity>0.5", "change in toxicity>-1"], ["toxicity"])
    assert eval_gates.check_gates(gates, result) == [
        {"gate": "toxicity>0.5", "policy": "b", "value": 0.2, "failed": False, "undecided": False},
        {"gate": "change in toxicity>-1", "policy": "b", "value": -0.7, "failed": True, "undecided": False},
    ]


@pytest.mark.parametrize(
    ("text", "low", "high", "value", "failed", "undecided"),
    [
        ("toxicity>0.05", 0.0, 0.28, 0.0, False, True),
        ("toxicity>0.05 @95", 0.0, 0.28, 0.28, True, False),
        ("toxicity>0.05 @95", 0.0, 0.04, 0.04, False, False),
        ("toxicity<0.5@95", 0.4, 0.9, 0.4, True, False),
        ("toxicity>0.05", None, None, 0.0, False, False),
        ("toxicity>0.05 @95", None, None, math.nan, True, False),
    ],
)
def test_a_gate_may_ask_the_interval(text, low, high, value, failed, undecided):
    estimate = {"mean": 0.0, "low": low, "high": high}
    result = {"policies": {"b": {"measures": {"toxicity": estimate}}}, "changes": {"b": {}}}
    (found,) = eval_gates.check_gates(parse_gates([text], ["toxicity"]), result)
    assert found["value"] == pytest.approx(value, nan_ok=True)
    assert (found["failed"], found["undecided"]) == (failed, undecided)


def test_alerts_have_no_interval():
    with pytest.raises(UserError, match="@95 is for estimates with an interval"):
        parse_gates(["objective/kl>5 @95"], None, "--alert")


def test_wins_count_ties_as_half():
    assert win_rates.wins(np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])).tolist() == [1.0, 0.5, 0.0]


def test_a_judge_that_favours_a_place_is_even():
    found = win_rates.preferred_by_judge(lambda p, a, b: [0.9] * len(p), ["p", "q"], ["a", "b"], ["c", "d"])
    np.testing.assert_allclose(found, 0.5)
    fair = win_rates.preferred_by_judge(
        lambda p, a, b: [float(x > y) for x, y in zip(a, b, strict=True)], ["p"], ["b"], ["a"]
    )
    assert fair.tolist() == [1.0]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("gates")
    tiny_folder(root / "sft", seed=0, max_length=512)  # it judges as well
    tiny_folder(root / "ppo", seed=1)
    (root / "prompts.txt").write_text("one day\ntwo good\nred night\nblue bad\n")
    (root / "judges.py").write_text(JUDGES)
    return root


def command(places, output, *options):
    given = ["--before", f"{places}/sft", "--after", f"{places}/ppo", "--prompts", f"{places}/prompts.txt"]
    return main(["eval", *given, "--output_dir", str(output), "--max_new_tokens", "6", "--bootstrap", "50", *options])


def test_a_failed_gate_is_exit_code_1_and_everything_is_written(places, tmp_path, capsys):
    reward = ["--reward", f"{places}/judges.py:longer", "--judge", f"{places}/judges.py:longer_wins"]
    assert command(places, tmp_path, *reward, "--fail-if", "kl>1000", "length<0", "win rate by judge>2") == 0
    assert "FAILED" not in capsys.readouterr().out
    result = json.loads((tmp_path / "eval.json").read_text())
    before, after = (result["policies"][name]["measures"] for name in result["policies"])
    for key in ("win rate by reward", "win rate by judge"):
        assert before[key] == {"mean": 0.5, "low": 0.5, "high": 0.5}
        assert 0 <= after[key]["low"] <= after[key]["mean"] <= after[key]["high"] <= 1
    assert after["win rate by judge"] == after["win rate by reward"]  # the same preference, asked in two ways
    texts = [list(json.loads(line)["completions"].values()) for line in (tmp_path / "completions.jsonl").open()]
    share = np.mean([(len(b) > len(a)) + 0.5 * (len(b) == len(a)) for a, b in texts])
    assert after["win rate by reward"]["mean"] == pytest.approx(share)
    model = ["--judge", f"{places}/sft", "--judge_question", "Which is kinder?"]
    assert command(places, tmp_path, *model, "--fail-if", "kl>1000", "kl>-1000") == 1
    out = capsys.readouterr().out
    assert "passed: ppo, --fail_if 'kl>1000'" in out
    assert "FAILED: ppo, --fail_if 'kl>-1000'" in out
    result = json.loads((tmp_path / "eval.json").read_text())
    assert [gate["failed"] for gate in result["gates"]] == [False, True]
    assert 0 < result["policies"]["ppo"]["measures"]["win rate by judge"]["mean"] < 1  # a model is never certain
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--fail_if", "toxicity>0.05"], "no measure 'toxicity' here"),
        (["--judge", "judges.py:nobody"], "judges.py: no such Python file"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(places, tmp_path, capsys, options, reason):
    assert command(places, tmp_path / "out", *options) == 2
    message = capsys.readouterr().err.strip()
    assert reason in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_judge_outside_0_and_1_is_refused(places, tmp_path, capsys):
    assert command(places, tmp_path, "--judge", f"{places}/judges.py:percent") == 2
    assert "the judge function returned a number outside [0, 1]" in capsys.readouterr().err
