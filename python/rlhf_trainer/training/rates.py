"""The learning rate where none is given: by what is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from transformers import PreTrainedModel

from rlhf_trainer.base.console import say
from rlhf_trainer.base.shared import LORA_TIMES
from rlhf_trainer.models.adapters import has_adapter

C = TypeVar("C", bound=Any)


def with_lr(cfg: C, model: PreTrainedModel, full: float) -> C:
    """The options with a learning rate: the one given, `full` for all weights, or LORA_TIMES that for an adapter."""
    if cfg.lr is not None:
        return cfg
    lora = has_adapter(model)
    rate = float(f"{LORA_TIMES * full if lora else full:g}")
    say(f"--lr {rate:g}, the default for {'LoRA' if lora else 'training every weight'}")
    return replace(cfg, lr=rate)
