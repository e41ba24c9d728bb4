"""`rlhf generate`: N completions per prompt, the same bits by seed and after an interruption, bad input refused."""

from __future__ import annotations

import json

import pytest
from support.tiny import tiny_folder

from rlhf_trainer.cli import main
from rlhf_trainer.prefs import Config, prepare

PROMPTS = [f"{word} day {'good ' * (i % 3)}" for i, word in enumerate(["one", "two", "three", "red", "blue"])]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def call(tmp_path, model):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))

    def run(name, *arguments):
        options = ["--model", model, "--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / name)]
        sizes = ["--n", "3", "--max_new_tokens", "6", "--batch_size", "6", "--device", "cpu"]
        return main(["generate", *options, *sizes, *arguments]), tmp_path / name

    return run


def test_every_prompt_has_n_completions(call):
    code, path = call("c.jsonl")
    assert code == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["prompt"] for record in records] == PROMPTS
    for record in records:
        assert len(record["completions"]) == len(record["ended"]) == 3
        assert all(type(ended) is bool for ended in record["ended"])
    assert len({text for record in records for text in record["completions"]}) > len(PROMPTS)


def test_the_seed_decides(call):
    first, again, other = (call(*args)[1].read_bytes() for args in (("a",), ("b",), ("c", "--seed", "1")))
    assert first == again != other


def test_the_same_prompt_in_another_batch_is_sampled_afresh(call, tmp_path):
    (tmp_path / "same.txt").write_text("one day\n" * 4)
    _, path = call("c.jsonl", "--prompts", str(tmp_path / "same.txt"))
    first, _, third, _ = path.read_text().splitlines()
    assert first != third


@pytest.mark.parametrize("lines", [0, 1, 3, 4, 5])
def test_resumed_file_is_that_of_an_uninterrupted_run(call, capsys, lines):
    _, whole = call("whole.jsonl")
    expected = whole.read_bytes()
    code, path = call("cut.jsonl")
    kept = b"".join(line + b"\n" for line in expected.split(b"\n")[:lines])
    path.write_bytes(kept + (b"" if lines == 5 else b'{"prompt": "o'))
    assert call("cut.jsonl")[0] == 2
    assert "exists; --resume goes on with it" in capsys.readouterr().err
    code, path = call("cut.jsonl", "--resume")
    assert code == 0
    assert path.read_bytes() == expected


def test_resume_of_another_run_is_refused(call, capsys):
    _, path = call("c.jsonl")
    before = path.read_bytes()
    assert call("c.jsonl", "--resume", "--temperature", "0.5")[0] == 2
    assert "was begun with --temperature 1.0, now it is 0.5" in capsys.readouterr().err
    lines = before.split(b"\n")
    path.write_bytes(b"\n".join([lines[1], lines[0], *lines[2:]]))
    assert call("c.jsonl", "--resume")[0] == 2
    assert "c.jsonl:1: another prompt than prompt 1" in capsys.readouterr().err
    path.with_suffix(".config.yaml").write_text("")
    assert call("c.jsonl", "--resume")[0] == 2
    assert "cannot read" in capsys.readouterr().err
    path.with_suffix(".config.yaml").unlink()
    assert call("c.jsonl", "--resume")[0] == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--n", "0"], "--n 0: must be at least 1"),
        (["--temperature", "0"], "--temperature 0.0: must be more than 0"),
        (["--max_new_tokens", "64"], "prompt 1 of 5 has"),
        (["--stop_token", "no such thing"], "must be exactly one"),
        (["--model", ""], "--model is needed"),
    ],
)
def test_refused_before_anything_is_written(call, capsys, arguments, error):
    code, path = call("c.jsonl", *arguments)
    assert code == 2
    assert error in capsys.readouterr().err
    assert not path.exists()


def test_a_run_that_ended_before_its_first_batch_is_begun_anew(call, tmp_path):
    """With other options too: what was wrong may have been one of them."""
    (tmp_path / "c.jsonl").write_text("")
    code, path = call("c.jsonl", "--n", "2")
    assert code == 0
    assert path.read_text().count("\n") == len(PROMPTS)


def test_a_compressed_output_is_refused(call, capsys):
    code, path = call("c.jsonl.gz")
    assert code == 2
    assert "it grows by a batch at a time, uncompressed; name it .jsonl" in capsys.readouterr().err
    assert not path.exists()


def test_first_prompts_only_and_a_file_to_be_ranked(call, tmp_path):
    _, path = call("c.jsonl", "--max_prompts", "2")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["prompt"] for record in records] == PROMPTS[:2]
    for record in records:
        record["rankings"] = [{"labeller": "x", "ranks": [1, 2, 3]}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = prepare(Config(data=[str(tmp_path / "r.jsonl")]))
    assert {pair.prompt for pair in result.pairs} == set(PROMPTS[:2])
