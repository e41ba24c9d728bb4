"""The Python API: every stage as a function of a config and objects, a result, and nothing written unless asked."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import subprocess
import sys

import pytest
from support.tiny import tiny_folder

import rlhf_trainer
from rlhf_trainer import (
    BonConfig,
    DPOConfig,
    EvalConfig,
    Example,
    GenerateConfig,
    InitConfig,
    Pair,
    PPOConfig,
    PrefsConfig,
    RewardConfig,
    SFTConfig,
    UserError,
    best_of_n,
    evaluate,
    generate_completions,
    init_model,
    make_pairs,
    train_dpo,
    train_ppo,
    train_reward,
    train_sft,
)
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.models.loading import load_causal, load_tokenizer

PROMPTS = [f"{a} {b}" for a in ("one", "two", "red") for b in ("day", "good")]
FIT = {"batch_size": 4, "lr": 3e-3, "heldout": 0, "device": "cpu"}
FUNCTIONS = [name for name in rlhf_trainer.__all__ if name[0].islower()]


def test_every_name_is_there_and_only_a_used_one_is_imported():
    assert sorted(rlhf_trainer.__all__) == sorted(rlhf_trainer.MODULE_OF)
    for name in rlhf_trainer.__all__:
        assert getattr(rlhf_trainer, name) is getattr(
            importlib.import_module(f"rlhf_trainer.{rlhf_trainer.MODULE_OF[name]}"), name
        )
    code = "import sys, rlhf_trainer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        _ = rlhf_trainer.train_everything


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_raises(name):
    assert "Raises:" in inspect.getdoc(getattr(rlhf_trainer, name))


@pytest.mark.parametrize("name", [name for name in rlhf_trainer.__all__ if name.endswith("Result")])
def test_a_result_is_a_dataclass_that_describes_itself(name):
    result = getattr(rlhf_trainer, name)
    assert dataclasses.is_dataclass(result)
    assert not result.__doc__.startswith(f"{name}(")  # the one that dataclass makes
    assert {field.name for field in dataclasses.fields(result)} & {"output_dir", "output"}  # what it wrote


def test_empty_lists_are_one_sentence(tmp_path):
    folder, cpu = tiny_folder(tmp_path / "base"), {"device": "cpu"}
    policy, tokenizer = load_causal(folder), load_tokenizer(folder)
    for call in (
        lambda: generate_completions(GenerateConfig(model=folder, **cpu), prompts=[]),
        lambda: best_of_n(BonConfig(model=folder, **cpu), reward=lambda _, texts: [0.0] * len(texts), prompts=[]),
        lambda: train_ppo(PPOConfig(model=folder, **cpu), reward=lambda _, texts: [0.0] * len(texts), prompts=[]),
        lambda: evaluate(EvalConfig(**cpu), policies={"a": policy}, tokenizer=tokenizer, prompts=[]),
        lambda: train_sft(SFTConfig(model=folder, **cpu), examples=[]),
        lambda: train_reward(RewardConfig(model=folder, **cpu), pairs=[]),
        lambda: train_dpo(DPOConfig(model=folder, **cpu), pairs=[]),
    ):
        with pytest.raises(UserError, match=r"no (prompts|training records) were given; at least one is needed"):
            call()


@pytest.mark.parametrize("name", ["hidden_size", "layers", "heads", "max_length"])
def test_a_model_without_size_is_refused(name):
    with pytest.raises(UserError, match=f"--{name} 0: must be at least 1"):
        init_model(InitConfig(**{name: 0}), texts=["a b"])


def test_the_chain_from_objects_writes_nothing(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "base")
    tokenizer = load_tokenizer(folder)
    monkeypatch.chdir(tmp_path)
    examples = [Example(prompt, " thanks yes") for prompt in PROMPTS]
    sft = train_sft(SFTConfig(**FIT), model=load_causal(folder, tokenizer), tokenizer=tokenizer, examples=examples)
    assert sft.metrics["loss"] > 0
    pairs = [Pair(prompt, " thanks yes", " fool") for prompt in PROMPTS]
    reward = train_reward(RewardConfig(model=folder, **FIT), pairs=pairs)
    options = {"max_new_tokens": 3, "device": "cpu", "batch_size": 4}
    bon = best_of_n(
        BonConfig(n=2, **options), model=sft.model, tokenizer=tokenizer, reward=reward.score, prompts=PROMPTS
    )
    assert [record["prompt"] for record in bon.best] == PROMPTS
    dpo = train_dpo(DPOConfig(**FIT), model=load_causal(folder, tokenizer), tokenizer=tokenizer, pairs=pairs)
    assert dpo.figures["train_pairs"] == len(pairs)
    ppo = train_ppo(
        PPOConfig(updates=1, epochs=1, **options),
        model=sft.model,
        tokenizer=tokenizer,
        reward=reward.score,
        prompts=PROMPTS,
    )
    assert ppo.metrics[0]["objective/kl"] == 0.0
    drawn = generate_completions(GenerateConfig(n=2, **options), model=sft.model, tokenizer=tokenizer, prompts=PROMPTS)
    assert [len(record["completions"]) for record in drawn.records] == [2] * len(PROMPTS)
    compared = evaluate(
        EvalConfig(bootstrap=50, fail_if=["win rate by reward<0", "kl>-1"], **options),
        policies={"dpo": dpo.policy, "ppo": ppo.policy},
        tokenizer=tokenizer,
        prompts=PROMPTS,
        scorers={"reward": reward.score},
        judge=lambda prompts, answers, others: [0.75] * len(prompts),
    )
    assert compared.figures["policies"]["ppo"]["measures"]["win rate by judge"]["mean"] == 0.5  # asked in both orders
    assert [gate["failed"] for gate in compared.figures["gates"]] == [False, True]
    assert not compared.passed
    assert len(compared.samples) == len(PROMPTS)
    made = init_model(InitConfig(vocab_size=260, hidden_size=16, layers=1, heads=1), texts=["a b"])
    assert made.model.config.vocab_size == len(made.tokenizer)
    assert {result.output_dir for result in (sft, reward, dpo, ppo, compared, made)} == {""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_make_pairs_writes_what_it_is_asked_to(tmp_path):
    rankings = [{"labeller": "ann", "ranks": [2, 1]}, {"labeller": "bob", "ranks": [2, 1]}]
    data = str(write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "completions": ["a", "b"], "rankings": rankings}]))
    result = make_pairs(PrefsConfig(data=[data]))
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [("b", "a")]
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    assert result.output == ""
    assert (
        make_pairs(PrefsConfig(data=[data], output=str(tmp_path / "pairs.jsonl"))).output == f"{tmp_path}/pairs.jsonl"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.report.json", "r.jsonl"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_sft(SFTConfig(data="x.jsonl")), "--model is needed"),
        (lambda: train_reward(RewardConfig(model="x")), "--data is needed"),
        (lambda: make_pairs(PrefsConfig()), "--data is needed"),
    ],
)
def test_what_is_neither_passed_nor_named_is_asked_for(call, message):
    with pytest.raises(UserError, match=message):
        call()
