"""DPO: its loss against the formula, the reference computed once, what it learns, resumption, and bad input."""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
import weakref

import pytest
import torch
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM

from rlhf_trainer import DPOConfig, dpo, train_dpo
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.records import Pair
from rlhf_trainer.data.rows import TokenizedPair, tokenize_example
from rlhf_trainer.models.from_scratch import build_model
from rlhf_trainer.models.loading import load_causal, load_tokenizer

PROMPTS = [f"{a} {b}" for a in ("one", "two", "three", "red", "blue") for b in ("day", "night", "good", "bad")]
PAIRS = [{"prompt": p, "chosen": " thanks yes", "rejected": " fool no day"} for p in PROMPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("dpo") / "base")


@pytest.fixture(scope="module")
def parts(folder):
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_causal(folder, tokenizer).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS))


def config(folder, data, output, **options):
    defaults = {"model": folder, "data": data, "output_dir": str(output), "batch_size": 4, "lr": 1e-3}
    return DPOConfig(**{**defaults, **options})


def items(tokenizer, pairs):
    def row(prompt, answer):
        return tokenize_example(tokenizer, prompt, answer, 64)[0]

    return [TokenizedPair(p, row(p.prompt, p.chosen), row(p.prompt, p.rejected)) for p in pairs]


def logprob(model, row):
    """Sum of the answer's logprobs in float64, from the whole logits of one unpadded row."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
    each = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
    return each[row.prompt_length - 1 :].sum()


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"beta": 0.3}, lambda h: math.log1p(math.exp(-0.3 * h))),
        (
            {"beta": 0.3, "label_smoothing": 0.2},
            lambda h: 0.8 * math.log1p(math.exp(-0.3 * h)) + 0.2 * math.log1p(math.exp(0.3 * h)),
        ),
        ({"beta": 0.3, "loss_type": "ipo"}, lambda h: (h - 1 / 0.6) ** 2),
    ],
)
def test_the_loss_is_the_formula(parts, options, formula):
    """A label q weighs the formula of a won pair with q, and that of a lost one with 1 - q."""
    tokenizer, model = parts
    torch.manual_seed(3)
    reference = build_model("llama", tokenizer, hidden_size=32, layers=2, heads=2, max_length=64, seed=3).eval()
    pairs = [
        Pair("one", " yes", " no day"),
        Pair("two day", " a good night", " fool", label=0.5),
        Pair("red", " yes thanks", " no", label=0.9),
        Pair("blue", " bad", " good good", label=0.0),
        Pair("a", " sorry", " thanks"),
    ]
    cfg = DPOConfig(**options)
    encoded = dpo.reference_logprobs(cfg, reference, items(tokenizer, pairs), tokenizer.pad_token_id, {})
    trained = dpo.PairLoss(model, tokenizer.pad_token_id, cfg)
    losses, expected, rewards = trained.losses(encoded), 0.0, []
    for pair, item in zip(pairs, items(tokenizer, pairs), strict=True):
        chosen, rejected = (
            (logprob(model, row) - logprob(reference, row)).item() for row in (item.chosen, item.rejected)
        )
        h = chosen - rejected
        expected += pair.label * formula(h) + (1 - pair.label) * formula(-h)
        rewards.append((0.3 * chosen, 0.3 * rejected, pair.label))
    assert losses.shape == (5,)
    assert losses.sum().item() == pytest.approx(expected, rel=1e-5)
    seen = trained.observe()
    assert seen["rewards/chosen"] == pytest.approx(sum(c for c, _, _ in rewards) / 5, abs=1e-5)
    assert seen["rewards/margins"] == pytest.approx(sum(c - r for c, r, _ in rewards) / 5, abs=1e-5)
    decided = [(c > r) == (label > 0.5) for c, r, label in rewards if label != 0.5]
    assert seen["rewards/accuracies"] == pytest.approx(sum(decided) / 4)


def test_per_token_divides_by_the_counted_tokens(parts):
    tokenizer, model = parts
    rows = [
        row for item in items(tokenizer, [Pair("one", " yes", " no day good")]) for row in (item.chosen, item.rejected)
    ]
    whole = dpo.answer_logprobs(model, rows, tokenizer.pad_token_id, False)
    mean = dpo.answer_logprobs(model, rows, tokenizer.pad_token_id, True)
    for row, total, average in zip(rows, whole.tolist(), mean.tolist(), strict=True):
        assert total == pytest.approx(logprob(model, row).item(), rel=1e-5)
        assert average == pytest.approx(total / (len(row.ids) - row.prompt_length), rel=1e-6)


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_starts_at_log_2_and_learns_the_preference(folder, data, tmp_path):
    output = tmp_path / "out"
    result = dpo.run(config(folder, data, output, epochs=6, heldout=6, lr=3e-3))
    found = lines(output)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are one
    assert found[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert found[-1]["loss"] < 0.5
    assert found[-1]["rewards/margins"] > 0.5
    assert result["heldout"]["accuracy"] == 1.0
    assert result["heldout"]["pairs"] == 6
    assert found[-1]["heldout/margin"] == pytest.approx(result["heldout"]["margin"], rel=1e-6)
    assert json.loads((output / "dpo.json").read_text()) == result
    assert "Learning curves" in (output / "report.html").read_text()
    before, after = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(output)
    for item in items(load_tokenizer(folder), [Pair("blue night", " thanks yes", " fool no day")]):
        gain = [(logprob(after, row) - logprob(before, row)).item() for row in (item.chosen, item.rejected)]
        assert gain[0] - gain[1] > 5


def test_the_final_figures_are_without_dropout(folder, data, tmp_path):
    options = {"lora_r": 4, "lora_dropout": 0.5, "heldout": 6, "evals": 1, "lr": 1e-2}
    result = train_dpo(config(folder, data, tmp_path, **options))
    names = ("loss", "accuracy", "margin")
    assert {name: result.figures["heldout"][name] for name in names} == {
        name: result.metrics[f"heldout/{name}"] for name in names
    }
    assert not result.policy.training


def test_ipo_stops_at_its_margin(folder, data, tmp_path):
    """IPO's target is h = 1 / (2 beta), where DPO goes on without bound: beta 0.5 asks for a margin beta h of 0.5."""
    options = {"epochs": 12, "heldout": 0, "lr": 1e-3, "beta": 0.5}
    dpo.run(config(folder, data, tmp_path / "ipo", loss_type="ipo", **options))
    dpo.run(config(folder, data, tmp_path / "dpo", **options))
    assert lines(tmp_path / "ipo")[-1]["rewards/margins"] == pytest.approx(0.5, abs=0.1)
    assert lines(tmp_path / "dpo")[-1]["rewards/margins"] > 1.5


def test_micro_batches_change_nothing_but_rounding(folder, data, tmp_path):
    for name, size in (("whole", None), ("parts", 3)):
        dpo.run(config(folder, data, tmp_path / name, micro_batch_size=size, heldout=4))
    for whole, split in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        if whole["step"] == 1:  # all rewards are 0 there but for rounding, and so is who wins
            del whole["rewards/accuracies"], split["rewards/accuracies"]
        assert split == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_resumed_run_ends_with_the_bits_of_one_never_stopped(folder, data, tmp_path, monkeypatch):
    options = {"epochs": 3, "heldout": 4, "save_every": 2, "keep_checkpoints": 99}
    dpo.run(config(folder, data, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for path in (tmp_path / "killed" / "checkpoints").iterdir():
        if path.name > "step-00000004":
            shutil.rmtree(path)
    (tmp_path / "killed" / "model.safetensors").unlink()
    with monkeypatch.context() as patch:  # the reference's logprobs are the kept ones: nothing scores before a step
        real, stepped = dpo.all_logprobs, []
        patch.setattr(dpo.PairLoss, "observe", _noting(dpo.PairLoss.observe, stepped))
        patch.setattr(dpo, "all_logprobs", lambda *args: real(*args) if stepped else pytest.fail("computed again"))
        dpo.run(config(folder, data, tmp_path / "killed", **options, resume=True))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"the reference changed \(weights\)"):
        dpo.run(config(folder, data, tmp_path / "whole", **options, resume=True, ref_model=other))
    dpo.run(config(folder, data, tmp_path / "whole", **options, resume=True))  # computes its own again
    kept = (tmp_path / "whole" / dpo.REFERENCE_CACHE).read_bytes()
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        dpo.run(config(folder, data, tmp_path / "whole", **options, ref_model=other))
    assert (tmp_path / "whole" / dpo.REFERENCE_CACHE).read_bytes() == kept


def _noting(function, calls):
    def noted(*args):
        calls.append(1)
        return function(*args)

    return noted


def test_a_damaged_file_of_reference_logprobs_is_computed_again(folder, data, tmp_path):
    dpo.run(config(folder, data, tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / dpo.REFERENCE_CACHE).write_bytes(b"half a file")
    dpo.run(config(folder, data, tmp_path / "b"))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert (tmp_path / "b" / dpo.REFERENCE_CACHE).read_bytes() == (tmp_path / "a" / dpo.REFERENCE_CACHE).read_bytes()


def test_a_reference_of_its_own(folder, data, tmp_path):
    other = tiny_folder(tmp_path / "other", seed=1)
    dpo.run(config(folder, data, tmp_path / "out", ref_model=other, heldout=0, lr=1e-9))
    tokenizer = load_tokenizer(folder)
    policy, reference = load_causal(folder, tokenizer).eval(), load_causal(other, tokenizer).eval()
    pairs = items(tokenizer, [Pair(**record) for record in PAIRS])
    margins = [
        0.1 * sum(sign * (logprob(policy, row) - logprob(reference, row)).item() for sign, row in sides)
        for sides in ([(1, pair.chosen), (-1, pair.rejected)] for pair in pairs)
    ]
    steps = [record["rewards/margins"] for record in lines(tmp_path / "out")]
    assert sum(steps) / len(steps) == pytest.approx(sum(margins) / len(margins), abs=1e-4)


def test_objects_instead_of_folders_give_the_same_and_write_nothing(folder, data, tmp_path, parts):
    tokenizer, model = parts
    pairs = [Pair(**record, line=number) for number, record in enumerate(PAIRS, start=1)]
    written = dpo.run(config(folder, data, tmp_path / "out", heldout=4))
    result = train_dpo(config("", "", "", heldout=4), model=copy.deepcopy(model), tokenizer=tokenizer, pairs=pairs)
    assert result.figures == written
    assert result.metrics["loss"] == lines(tmp_path / "out")[-1]["loss"]
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"beta": 0.0}, "--beta 0.0: must be more than 0"),
        ({"loss_type": "hinge"}, "--loss_type hinge: it takes sigmoid, ipo"),
        ({"label_smoothing": 0.5}, "--label_smoothing 0.5: must be at least 0 and below 0.5"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "--label_smoothing is for --loss_type sigmoid"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"ref_model": "/nowhere/at/all"}, "no such model folder"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(folder, data, tmp_path, capsys, options, reason):
    given = {"model": folder, "data": data, "output_dir": str(tmp_path / "out"), **options}
    arguments = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert main(["dpo", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("rlhf dpo: error: ")
    assert reason in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_margin_in_the_data_is_mentioned(folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "pairs.jsonl", [record | {"margin": 1.0} for record in PAIRS])
    dpo.run(config(folder, str(path), tmp_path / "out"))
    assert "18 x margin, which DPO does not use" in capsys.readouterr().err


def test_a_separate_reference_is_halved_and_gone_before_training(folder, data, tmp_path, monkeypatch):
    """Its logprobs are computed once, in bf16 with its weights in bf16 too; training has the memory for itself."""
    models, seen = [], []

    def load(*args, **kwargs):
        models.append(weakref.ref(model := load_causal(*args, **kwargs)))
        return model

    def keep(cfg, reference, *rest):
        seen.append({weight.dtype for weight in reference.model.layers[0].mlp.parameters()})
        return computed(cfg, reference, *rest)

    def train(*args):
        gc.collect()
        seen.append([model() is None for model in models])
        return fitted(*args)

    computed, fitted = dpo.reference_logprobs, dpo.fit_pairs
    monkeypatch.setattr(dpo, "load_causal", load)
    monkeypatch.setattr(dpo, "reference_logprobs", keep)
    monkeypatch.setattr(dpo, "fit_pairs", train)
    train_dpo(config(folder, data, tmp_path, ref_model=str(folder), dtype="bfloat16", device="cpu"))
    assert seen == [{torch.bfloat16}, [False, True]]
