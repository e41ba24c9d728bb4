"""Best-of-N: what is kept, the estimate of the best of n, the files, resumption, and bad input."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from support.tiny import tiny_folder

from rlhf_trainer import BonConfig, best_of_n, bon, generate
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.data.stages import read_examples, read_pairs
from rlhf_trainer.models.loading import load_causal, load_tokenizer

PROMPTS = ["one two", "red", "blue night", "a good day", "bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("bon") / "base")


@pytest.fixture
def reward(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(
        "def vowels(prompts, completions):\n    return [sum(c in 'aeiou' for c in t) for t in completions]\n"
    )
    return f"{path}:vowels"


@pytest.fixture
def config(folder, reward, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def make(name="best", **options):
        defaults = {"prompts": str(tmp_path / "prompts.txt"), "output": str(tmp_path / name / "best.jsonl")}
        defaults |= {"model": folder, "reward": reward, "n": 4, "max_new_tokens": 8, "batch_size": 8}
        return BonConfig(**{**defaults, **options})

    return make


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_best_completion_is_kept():
    record = {"prompt": "p", "completions": ["a", "b", "c", "d"], "ended": [True, False, True, True]}
    assert bon.chosen(record | {"scores": [1.0, 3.0, 3.0, 0.0]}) == {
        "prompt": "p",
        "completion": "b",
        "score": 3.0,
        "ended": False,
    }
    pair = bon.worst_pair(record | {"scores": [1.0, 3.0, 3.0, 0.5]})
    assert pair == {"prompt": "p", "chosen": "b", "rejected": "d", "margin": 2.5}


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_subsets(n):
    scores = np.array([[3.0, 1.0, 4.0, 1.0, 5.0], [-2.0, -7.0, 0.5, 0.5, 0.0]])
    expected = [np.mean([max(s) for s in itertools.combinations(row, n)]) for row in scores]
    np.testing.assert_allclose(bon.expected_best(scores, n), expected, rtol=1e-12)


def test_kl_bound_is_the_kl_where_no_two_scores_are_equal():
    """Best of n of K equally likely, all different completions: KL by enumeration, below the bound and close to it."""
    for n, k in ((1, 10), (2, 2000), (16, 20000)):
        edges = np.arange(k + 1) / k
        best = edges[1:] ** n - edges[:-1] ** n
        kl = float((best * np.log(np.maximum(best, 1e-300) * k)).sum())
        assert bon.kl_bound(n) - 0.01 < kl <= bon.kl_bound(n) + 1e-12
    assert bon.kl_bound(16) == pytest.approx(math.log(16) - 15 / 16)


def test_files_belong_together(config, tmp_path, capsys):
    cfg = config(pairs=str(tmp_path / "pairs.jsonl"))
    figures = bon.run(cfg)
    best, samples = records(tmp_path / "best" / "best.jsonl"), records(tmp_path / "best" / "best.samples.jsonl")
    assert [record["prompt"] for record in best] == PROMPTS == [record["prompt"] for record in samples]
    for record, kept in zip(samples, best, strict=True):
        assert record["scores"] == [sum(c in "aeiou" for c in text) for text in record["completions"]]
        assert len(record["completions"]) == len(record["ended"]) == 4
        assert kept["score"] == max(record["scores"])
        assert kept["completion"] == record["completions"][record["scores"].index(kept["score"])]
    by_n = {entry["n"]: entry["reward"] for entry in figures["by_n"]}
    assert list(by_n) == [1, 2, 4]
    assert by_n[4]["mean"] == pytest.approx(np.mean([record["score"] for record in best]))
    assert by_n[1]["mean"] == pytest.approx(np.mean([record["scores"] for record in samples]))
    assert by_n[1]["mean"] < by_n[2]["mean"] < by_n[4]["mean"]
    assert by_n[4]["low"] <= by_n[4]["mean"] <= by_n[4]["high"]
    assert json.loads((tmp_path / "best" / "best.report.json").read_text()) == figures
    page = (tmp_path / "best" / "best.report.html").read_text()
    assert "data:image/png;base64" in page
    assert "best of 4" in page
    examples, _ = read_examples(cfg.output)  # what sft reads
    assert [(e.prompt, e.completion) for e in examples] == [
        (r["prompt"], r["completion"]) for r in best if r["completion"].strip()
    ]
    pairs, _ = read_pairs(cfg.pairs)
    assert all(pair.margin > 0 for pair in pairs)
    assert "of the best of 4" in capsys.readouterr().err


def test_the_penalty_is_for_completions_that_did_not_end(config):
    free = best_of_n(config("free")).samples
    fined = best_of_n(config("fined", missing_eos_penalty=100.0)).samples
    for a, b in zip(free, fined, strict=True):
        expected = [score - 100.0 * (not ended) for score, ended in zip(a["scores"], a["ended"], strict=True)]
        assert b["scores"] == expected
    assert any(not ended for record in free for ended in record["ended"])


def test_an_interrupted_run_goes_on_to_the_same_files(config, tmp_path, monkeypatch):
    bon.run(config("whole"))
    real, calls = bon.score, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bon, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            bon.run(config("killed"))
    assert len(records(tmp_path / "killed" / "best.samples.jsonl")) == 2
    assert not (tmp_path / "killed" / "best.jsonl").exists()
    with pytest.raises(UserError, match="--resume goes on with it"):
        bon.run(config("killed"))
    with pytest.raises(UserError, match=r"was begun with --missing_eos_penalty 0\.0, now it is 1.0"):
        bon.run(config("killed", resume=True, missing_eos_penalty=1.0))
    bon.run(config("killed", resume=True))
    for name in ("best.jsonl", "best.samples.jsonl", "best.report.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_objects_instead_of_folders_give_the_same_and_write_nothing(config, folder, tmp_path):
    written = best_of_n(config("written"))
    tokenizer = load_tokenizer(folder)
    given = best_of_n(
        config(model="", reward="", prompts="", output=""),
        model=load_causal(folder, tokenizer),
        tokenizer=tokenizer,
        reward=lambda prompts, completions: [sum(c in "aeiou" for c in text) for text in completions],
        prompts=PROMPTS,
    )
    assert given.best == written.best
    assert given.figures == written.figures
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"judge.py", "prompts.txt", "written"}


def test_completions_are_those_of_generate(config, folder, tmp_path):
    """The same prompts, options and seed sample the same completions: scoring changes nothing."""
    cfg = config()
    best_of_n(cfg)
    names = ("model", "prompts", "n", "max_new_tokens", "batch_size")
    plain = generate.Config(output=str(tmp_path / "plain.jsonl"), **{name: getattr(cfg, name) for name in names})
    generate.run(plain)
    samples = records(tmp_path / "best" / "best.samples.jsonl")
    assert [record["completions"] for record in records(tmp_path / "plain.jsonl")] == [
        record["completions"] for record in samples
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n": 0}, "--n 0: must be at least 1"),
        ({"bootstrap": 0}, "--bootstrap 0: must be at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0: must be more than 0"),
        ({"reward": "nowhere.py:f"}, "nowhere.py: no such Python file"),
        ({"prompts": "nothing.txt"}, "nothing.txt: no such file"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(config, tmp_path, capsys, options, reason):
    cfg = config(**options)
    names = ("model", "prompts", "reward", "output", "n", "temperature", "bootstrap", "max_new_tokens")
    arguments = [word for name in names for word in (f"--{name}", str(getattr(cfg, name)))]
    assert main(["bon", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("rlhf bon: error: ")
    assert reason in message
    assert "\n" not in message
    assert not (tmp_path / "best").exists()
