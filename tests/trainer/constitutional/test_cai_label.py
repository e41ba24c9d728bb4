"""`rlhf cai label`: both orders, labels, the report, judges of every kind, resumption, and bad input."""

from __future__ import annotations

import json

import pytest
from support.serving import said, serving
from support.tiny import WORDS, tiny_folder

from rlhf_trainer import CAILabelConfig, label_answers
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.constitutional import label as cai_label
from rlhf_trainer.constitutional.constitution import Constitution
from rlhf_trainer.constitutional.dialogue import make_prompt
from rlhf_trainer.constitutional.label import compare, labelled, statistics, warnings
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.stages import read_pairs
from rlhf_trainer.judging.client import ServerClient
from rlhf_trainer.judging.judges import ModelJudge, both_orders
from rlhf_trainer.judging.shots import Rule
from rlhf_trainer.models.from_scratch import build_model, build_tokenizer

PROMPTS = ["one day", "two good", "red night", "blue bad", "three yes"]
TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
KIND = Rule("kind", "c", "r", "Which is kinder?", 3.0)
SHORT = Rule("short", "c", "r", "Which is shorter?", 1.0)
RULES = Constitution((KIND, SHORT), (), "rules: mine")
JUDGES = """
def always_first(prompts, answers, others):
    return [1.0] * len(prompts)

def shorter(prompts, answers, others):
    return [0.9 if len(a) < len(b) else 0.1 for a, b in zip(answers, others)]
"""


def shorter(prompts, answers, others):
    return [0.9 if len(a) < len(b) else 0.1 if len(a) > len(b) else 0.5 for a, b in zip(answers, others, strict=True)]


@pytest.fixture(scope="module")
def parts():
    tokenizer = build_tokenizer([WORDS] * 4, 300)
    return build_model("llama", tokenizer, hidden_size=32, layers=1, heads=2, max_length=256).eval(), tokenizer


@pytest.fixture
def config(tmp_path):
    def make(**options):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
        defaults = {"model": "m", "prompts": str(tmp_path / "p.jsonl"), "output": str(tmp_path / "l.jsonl")}
        return CAILabelConfig(**{**defaults, "max_new_tokens": 5, "batch_size": 4, "device": "cpu", **options})

    return make


def label(parts, cfg, **objects):
    model, tokenizer = parts
    return label_answers(cfg, model=model, tokenizer=tokenizer, **{"constitution": RULES, **objects})


def test_a_judge_that_always_says_a_decides_nothing():
    prompts = [make_prompt(text, None, False, "") for text in ("p", "q")]
    records = compare(lambda p, a, b: [1.0] * len(p), prompts, [["x", "y"], ["z"]], [[KIND], [KIND]])
    (one,) = records[0]["comparisons"]
    assert one == {"first": 0, "second": 1, "rule": "kind", "shown_first": 1.0, "shown_second": 0.0}
    assert records[1]["comparisons"] == []
    found = [pair for p, record in zip(prompts, records, strict=True) for _, pair in labelled(p, record, {"kind": 3.0})]
    assert [pair["label"] for pair in found] == [0.5]
    figures = statistics(records, found, 0)
    assert (figures["first_place"], figures["order_agreement"], figures["ties"]) == (1.0, 0.0, 1)
    assert figures["without_two_answers"] == 1
    (warning,) = warnings(figures)
    assert warning.startswith("in only 0.0% of the comparisons both orders prefer the same answer")
    assert warnings(figures | {"order_agreement": 0.9, "mass": 0.9}) == []


def test_rules_are_averaged_by_weight_and_questions_reach_the_judge():
    def judge(prompts, answers, others, questions):
        kinder = [0.8 if a == "x" else 0.4 for a in answers]  # 0.8 shown first, 0.6 shown second
        return [k if question == KIND.question else 0.5 for k, question in zip(kinder, questions, strict=True)]

    prompt = make_prompt("p", None, False, "")
    (record,) = compare(judge, [prompt], [["y", "x"]], [[KIND, SHORT]])
    ((_, pair),) = labelled(prompt, record, {"kind": 3.0, "short": 1.0})
    assert (pair["chosen"], pair["rejected"], pair["rule"]) == ("x", "y", "kind, short")
    assert pair["label"] == pytest.approx((3 * 0.7 + 1 * 0.5) / 4)


def test_pairs_are_what_the_judge_said_of_the_answers(parts, config, tmp_path):
    result = label(parts, config(n=3), judge=shorter)
    assert [record["prompt"] for record in result.judged] == PROMPTS
    assert all(len(record["completions"]) == 3 for record in result.judged)
    pairs, findings = read_pairs(tmp_path / "l.jsonl", strict=True)
    assert not findings.lines
    assert {pair.prompt for pair in pairs} == set(PROMPTS)
    for pair in pairs:
        assert len(pair.chosen) < len(pair.rejected)
        assert pair.label == pytest.approx(0.9)
    figures = json.loads((tmp_path / "l.report.json").read_text())
    assert figures["comparisons"] == 15 == figures["pairs"] + figures["ties"]
    assert figures["dropped"] == pytest.approx(figures["ties"] / 15)
    assert figures["first_place"] == pytest.approx(0.5)
    assert figures["order_agreement"] == pytest.approx(figures["pairs"] / 15)
    assert figures["longer_chosen"] == 0
    assert sum(figures["rules"].values()) == 15
    assert set(figures["rules"]) == {"kind", "short"}
    page = (tmp_path / "l.report.html").read_text()
    assert "mean confidence" in page
    assert json.loads((tmp_path / "l.judged.jsonl").read_text().splitlines()[0]) == result.judged[0]


def test_the_model_judges_itself_by_the_rules_question(parts, config):
    model, tokenizer = parts
    result = label(parts, config(output=""), constitution=Constitution((KIND,)))
    for record in result.judged:
        first, second = record["completions"]
        judge = ModelJudge(model, tokenizer)
        both = both_orders(judge, [record["prompt"]], [first], [second], [KIND.question])
        (one,) = record["comparisons"]
        assert [one["shown_first"], one["shown_second"]] == pytest.approx([side.item() for side in both], abs=1e-5)
    assert 0 < result.figures["mass"] < 1
    assert result.figures["no_verdict"] == 0
    masses = [one["mass"] for record in result.judged for one in record["comparisons"]]
    assert result.figures["mass"] == pytest.approx(sum(masses) / 5)
    assert len(result.pairs) == 5
    assert all(0.5 < pair["label"] < 1 for pair in result.pairs)


def test_a_server_that_writes_does_not_stand_in_for_the_judge_named(monkeypatch):
    """--server writes; --judge M is loaded even where --model M is given too."""
    asked = []
    monkeypatch.setattr(cai_label, "load_judge", lambda source, **_: asked.append(source) or shorter)
    cfg = CAILabelConfig(model="m", server="http://127.0.0.1:1/v1#x", judge="m", device="cpu")
    writer = cai_label.ServerWriter(ServerClient(cfg.server), True, cfg.sampling)
    assert cfg.load_judge(writer, ()) is shorter
    assert asked == ["m"]


def test_unsure_pairs_are_dropped(parts, config, tmp_path):
    def judge(prompts, answers, others):
        return [0.7 if "r" in prompt else 0.9 for prompt in prompts]  # the second order says 0.3 or 0.1: a tie

    def fair(prompts, answers, others):
        sure = [0.7 if "r" in prompt else 0.9 for prompt in prompts]
        return [p if a < b else 1 - p for p, a, b in zip(sure, answers, others, strict=True)]

    with pytest.raises(UserError, match="no pair came of 5 comparisons: 5 ties, 0 below"):
        label(parts, config(), judge=judge)
    assert not (tmp_path / "l.jsonl").exists()
    result = label(parts, config(output="", min_confidence=0.8), judge=fair)
    assert {pair["prompt"] for pair in result.pairs} == {"one day", "two good", "blue bad"}
    assert result.figures["below_min_confidence"] == 2
    assert result.figures["dropped"] == pytest.approx(0.4)


@pytest.mark.parametrize("lines", [0, 1, 3, 5])
def test_resumed_files_are_those_of_an_uninterrupted_run(parts, config, tmp_path, lines):
    label(parts, config())
    names = ("l.jsonl", "l.judged.jsonl", "l.report.html", "l.report.json")
    expected = [(tmp_path / name).read_bytes() for name in names]
    path = tmp_path / "l.judged.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in expected[1].split(b"\n")[:lines]) + b'{"prompt": "o')
    with pytest.raises(UserError, match="exists; --resume goes on with it"):
        label(parts, config())
    label(parts, config(resume=True))
    assert [(tmp_path / name).read_bytes() for name in names] == expected


def test_answers_of_a_file_need_no_model(config, tmp_path):
    (tmp_path / "j.py").write_text(JUDGES)
    records = [{"prompt": p, "completions": [" yes", " no good", " yes"]} for p in PROMPTS]
    path = str(write_jsonl(tmp_path / "c.jsonl", records))
    options = {"model": "", "prompts": "", "completions": path, "output": ""}
    result = label_answers(config(**options, judge=f"{tmp_path}/j.py:shorter"), constitution=RULES)
    assert [(pair["chosen"], pair["rejected"], pair["label"]) for pair in result.pairs] == [
        (" yes", " no good", 0.9)
    ] * 5
    with pytest.raises(UserError, match="no pair came of 5 comparisons: 5 ties"):
        label_answers(config(**options, judge=f"{tmp_path}/j.py:always_first"), constitution=RULES)


def test_a_server_writes_and_judges_chats(config, tmp_path):
    def answer(path, payload):
        last = payload["messages"][-1]["content"]
        if "Answer A:" not in last:
            return 200, said("fool" if payload["seed"] % 2 else "thanks")
        assert "Which is kinder?" in last
        return 200, said("B" if "Answer A: fool" in last else "A")

    chats = [[{"role": "system", "content": f"S{i}"}, {"role": "user", "content": "hi"}] for i in range(12)]
    with serving(answer) as (url, _):
        cfg = config(model="", server=f"{url}#m", batch_size=24)
        result = label_answers(cfg, prompts=chats, constitution=Constitution((KIND,)))
    assert result.figures["no_verdict"] == 0
    assert 0 < len(result.pairs) == 12 - result.figures["without_two_answers"] < 12
    (chosen,), (rejected,) = result.pairs[0]["chosen"], result.pairs[0]["rejected"]
    assert chosen == {"role": "assistant", "content": "thanks"}
    assert rejected == {"role": "assistant", "content": "fool"}
    assert result.pairs[0]["prompt"] in chats
    tokenizer = build_tokenizer([WORDS] * 4, 300)
    tokenizer.chat_template = TURNS
    pairs, _ = read_pairs(tmp_path / "l.jsonl", tokenizer)  # the template then writes the chat as text
    assert len(pairs) == len(result.pairs)
    assert pairs[0].prompt.endswith("user: hi\nassistant: ")
    assert (pairs[0].chosen.strip(), pairs[0].rejected.strip()) == ("thanks", "fool")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("cai") / "m", max_length=8192)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", ""], "--model is needed"),
        (["--prompts", ""], "--prompts is needed"),
        (["--n", "1"], "--n 1: two answers at least are compared"),
        (["--min_confidence", "1"], "--min_confidence 1.0: must be at least 0 and below 1"),
        (["--judge", "judge.py:kind"], "judge.py: no such Python file"),
        (["--judge", "/nothing"], "/nothing: no such tokenizer folder"),
        (["--completions", "nothing.jsonl", "--judge", "/nothing"], "nothing.jsonl: no such file"),
        (["--judge", "http://127.0.0.1:1/v1", "--retries", "0"], "is it running?"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, capsys, arguments, error, folder):
    (tmp_path / "p.txt").write_text("one day\n")
    given = ["--model", folder, "--prompts", f"{tmp_path}/p.txt", "--output", f"{tmp_path}/l.jsonl"]
    assert main(["cai", "label", *given, "--max_new_tokens", "5", "--device", "cpu", *arguments]) == 2
    assert error in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_the_report_is_printed(tmp_path, capsys, folder):
    (tmp_path / "p.txt").write_text("one day\ntwo\n")
    given = ["--model", folder, "--prompts", f"{tmp_path}/p.txt", "--output", f"{tmp_path}/l.jsonl"]
    assert main(["cai", "label", *given, "--max_new_tokens", "5", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "position: for the first shown" in out
    assert "(50 % is none)" in out
    assert "left out, the judge gave no verdict" in out
    assert "pairs; " in err
    assert "warning: A and B together have a probability of" in err


def test_a_judge_that_can_read_none_of_it_says_so(tmp_path, capsys):
    short = tiny_folder(tmp_path / "short", max_length=64)
    (tmp_path / "p.txt").write_text("one day\ntwo\n")
    given = ["--model", short, "--prompts", f"{tmp_path}/p.txt", "--output", f"{tmp_path}/l.jsonl"]
    assert main(["cai", "label", *given, "--max_new_tokens", "5", "--device", "cpu"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no pair came of 0 comparisons" in said
    assert "more the judge gave no verdict (unclear, or too long for it)" in said


def test_comparisons_without_a_verdict_are_left_out_and_counted():
    """One that is always silent makes no ties of them; the error says what became of all."""

    def judge(prompts, answers, others):
        return [
            None if "two" in prompt else float(a < b) for prompt, a, b in zip(prompts, answers, others, strict=True)
        ]

    prompts = [make_prompt(text, None, False, "") for text in ("one", "two")]
    records = compare(judge, prompts, [["a", "b"], ["c", "d"]], [[KIND], [KIND]])
    assert [len(record["comparisons"]) for record in records] == [1, 0]
    assert records[1]["no_verdict"] == 1
    figures = statistics(records, [], 0)
    assert (figures["comparisons"], figures["no_verdict"]) == (1, 1)
