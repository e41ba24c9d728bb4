"""Constitutional AI as a whole: configs/cai/example.py, every command after the other, and what it did to the model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rlhf_trainer import CAILabelConfig, DPOConfig, label_answers, train_dpo
from rlhf_trainer.constitutional.constitution import load_constitution
from rlhf_trainer.data.records import Pair
from rlhf_trainer.data.stages import read_examples, read_pairs, read_prompts
from rlhf_trainer.judging.judges import load_judge
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.sampling.rollout import generate

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "cai"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(folder, shares of kind and thankful answers): revise -> sft -> label -> reward -> ppo -> eval, run once."""
    spec = importlib.util.spec_from_file_location("cai_example", CONFIGS / "example.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = tmp_path_factory.mktemp("cai")
    return folder, example.run(folder)


def test_each_step_of_the_chain_does_what_it_is_for(chain):
    """Revising makes the model kind, by its own hand; the preferences, reward and PPO then make it thankful."""
    folder, shares = chain
    assert 0.3 < shares["rude"]["kind"] < 0.7
    assert shares["sft-cai"]["kind"] > 0.9
    assert shares["sft-cai"]["thankful"] < 0.75
    assert shares["ppo"]["thankful"] > max(0.85, shares["sft-cai"]["thankful"] + 0.15)
    assert shares["ppo"]["kind"] > 0.9
    revised, _ = read_examples(folder / "revised.jsonl")
    assert sum("fool" in example.completion for example in revised) / len(revised) < 0.1
    pairs, _ = read_pairs(folder / "pairs.jsonl")
    assert all("thanks" in pair.chosen and "thanks" not in pair.rejected for pair in pairs)
    assert {pair.label for pair in pairs} == {0.95}


def share_of_fools(model, tokenizer, prompts):
    """Over 10 answers to each prompt."""
    sampling = {"max_new_tokens": 8, "generator": torch.Generator().manual_seed(5)}
    texts = generate(model.eval(), tokenizer, prompts * 10, **sampling).completions
    return sum("fool" in text for text in texts) / len(texts)


def test_dpo_learns_a_rule_from_the_pairs_as_well(chain):
    folder, _ = chain
    tokenizer = load_tokenizer(folder / "rude")
    model, prompts = load_causal(folder / "rude", tokenizer), read_prompts(folder / "prompts.jsonl")
    assert 0.3 < share_of_fools(model, tokenizer, prompts) < 0.7
    found = label_answers(
        CAILabelConfig(n=6, max_new_tokens=8, batch_size=120, rules=["kind"]),
        model=model,
        tokenizer=tokenizer,
        prompts=prompts,
        constitution=load_constitution(CONFIGS / "rules.yaml"),
        judge=load_judge(f"{CONFIGS}/judge.py:by_rule"),
    )
    pairs = [Pair(one["prompt"], one["chosen"], one["rejected"], one["label"]) for one in found.pairs]
    options = {"batch_size": 8, "epochs": 12, "lr": 3e-3, "heldout": 0.0, "beta": 0.3}
    trained = train_dpo(DPOConfig(**options), model=model, tokenizer=tokenizer, pairs=pairs)
    assert share_of_fools(trained.policy, tokenizer, prompts) < 0.1
