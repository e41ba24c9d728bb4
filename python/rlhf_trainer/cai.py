"""`rlhf cai`: Constitutional AI. A model revises its own answers by written rules, and judges them by these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.constitutional import constitution
from rlhf_trainer.constitutional import label as cai_label
from rlhf_trainer.constitutional import revise as cai_revise

SUMMARY = """Constitutional AI (Bai et al. 2022): written rules take the place of human labellers.

  rlhf cai constitution   show the rules: our default ones, or a file of your own, checked
  rlhf cai revise         prompts -> answers -> critiques by the rules -> revisions: data for rlhf sft
  rlhf cai label          two answers to a prompt -> which is better by a rule: pairs for rlhf reward and rlhf dpo

Each has its own --help. The whole chain is in docs/cai.md."""
EXAMPLE = """rlhf cai constitution
  rlhf cai revise --model MODEL --prompts red_team.jsonl --output revised.jsonl
  rlhf sft    --model MODEL --data revised.jsonl --output_dir runs/sft-cai
  rlhf cai label  --model runs/sft-cai --judge MODEL --prompts prompts.jsonl --output pairs.jsonl
  rlhf reward --model runs/sft-cai --data pairs.jsonl --output_dir runs/reward
  rlhf ppo    --model runs/sft-cai --reward runs/reward --prompts pairs.jsonl --output_dir runs/ppo"""
COMMANDS = {"constitution": constitution, "revise": cai_revise, "label": cai_label}


@dataclass
class Config:
    """No options of its own."""


def run(cfg: Config) -> dict[str, Any]:
    raise UserError(f"say which: rlhf cai {', '.join(COMMANDS)}; rlhf cai --help explains them")
