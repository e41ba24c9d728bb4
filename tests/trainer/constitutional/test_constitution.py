"""A constitution: our default one, how rules are drawn, and every error with its line."""

from __future__ import annotations

import pytest

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.constitutional.constitution import DEFAULT, Constitution, load_constitution
from rlhf_trainer.judging.shots import Rule

RULE = "  - name: {name}\n    critique: c\n    revision: r\n    question: q\n"
ONE = "rules:\n" + RULE.format(name="kind")


def test_the_default_is_whole_and_shown(capsys):
    found = load_constitution()
    assert len(found.rules) >= 8
    assert len({rule.name for rule in found.rules}) == len(found.rules)
    assert all(rule.question.endswith("?") and rule.question.startswith("Which answer") for rule in found.rules)
    assert len(found.shots) >= 2
    assert main(["cai", "constitution"]) == 0
    out, err = capsys.readouterr()
    assert out == DEFAULT.read_text(encoding="utf-8")
    assert "10 rules" in err
    assert "no-harm 15%" in err  # weight 2 of 13


def test_a_copy_is_read_as_the_default_and_not_overwritten(tmp_path, capsys):
    path = tmp_path / "deep" / "mine.yaml"
    assert main(["cai", "constitution", "--output", str(path)]) == 0
    assert load_constitution(path) == load_constitution()
    assert main(["cai", "constitution", "--output", str(path)]) == 2
    assert "exists; choose another --output" in capsys.readouterr().err
    assert main(["cai", "constitution", str(path)]) == 0


def test_rules_are_drawn_by_weight_and_key_none_twice_before_all():
    rules = tuple(Rule(name, "c", "r", "q", weight) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 5.0)))
    constitution = Constitution(rules)
    firsts = [constitution.draw(1, 0, i)[0].name for i in range(4000)]
    for name, share in (("a", 1 / 8), ("b", 2 / 8), ("c", 5 / 8)):
        assert firsts.count(name) / 4000 == pytest.approx(share, abs=0.03)  # four standard errors
    drawn = [rule.name for rule in constitution.draw(6, 0, 1)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == ["a", "b", "c"]
    assert constitution.draw(2, 0, 1) == constitution.draw(2, 0, 1)
    assert len({tuple(rule.name for rule in constitution.draw(3, seed, 1)) for seed in range(30)}) > 1
    assert [rule.name for rule in constitution.only(["c", "a"]).rules] == ["a", "c"]
    with pytest.raises(UserError, match="unknown rule d; there are a, b, c"):
        constitution.only(["d"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "c.yaml: empty; expected `rules:`"),
        ("rules: [", "c.yaml:1: not YAML"),
        ("- a", "c.yaml:1: expected `key: value` lines with the keys rules, examples"),
        ("examples:\n  - a", "c.yaml:1: no `rules:`"),
        ("rules: a", "c.yaml:1: expected a list of entries"),
        ("rules: []", "c.yaml:1: expected a list of entries"),
        ("rules:\n  - a", "c.yaml:2: expected `key: value` lines"),
        (ONE + "    critiqe: x", "c.yaml:6: unknown key critiqe; did you mean critique?"),
        (ONE + "    colour: x", "c.yaml:6: unknown key colour; it takes name, critique, revision, question, weight"),
        (ONE + "    critique: x", "c.yaml:6: critique is there twice"),
        ("rules:\n  - name: a\n    critique: c\n    revision: r", "c.yaml:2: no `question:`"),
        (ONE + "    weight: 0", "c.yaml:6: weight is '0', expected a number above 0"),
        (ONE + "    weight: much", "c.yaml:6: weight is 'much', expected a number above 0"),
        (ONE + "    weight: [1]", "c.yaml:6: weight is"),
        (ONE + "    weight: .inf", "c.yaml:6: weight is '.inf'"),
        (ONE.replace("critique: c", "critique:"), "c.yaml:3: critique is empty, expected text"),
        (ONE.replace("critique: c", "critique: [c]"), "c.yaml:3: critique is empty, expected text"),
        (ONE + RULE.format(name="kind"), "two rules are called 'kind'"),
        (
            ONE + "examples:\n  - rule: king\n    prompt: p\n    answer: a\n    critique: c\n    revision: r",
            "did you mean kind?",
        ),
        (ONE + "examples:\n  - rule: kind\n    prompt: p", "c.yaml:7: no `answer:`"),
    ],
)
def test_what_is_no_constitution_is_said_with_its_line(tmp_path, capsys, text, reason):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["cai", "constitution", "--constitution", str(path)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_constitution(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"rules: \xe9")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_constitution(tmp_path / "latin.yaml")
