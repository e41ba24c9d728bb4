"""`rlhf prefs` and `rlhf prefs instructions` from the command line: what is written, printed, refused."""

from __future__ import annotations

import json

import pytest

from rlhf_trainer.cli import main
from rlhf_trainer.data.records import Pair
from rlhf_trainer.data.stages import read_pairs
from rlhf_trainer.labelling.instructions import CRITERIA, instructions


def rankings(path, prompts=6):
    """Two who agree and one who ranks the other way round; the last completion is failed by the first two."""
    lines = []
    for i in range(prompts):
        ranks = {"ann": [1, 2, 3, "F"], "bob": [1, 3, 2, "F"], "eve": [4, 3, 2, 1]}
        given = [{"labeller": name, "ranks": ranks[name]} for name in ranks]
        lines.append({"prompt": f"p{i}", "completions": ["a", "b", "c", "d"], "rankings": given})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_pairs_and_report(tmp_path, capsys):
    out = tmp_path / "out" / "pairs.jsonl"
    assert main(["prefs", rankings(tmp_path / "r.jsonl"), "--output", str(out)]) == 0
    pairs, findings = read_pairs(out, strict=True)
    assert not findings.lines
    assert pairs[:6] == [Pair("p0", *sides) for sides in ("ab", "ac", "ad", "cb", "bd", "cd")]
    assert len(pairs) == 36
    report = json.loads((tmp_path / "out" / "pairs.report.json").read_text())
    assert report["votes"] == {
        "comparisons": 36, "pairs": 36, "ties": 0, "disagreements": 0, "failed_completions": 6
    }  # fmt: skip
    assert [one["name"] for one in report["agreement"]["labellers"] if one["outlier"]] == ["eve"]
    printed = capsys.readouterr().out
    assert "r.jsonl: 6 records, format rankings" in printed
    assert "as if rank 1 were the worst" in printed
    assert f"ordinal: {report['agreement']['alpha']:.3f}" in printed
    assert "36 comparisons of 6 prompts: 36 pairs, 0 lost" in printed


def test_options_of_the_vote(tmp_path):
    out = tmp_path / "pairs.jsonl"
    record = {"prompt": "p", "completions": ["a", "b", "c"], "rankings": [{"labeller": "x", "ranks": [1, 1, "F"]}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(record))
    call = ["prefs", str(tmp_path / "r.jsonl"), "--output", str(out), "--ties", "half", "--fails", "remove"]
    assert main(call) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": "p", "chosen": "a", "rejected": "b", "label": 0.5}
    ]


def test_labellers_can_be_left_out(tmp_path, capsys):
    path = rankings(tmp_path / "r.jsonl")
    assert main(["prefs", path, "--without", "eve", "--output", str(tmp_path / "p.jsonl")]) == 0
    assert "eve" not in capsys.readouterr().out
    pairs, _ = read_pairs(tmp_path / "p.jsonl")
    # ann and bob differ on b and c only; with eve there was a majority
    assert pairs[:5] == [Pair("p0", *sides) for sides in ("ab", "ac", "ad", "bd", "cd")]
    assert main(["prefs", path, "--without", "Eve", "--check"]) == 2
    assert "--without Eve: no such labeller; they are ann, bob, eve" in capsys.readouterr().err
    assert main(["prefs", path, "--without", "ann", "bob", "eve", "--check"]) == 2
    assert "no pair came of it" in capsys.readouterr().err


def test_check_shows_three_examples_and_writes_nothing(tmp_path, capsys):
    path = rankings(tmp_path / "r.jsonl")
    before = set(tmp_path.iterdir())
    assert main(["prefs", path, "--check"]) == 0
    assert set(tmp_path.iterdir()) == before
    printed = capsys.readouterr().out
    assert [f"example {i}" in printed for i in (1, 2, 3, 4)] == [True, True, True, False]
    assert "prompt   'p0'\n  chosen   'a'\n  rejected 'b'" in printed


def test_several_files_and_what_is_odd_across_them(tmp_path, capsys):
    one, two = tmp_path / "1.csv", tmp_path / "2.jsonl"
    one.write_text("instruction,chosen,rejected\np,a,b\np,a,a\np,,b\n,a,b\n")
    two.write_text('{"prompt": "p\\n\\n", "chosen": "b", "rejected": "a"}\n' * 2)
    out = tmp_path / "pairs.jsonl"
    assert main(["prefs", str(one), str(two), "--output", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    assert (
        "1.csv: 4 records, format pairs; 1 x chosen equals rejected, dropped (first: line 3), 1 x empty answer"
        in printed
    )
    assert "2.jsonl: 2 records, format pairs; 2 x contradicts an earlier pair (first: line 1), 1 x duplicate" in printed
    out.unlink()
    assert main(["prefs", str(two), str(two), "--strict", "--output", str(out)]) == 2
    assert "2.jsonl:2: duplicate (an error because of --strict)" in capsys.readouterr().err
    assert not out.exists()


def test_contradiction_between_votes_names_its_line(tmp_path, capsys):
    one = {"prompt": "p", "completions": ["a", "b"], "rankings": [{"labeller": "x", "ranks": [1, 2]}]}
    other = {**one, "completions": ["a", "b", "c"], "rankings": [{"labeller": "y", "ranks": [2, 1, 3]}]}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(one) + "\n" + json.dumps(other))
    assert main(["prefs", str(path), "--check"]) == 0
    assert "1 x contradicts an earlier pair (first: line 2)" in capsys.readouterr().out
    assert main(["prefs", str(path), "--check", "--strict"]) == 2
    assert "r.jsonl:2: contradicts an earlier pair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--data is needed"),
        (["{r}"], "--output is needed"),
        (["{r}", "--check", "--format", "csv"], "--format csv: not one of auto, argilla"),
        (["{r}", "--check", "--columns", "prompt"], "--columns prompt: expected ours=theirs"),
        (["{r}", "--check", "--tie", "half"], "unknown option --tie; did you mean ties?"),
        (["{r}", "--check", "--ties", "keep"], "invalid choice: 'keep'"),
        (["{t}", "--output", "{t}.out"], "no pair came of it"),
    ],
)
def test_refused_in_one_sentence(tmp_path, capsys, arguments, error):
    tie = {"prompt": "p", "completions": ["a", "b"], "rankings": [{"labeller": "x", "ranks": [1, 1]}]}
    (tmp_path / "t.jsonl").write_text(json.dumps(tie))
    files = {"r": rankings(tmp_path / "r.jsonl"), "t": str(tmp_path / "t.jsonl")}
    assert main(["prefs", *(argument.format(**files) for argument in arguments)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("rlhf prefs: error: ")
    assert error in text
    assert text.count("\n") == 1
    assert not (tmp_path / "t.jsonl.out").exists()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_instructions_say_the_question_and_the_rules(criterion):
    text = instructions(criterion)
    assert CRITERIA[criterion].question in text
    for rule in ("same rank", '"F"', "Skip it", *CRITERIA[criterion].better, *CRITERIA[criterion].worse):
        assert rule in text


def test_instructions_command(tmp_path, capsys):
    out = tmp_path / "new" / "i.md"
    assert main(["prefs", "instructions", "--criterion", "the reply is polite and short.", "--output", str(out)]) == 0
    assert "Which completion fits this best: the reply is polite and short?" in out.read_text()
    assert main(["prefs", "instructions"]) == 0
    assert capsys.readouterr().out.startswith("# How to rank\n")
    assert main(["prefs", "instructions", "--criterion", "helpfull"]) == 2
    assert "rlhf prefs instructions: error: --criterion helpfull: not one of helpful" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["prefs", "instructions", "--help"])
    assert "example:" in capsys.readouterr().out
