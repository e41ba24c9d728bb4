"""Every training stage on objects and a handful of records, for what is to hold in all of them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer import (
    DPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    train_dpo,
    train_ppo,
    train_reward,
    train_sft,
)
from rlhf_trainer.data.records import Example, Pair

PROMPTS = ["a good day", "one two three red", "no", "night red"]
STAGES = ("sft", "reward", "dpo", "ppo")


def count_letters(_: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def train_stage(
    stage: str, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, model_name: str = "", **options: Any
) -> PreTrainedModel:
    """The model that the stage trained in two steps; `model` None: it is loaded from `model_name`."""
    supervised: dict[str, Any] = {"epochs": 1, "batch_size": 2, "heldout": 0, "warmup": 0.0, "report_to": ["none"]}
    supervised |= {"lr": 1e-2, "device": "cpu", "model": model_name, **options}
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    pairs = [Pair(prompt, f" yes {prompt}", " sorry fool", line=i + 1) for i, prompt in enumerate(PROMPTS)]
    if stage == "sft":
        examples = [Example(pair.prompt, pair.chosen, line=pair.line) for pair in pairs]
        return train_sft(SFTConfig(**supervised), examples=examples, **given).model
    if stage == "reward":
        return train_reward(RewardConfig(**supervised), pairs=pairs, **given).model
    if stage == "dpo":
        return train_dpo(DPOConfig(**supervised), pairs=pairs, **given).policy
    cfg = PPOConfig(
        updates=2,
        batch_size=4,
        minibatches=1,
        epochs=1,
        max_new_tokens=4,
        **{"lr": 1e-2, "device": "cpu", "report_to": ["none"], "model": model_name, **options},
    )
    return train_ppo(cfg, reward=count_letters, prompts=PROMPTS, **given).policy
