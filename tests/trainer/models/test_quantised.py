"""QLoRA: a base in 4 bits under every training stage; PPO's invariants hold on it. Needs bitsandbytes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM

from rlhf_trainer import (
    DPOConfig,
    Example,
    Pair,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    UserError,
    load_reward,
    train_dpo,
    train_ppo,
    train_reward,
    train_sft,
)
from rlhf_trainer.cli import main
from rlhf_trainer.models import adapters

PROMPTS = [f"{a} {b}" for a in ("one", "two", "red", "blue") for b in ("day", "good")]
LORA = {"lora_r": 4, "lora_targets": ["all-linear"], "load_in_4bit": True, "device": "cpu", "lr": 1e-2}
FIT = {"heldout": 0, "batch_size": 4, **LORA}
ROLLOUT = {"updates": 2, "batch_size": 8, "epochs": 2, "max_new_tokens": 5, "kl_coef": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("qlora") / "base")


def letters(prompts, completions):
    return [float(text.count("e")) for text in completions]


@pytest.fixture
def library():
    pytest.importorskip("bitsandbytes")


def quantised_layers(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit" and "." in name]


def test_sft_learns_and_leaves_an_adapter_for_any_base(library, base, tmp_path):
    examples = [Example(prompt, " thanks") for prompt in PROMPTS]
    cfg = SFTConfig(model=base, output_dir=str(tmp_path / "out"), epochs=6, **FIT)
    result = train_sft(cfg, examples=examples)
    assert len(quantised_layers(result.model)) >= 14
    whole = train_sft(SFTConfig(model=base, epochs=6, **{**FIT, "load_in_4bit": False}), examples=examples)
    assert result.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=0.03)
    assert result.metrics["loss"] != whole.metrics["loss"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours, full = result.model(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert torch.nn.functional.cosine_similarity(ours.flatten(), full.flatten(), dim=0) > 0.98  # up to the 4 bits
    still = SFTConfig(model=str(tmp_path / "out"), epochs=1, **{**FIT, "lora_r": 0, "lr": 1e-9})
    again = train_sft(still, examples=examples)
    assert again.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=0.02)  # training goes on from there


def test_reward_head_stays_in_full_precision(library, base, tmp_path):
    pairs = [Pair(prompt, " thanks yes", " fool no") for prompt in PROMPTS]
    cfg = RewardConfig(model=base, output_dir=str(tmp_path / "out"), epochs=6, **FIT)
    result = train_reward(cfg, pairs=pairs)
    assert result.model.score.weight.dtype == torch.float32
    assert result.metrics["accuracy"] == 1.0
    scores = load_reward(str(tmp_path / "out"))(PROMPTS[:2] * 2, [" thanks yes"] * 2 + [" fool no"] * 2)
    assert min(scores[:2]) > max(scores[2:])


def test_dpo_starts_at_its_reference(library, base):
    pairs = [Pair(prompt, " thanks yes", " fool no") for prompt in PROMPTS]
    result = train_dpo(DPOConfig(model=base, epochs=1, **FIT), pairs=pairs)
    assert result.metrics["rewards/margins"] > 0


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"value_adapter": True, "micro_batch_size": 3}, {"dtype": "bfloat16"}],
    ids=["checkpointing", "value adapter", "bf16"],
)
def test_ppo_on_one_quantised_base(library, base, options):
    """KL 0 and ratio 1 at step 1 to the bit (train_ppo checks the ratio): one kernel with and without gradients."""
    result = train_ppo(PPOConfig(model=base, **LORA, **ROLLOUT, **options), reward=letters, prompts=PROMPTS)
    assert result.metrics[0]["objective/kl"] == 0.0
    assert result.metrics[1]["objective/kl"] != 0.0
    assert quantised_layers(result.policy)


def test_a_resumed_run_ends_with_the_same_bits(library, base, tmp_path):
    options = {"model": base, "save_every": 1, **LORA, **ROLLOUT, "updates": 3}
    train_ppo(PPOConfig(output_dir=str(tmp_path / "whole"), **options), reward=letters, prompts=PROMPTS)

    def killed(done, policy):
        if done == 2:
            raise KeyboardInterrupt

    cut = PPOConfig(output_dir=str(tmp_path / "cut"), **options)
    with pytest.raises(KeyboardInterrupt):
        train_ppo(cut, reward=letters, prompts=PROMPTS, on_update=killed)
    saved = load_file(tmp_path / "cut" / "checkpoints" / "step-00000001" / "policy.safetensors")
    assert all(".lora_" in name for name in saved)  # nothing of the base, nor of its scales
    train_ppo(PPOConfig(output_dir=str(tmp_path / "cut"), resume=True, **options), reward=letters, prompts=PROMPTS)
    for name in (adapters.WEIGHTS, "value_head.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_every_weight_in_4_bits_is_refused(library, base):
    with pytest.raises(UserError, match="--load_in_4bit trains an adapter: give --lora_r"):
        train_sft(SFTConfig(model=base, **{**FIT, "lora_r": 0}), examples=[Example("one", " two")])


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_without_the_library_one_sentence(stage, base, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    own = ["--prompts", "p.txt", "--reward", "r.py:f"] if stage == "ppo" else ["--data", "d.jsonl"]
    out = tmp_path / "out"
    command = [stage, "--model", base, "--output_dir", str(out), "--lora_r", "4", "--load_in_4bit", "true", *own]
    assert main(command) == 2
    assert "--load_in_4bit needs bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err
    assert not out.exists()


def test_merging_into_4_bits_is_refused(base):
    with pytest.raises(UserError, match="--merge would round the adapter"):
        train_sft(SFTConfig(model=base, merge=True, **FIT), examples=[Example("one", " two")])
