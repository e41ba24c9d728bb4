"""SFT: what counts in the loss, reproducibility, resumption, and how bad input ends."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_folder

from rlhf_trainer import sft
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.data import rows
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.rows import TokenizedExample, tokenize_example
from rlhf_trainer.models import logprobs
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.sampling.rollout import generate

EXAMPLES = [{"prompt": f"{a} {b}", "completion": f" {b} {a}"} for a in ("one", "two", "red") for b in ("day", "good")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("sft") / "base")


@pytest.fixture(scope="module")
def parts(folder):
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_causal(folder, tokenizer).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "examples.jsonl", EXAMPLES * 4))


def config(folder, data, output, **options):
    defaults = {"model": folder, "data": data, "output_dir": str(output), "heldout": 0, "batch_size": 8, "lr": 3e-3}
    return sft.Config(**{**defaults, **options})


def row(tokenizer, prompt, completion):
    return tokenize_example(tokenizer, prompt, completion, 64)[0]


def test_loss_is_the_log_probability_of_completion_and_eos(parts):
    tokenizer, model = parts
    rows = [row(tokenizer, "one two three", " yes"), row(tokenizer, "a", " good day thanks")]
    losses = logprobs.completion_losses(model, rows, tokenizer.pad_token_id)
    for item, loss in zip(rows, losses, strict=True):
        logits = model(input_ids=torch.tensor([item.ids])).logits[0].double()
        each = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(item.ids[1:])[:, None])[:, 0]
        expected = -each[item.prompt_length - 1 :].sum()
        assert item.ids[-1] == tokenizer.eos_token_id
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_prompt_and_padding_tokens_are_no_targets(parts):
    tokenizer, model = parts
    output = model.get_output_embeddings().weight
    saved = output.detach().clone()
    try:
        output.data.zero_()  # every token has probability 1/V: a target more or less would show
        rows = [row(tokenizer, "one", " yes"), row(tokenizer, "one two three good bad day", " yes")]
        losses = logprobs.completion_losses(model, rows, tokenizer.pad_token_id)
        expected = len(rows[0].ids[rows[0].prompt_length :]) * math.log(len(tokenizer))
        torch.testing.assert_close(losses, torch.full((2,), expected))
    finally:
        output.data.copy_(saved)


@pytest.mark.parametrize("pad", [0, 2, 77])
def test_neither_pad_count_nor_pad_id_changes_the_loss(parts, pad):
    tokenizer, model = parts
    short, long = row(tokenizer, "a", " day"), row(tokenizer, "one two three good bad", " thanks thanks sorry")
    alone = logprobs.completion_losses(model, [short], tokenizer.pad_token_id)
    padded = logprobs.completion_losses(model, [short, long], pad)[:1]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_no_gradient_from_what_does_not_count(parts):
    tokenizer, model = parts
    item = row(tokenizer, "one two", " yes")
    embeddings = torch.autograd.grad(
        logprobs.completion_losses(model, [item, row(tokenizer, "one two three good bad day", " no")], 77)[0],
        model.get_input_embeddings().weight,
    )[0]
    # tied embeddings: the pad id 77 gets only the softmax's share, which a run without padding gives as well
    unpadded = torch.autograd.grad(
        logprobs.completion_losses(model, [item], 77)[0], model.get_input_embeddings().weight
    )[0]
    torch.testing.assert_close(embeddings, unpadded, rtol=1e-4, atol=1e-6)


def test_completion_without_anything_before_it_counts_from_its_second_token(parts):
    tokenizer, model = parts
    ids = row(tokenizer, "", " yes no").ids[1:]
    losses = logprobs.completion_losses(model, [TokenizedExample(ids, 0), TokenizedExample([5, *ids], 1)], 0)
    assert rows.counted_tokens(TokenizedExample(ids, 0)) == len(ids) - 1
    assert torch.isfinite(losses).all()


def test_cut_rows_keep_bos_the_end_of_the_prompt_and_eos(parts):
    tokenizer, _ = parts
    whole, cut = tokenize_example(tokenizer, "one two three good bad day", " yes no", 64)
    assert not cut
    shorter, cut = tokenize_example(tokenizer, "one two three good bad day", " yes no", len(whole.ids) - 3)
    assert cut
    assert shorter.ids[0] == tokenizer.bos_token_id
    assert shorter.ids[1:] == whole.ids[4:]
    assert len(shorter.ids) - shorter.prompt_length == len(whole.ids) - whole.prompt_length
    answer = tokenize_example(tokenizer, "one", " yes no yes no yes no", 6)[0]
    assert (len(answer.ids), answer.ids[-1], answer.prompt_length) == (6, tokenizer.eos_token_id, 1)


def test_learns_to_answer_and_to_stop(folder, data, tmp_path):
    metrics = sft.run(config(folder, data, tmp_path / "out", epochs=40, lr=1e-2))
    assert metrics["loss"] < 0.2
    tokenizer = load_tokenizer(tmp_path / "out")
    model = load_causal(tmp_path / "out", tokenizer).eval()
    prompts = [example["prompt"] for example in EXAMPLES]
    answers = generate(model, tokenizer, prompts, max_new_tokens=12, generator=torch.Generator(), temperature=0.05)
    assert answers.completions == [example["completion"] for example in EXAMPLES]
    assert bool(answers.ended.all())


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_same_seed_same_bits(folder, data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sft.run(config(folder, data, tmp_path / name, epochs=2, heldout=0.2, seed=seed))
    a, b, c = (tmp_path / name for name in "abc")
    assert lines(a) == lines(b) != lines(c)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_micro_batches_change_nothing_but_rounding(folder, data, tmp_path):
    for name, size in (("whole", None), ("parts", 3)):
        sft.run(config(folder, data, tmp_path / name, epochs=1, micro_batch_size=size, lr=1e-3))
    for whole, split in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert split["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_resumed_run_ends_with_the_bits_of_one_never_stopped(folder, data, tmp_path):
    options = {"epochs": 3, "heldout": 0.2, "save_every": 2, "keep_checkpoints": 99}
    sft.run(config(folder, data, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for path in (tmp_path / "killed" / "checkpoints").iterdir():
        if path.name > "step-00000004":
            shutil.rmtree(path)
    (tmp_path / "killed" / "model.safetensors").unlink()
    sft.run(config(folder, data, tmp_path / "killed", **options, resume=True))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_sigterm_saves_at_the_next_step_and_exits_143(folder, data, tmp_path, monkeypatch):
    real = logprobs.completion_losses

    def terminated(model, rows, pad_id):
        if torch.is_grad_enabled():  # in a step, not in the checks before the first one
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, rows, pad_id)

    options = {"epochs": 2, "eval_data": None}
    with monkeypatch.context() as patch:
        patch.setattr(sft, "completion_losses", terminated)
        with pytest.raises(SystemExit) as exit:
            sft.run(config(folder, data, tmp_path / "out", **options))
    assert exit.value.code == 143
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    sft.run(config(folder, data, tmp_path / "out", **options, resume=True))
    sft.run(config(folder, data, tmp_path / "whole", **options))
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_heldout_file_and_schedule(folder, data, tmp_path):
    sft.run(config(folder, data, tmp_path / "out", eval_data=data, evals=2, epochs=1, warmup=0.5, schedule="linear"))
    found = lines(tmp_path / "out")
    assert [record["step"] for record in found if "heldout/loss" in record] == [2, 3]
    assert found[-1]["heldout/loss"] < found[0]["loss"]
    assert found[0]["lr"] == 1.5e-3


def test_a_loss_that_is_not_finite_stops_before_the_step(folder, data, tmp_path, monkeypatch):
    real = logprobs.completion_losses

    def poisoned(model, rows, pad_id):
        losses = real(model, rows, pad_id)
        return losses + torch.tensor([math.nan if item.line == 7 else 0.0 for item in rows])

    stepped = []
    monkeypatch.setattr(sft, "completion_losses", poisoned)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: stepped.append(1))
    with pytest.raises(UserError, match=r"step \d: the loss is not finite for line 7 \('one day day one'\)"):
        sft.run(config(folder, data, tmp_path / "out"))
    assert len(stepped) < 3
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"model": "/nowhere/at/all"}, "no such tokenizer folder"),
        ({"max_length": 65}, "beyond the model's context of 64 tokens"),
        ({"max_length": 1}, "--max_length 1: must be at least 2"),
        ({"schedule": "sine"}, "--schedule sine: it takes cosine, linear, constant"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"lr": -1.0}, "--lr -1.0: must be more than 0"),
        ({"heldout": 1000}, "leaves none of the 24 records"),
        ({"strict": True}, r"examples.jsonl:7: duplicate"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(folder, data, tmp_path, capsys, options, reason):
    given = {"model": folder, "data": data, "output_dir": str(tmp_path / "out"), **options}
    arguments = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert main(["sft", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("rlhf sft: error: ")
    assert reason in message
    assert "\n" not in message
    assert not Path(given["output_dir"]).exists()
