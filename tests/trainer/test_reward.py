"""Reward model: where it scores, its loss, head, figures, normalisation, and the folder it leaves."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from support.tiny import tiny_folder
from transformers import AutoModelForSequenceClassification

from rlhf_trainer import RewardConfig, dpo, reward, train_reward
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.records import DataReport, Pair
from rlhf_trainer.data.rows import TokenizedPair, encode_pairs, tokenize_example
from rlhf_trainer.data.stages import read_pairs
from rlhf_trainer.judging.rewards import load_reward
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.models.scoring import load_normalisation
from rlhf_trainer.reports.intervals import share_interval
from rlhf_trainer.training import pair_metrics as pair_figures
from rlhf_trainer.training import supervised
from rlhf_trainer.training.pair_metrics import losses_of, pair_metrics
from rlhf_trainer.training.runlog import read_metrics

PROMPTS = [f"{a} {b}" for a in ("one", "two", "three", "red", "blue") for b in ("day", "night", "good", "bad")]
PAIRS = [{"prompt": p, "chosen": " thanks yes", "rejected": " fool no"} for p in PROMPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("reward") / "base")


@pytest.fixture(scope="module")
def parts(folder):
    tokenizer = load_tokenizer(folder)
    return tokenizer, reward.load_for_training(reward.Config(model=folder), tokenizer).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS))


@pytest.fixture(scope="module")
def trained(folder, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "reward"
    result = reward.run(config(folder, data, output, epochs=5, heldout=6))
    return output, result


def config(folder, data, output, **options):
    defaults = {"model": folder, "data": data, "output_dir": str(output), "batch_size": 4, "lr": 3e-3}
    return reward.Config(**{**defaults, **options})


def row(tokenizer, prompt, completion):
    return tokenize_example(tokenizer, prompt, completion, 64)[0]


def test_new_head_has_the_documented_scale_and_is_not_kept_random_twice(folder, parts):
    tokenizer, model = parts
    width = model.score.in_features
    assert model.score.weight.std(correction=0).item() == pytest.approx((width + 1) ** -0.5, rel=0.35)
    again = reward.load_for_training(reward.Config(model=folder), tokenizer)
    torch.testing.assert_close(again.score.weight, model.score.weight, rtol=0, atol=0)
    other = reward.load_for_training(reward.Config(model=folder, seed=1), tokenizer)
    assert not torch.equal(other.score.weight, model.score.weight)


def test_backbone_is_the_language_models(folder, parts):
    tokenizer, model = parts
    backbone = dict(model.base_model.named_parameters())
    for name, parameter in load_causal(folder, tokenizer).base_model.named_parameters():
        torch.testing.assert_close(backbone[name], parameter, rtol=0, atol=0)


@pytest.mark.parametrize("pad", ["pad", "eos", "word"])
def test_scores_the_eos_whatever_the_pad_id_and_count(parts, pad):
    tokenizer, model = parts
    short, long = row(tokenizer, "a", " day"), row(tokenizer, "one two three good bad day", " thanks thanks")
    pad_id = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "word": short.ids[1]}[pad]
    assert short.ids[-1] == tokenizer.eos_token_id
    hidden = model.base_model(input_ids=torch.tensor([short.ids])).last_hidden_state[0, -1]
    padded = reward.score_rows(model, [short, long], pad_id)[0]
    torch.testing.assert_close(padded, model.score(hidden)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward.all_scores(model, [short, long], pad_id, 1)[0], padded, rtol=1e-5, atol=1e-5)


def test_pair_loss_is_the_formula_with_margin_and_half_labels(parts):
    tokenizer, model = parts
    pairs = [Pair("one", " yes", " no", margin=0.5), Pair("two day", " a good night", " fool", label=0.5)]
    items = [TokenizedPair(p, row(tokenizer, p.prompt, p.chosen), row(tokenizer, p.prompt, p.rejected)) for p in pairs]
    losses = reward.pair_losses(model, items, tokenizer.pad_token_id, 0.25)
    for item, loss in zip(items, losses.tolist(), strict=True):
        chosen, rejected = reward.all_scores(model, [item.chosen, item.rejected], 0, 1).tolist()
        d, m, q = chosen - rejected, item.pair.margin + 0.25, item.pair.label
        expected = q * math.log1p(math.exp(m - d)) + (1 - q) * math.log1p(math.exp(m + d))
        assert loss == pytest.approx(expected, rel=1e-4)


def test_a_margin_is_for_whichever_answer_is_the_better_one():
    """A tie is at its minimum where both rewards are equal; a pair turned round has the same loss."""
    d = torch.tensor([1.5], requires_grad=True)
    (tie,) = losses_of(d - d.detach(), torch.zeros(1), [Pair("p", "a", "b", label=0.5)], 0.7)
    tie.backward()
    assert d.grad.item() == pytest.approx(0, abs=1e-7)
    pair, turned = Pair("p", "a", "b", label=0.9, margin=0.3), Pair("p", "b", "a", label=0.1, margin=0.3)
    sides = torch.tensor([2.0]), torch.tensor([0.5])
    torch.testing.assert_close(losses_of(*sides, [pair], 0.7), losses_of(*sides[::-1], [turned], 0.7))
    found = [pair_metrics(*sides, [pair], 0.7)["loss"], pair_metrics(*sides[::-1], [turned], 0.7)["loss"]]
    assert found == pytest.approx([losses_of(*sides, [pair], 0.7).item()] * 2, rel=1e-6)


def test_all_pairs_of_a_prompt_are_learned_from_in_one_step(folder, parts, monkeypatch):
    tokenizer, _ = parts
    texts = [" yes", " no", " day", " thanks thanks fool"]
    rankings = [Pair(p, a, b) for p in ("one", "two", "three") for a, b in itertools.combinations(texts, 2)]
    pairs = [*rankings, *(Pair("", f" {word}", " no") for word in ("red", "blue", "good"))]
    steps, forwards = [], []
    real_step, real_scores = supervised._optimizer_step, reward.score_rows
    monkeypatch.setattr(supervised, "_optimizer_step", lambda *a: steps.append(a[3]) or real_step(*a))
    monkeypatch.setattr(reward, "score_rows", lambda *a: forwards.append(a[1]) or real_scores(*a))
    cfg = reward.Config(model=folder, batch_size=7, epochs=3, lr=5e-5)
    rows = encode_pairs(tokenizer, pairs, 64, DataReport("pairs", False))
    reward.fit_pairs(cfg, reward.load_for_training(cfg, tokenizer), rows, [], tokenizer.pad_token_id)
    for batch, scored in zip(steps, forwards, strict=True):
        prompts = [item.pair.prompt for item in batch if item.pair.prompt]
        assert 0 < len(batch) <= 7
        assert all(prompts.count(prompt) == 6 for prompt in prompts)
        answers = {(i.pair.prompt, text) for i in batch for text in (i.pair.chosen, i.pair.rejected)}
        assert len(scored) == len(answers)  # six pairs are four answers, and each goes through the model once
    assert Counter(item.pair for batch in steps for item in batch) == Counter(pairs * 3)
    assert len({tuple(item.pair.prompt for item in batch) for batch in steps}) > 3  # another order every epoch


def test_a_prompt_of_very_many_pairs_is_spread_over_steps():
    groups = supervised.groups_of(list(range(100)), lambda item: item % 2, 36)
    assert [len(group) for group in groups] == [36, 14, 36, 14]
    batches = supervised.batches_of(groups, 32, 0, 0)
    assert {len(batch) for batch in batches} <= {14, 28, 36}
    assert sorted(index for batch in batches for index in batch) == list(range(100))


def test_an_answer_of_several_pairs_goes_through_once_with_the_same_gradient(parts):
    tokenizer, model = parts
    pairs = [
        Pair("one", " yes", " no"),
        Pair("one", " yes", " fool", margin=0.3),
        Pair("one", " no", " fool", label=0.5),
    ]
    items = encode_pairs(tokenizer, pairs, 64, DataReport("pairs", False))
    model.zero_grad()
    reward.pair_losses(model, items, tokenizer.pad_token_id, 0.0).sum().backward()
    together = model.score.weight.grad.clone()
    model.zero_grad()
    for item in items:
        reward.pair_losses(model, [item], tokenizer.pad_token_id, 0.0).sum().backward()
    torch.testing.assert_close(together, model.score.weight.grad, rtol=1e-4, atol=1e-6)
    model.zero_grad()


def test_from_objects_without_a_folder(parts, data):
    tokenizer, _ = parts
    pairs, _ = read_pairs(data)
    cfg = RewardConfig(batch_size=4, lr=3e-3, epochs=3, heldout=6, device="cpu")
    model = reward.load_for_training(reward.Config(model=parts[1].name_or_path), tokenizer)
    result = train_reward(cfg, model=model, tokenizer=tokenizer, pairs=pairs)
    assert result.model is model
    assert result.output_dir == ""
    assert result.figures["heldout"]["accuracy"] == 1.0
    good, bad = result.score(["one day"] * 2, [" thanks yes", " fool no"])
    assert good > 0 > bad


def test_figures():
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0, 5.0, 0.0]), torch.tensor([0.0, 2.0, 1.0, 0.0, 1.0])
    labels = (1.0, 1.0, 1.0, 0.5, 0.0)  # right, wrong, half right, a tie that does not count, right: rejected is better
    found = pair_figures.pair_metrics(
        chosen, rejected, [Pair(f"p{i}", "a", "b", label=label) for i, label in enumerate(labels)]
    )
    assert found["pairs"] == 4
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    assert found["accuracy_low"] < 2.5 / 4 < found["accuracy_high"]
    losses = [0.1269280, 2.1269280, 0.6931472, 0.5 * (0.0067153 + 5.0067153), 0.3132617]
    assert found["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found["margin"] == pytest.approx((2 - 2 + 0 + 1) / 4)


def test_ties_alone_give_a_loss_and_no_accuracy(folder, tmp_path, capsys):
    pairs = [{"prompt": f"one {i}", "chosen": " yes", "rejected": " no", "label": 0.5} for i in range(6)]
    data = str(write_jsonl(tmp_path / "ties.jsonl", pairs))
    for stage in (reward, dpo):
        options = {"model": str(folder), "data": data, "heldout": 2, "device": "cpu"}
        found = stage.run(stage.Config(**options, output_dir=str(tmp_path / stage.__name__)))["heldout"]
        assert found["pairs"] == 0
        assert found["accuracy"] is found["margin"] is found["length_baseline"] is None
        assert "every held-out pair is a tie, so that there is no accuracy" in capsys.readouterr().err
        (metrics,) = read_metrics(tmp_path / stage.__name__)
        assert "heldout/loss" in metrics
        assert not [name for name in metrics if "accurac" in name]


def test_calibration_error_is_zero_for_honest_confidence_and_large_for_bluff():
    honest = torch.full((100,), 0.8)
    right = (torch.arange(100) < 80).float()
    bins, error = pair_figures.calibration(honest, right, np.arange(100))
    assert error == pytest.approx(0.0, abs=1e-6)
    assert [(entry["pairs"], round(entry["accuracy"], 3)) for entry in bins] == [(100, 0.8)]
    assert pair_figures.calibration(torch.full((100,), 0.99), right, np.arange(100))[1] == pytest.approx(0.19, abs=1e-6)
    assert pair_figures.calibration(1 - honest, right, np.arange(100))[1] == pytest.approx(0.0, abs=1e-6)


def test_length_baseline_takes_its_direction_from_training():
    longer, shorter = Pair("p", "long answer", "short"), Pair("p", "short", "long answer")
    assert pair_figures.length_baseline([longer], [longer, shorter, longer]) == pytest.approx(2 / 3)
    assert pair_figures.length_baseline([shorter], [longer, shorter, longer]) == pytest.approx(1 / 3)
    assert pair_figures.length_baseline([longer], [Pair("p", "a", "b")]) == 0.5


def test_learns_the_preference_and_reports_it(trained):
    output, result = trained
    assert result["heldout"]["accuracy"] == 1.0
    assert result["heldout"]["pairs"] == 6
    assert result["heldout"]["accuracy_low"] == pytest.approx(share_interval(np.ones(6))["low"])
    assert json.loads((output / "reward.json").read_text()) == result
    assert (output / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "report.html").read_text().count("data:image/png") == 4  # two, on light pages and on dark
    entry = result["heldout"]["calibration"][-1]
    assert entry["low"] < entry["accuracy"] <= entry["high"]
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["margin"] > metrics[0]["margin"]
    assert metrics[-1]["accuracy"] == 1.0
    assert metrics[-1]["heldout/accuracy"] == 1.0
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_folder_is_an_ordinary_classifier_and_its_scores_are_normalised(trained):
    output, result = trained
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert (model.config.num_labels, model.score.out_features) == (1, 1)
    score = load_reward(str(output))
    answers = [(pair["prompt"], pair[key]) for pair in PAIRS for key in ("chosen", "rejected")]
    scores = torch.tensor(score(*map(list, zip(*answers, strict=True))))
    # 28 of these 40 answers are the reference samples
    assert scores.mean().item() == pytest.approx(0.0, abs=0.1)
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=0.1)
    assert load_normalisation(output) == (result["reference_mean"], result["reference_std"])
    tokenizer = load_tokenizer(output)
    raw = reward.all_scores(model.eval(), [row(tokenizer, *answers[0])], tokenizer.pad_token_id, 1).item()
    assert score([answers[0][0]], [answers[0][1]])[0] == pytest.approx(
        (raw - result["reference_mean"]) / result["reference_std"], rel=1e-4
    )


def test_reference_samples_can_be_given(folder, data, tmp_path):
    reference = write_jsonl(
        tmp_path / "ref.jsonl", [{"prompt": p, "completion": " day" * (i + 1)} for i, p in enumerate(PROMPTS)]
    )
    result = reward.run(config(folder, data, tmp_path / "out", reference_data=str(reference)))
    scores = load_reward(str(tmp_path / "out"))(PROMPTS, [" day" * (i + 1) for i in range(len(PROMPTS))])
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-4)
    assert torch.tensor(scores).std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert result["heldout"]["pairs"] == 2


def test_wrong_reference_data_is_said_before_the_training(folder, data, tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.setattr(reward, "train_loop", lambda *_: pytest.fail("it has trained"))
    with pytest.raises(UserError, match=r"empty.jsonl: no example in it"):
        reward.run(config(folder, data, tmp_path / "out", reference_data=str(tmp_path / "empty.jsonl")))


def test_training_goes_on_from_a_reward_model(trained, folder, data, tmp_path):
    output, _ = trained
    tokenizer = load_tokenizer(output)
    again = reward.load_for_training(reward.Config(model=str(output)), tokenizer)
    saved = AutoModelForSequenceClassification.from_pretrained(output)
    torch.testing.assert_close(again.score.weight, saved.score.weight, rtol=0, atol=0)


def test_same_seed_same_bits(folder, data, tmp_path):
    results = [reward.run(config(folder, data, tmp_path / name)) for name in "ab"]
    assert results[0] == results[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_model_without_linear_score_head_is_refused(tmp_path, data, capsys):
    from transformers import BertConfig, BertForSequenceClassification

    folder = tiny_folder(tmp_path / "base")
    bert = BertConfig(
        num_labels=1, vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForSequenceClassification(bert).save_pretrained(folder)
    arguments = ["--model", folder, "--data", data, "--output_dir", str(tmp_path / "out")]
    assert main(["reward", *arguments]) == 2
    assert "a causal or encoder-decoder backbone is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "p", "chosen": "a"}, "pairs.jsonl:1: no field 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "pairs.jsonl: no pair in it"),
    ],
)
def test_bad_pairs_exit_2_with_nothing_written(folder, tmp_path, capsys, record, reason):
    path = write_jsonl(tmp_path / "pairs.jsonl", [record])
    assert main(["reward", "--model", folder, "--data", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pair_too_long_keeps_one_prompt_for_both_answers(parts):
    """What the longer answer needs is cut from the beginning, BOS kept; an answer beyond the limit loses its end."""
    tokenizer, _ = parts
    prompt, short, long = "one two three red blue good bad day", " yes", " no thanks fool"
    findings = DataReport("pairs", False)
    (whole,) = encode_pairs(tokenizer, [Pair(prompt, short, long)], 64, findings)
    for limit in (len(whole.rejected.ids) - 2, len(whole.rejected.ids) - whole.rejected.prompt_length, 3):
        for pair in (Pair(prompt, short, long), Pair(prompt, long, short)):
            (item,) = encode_pairs(tokenizer, [pair], limit, findings)
            rows = (item.chosen, item.rejected)
            assert max(len(row.ids) for row in rows) == limit
            heads = [row.ids[: row.prompt_length] for row in rows]
            assert heads[0] == heads[1]
            bos = heads[0][:1] == [tokenizer.bos_token_id]
            tail = heads[0][bos:]
            assert tail == whole.chosen.ids[whole.chosen.prompt_length - len(tail) : whole.chosen.prompt_length]
            assert all(row.ids[-1] == tokenizer.eos_token_id for row in rows)
