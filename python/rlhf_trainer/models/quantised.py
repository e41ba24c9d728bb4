"""QLoRA (Dettmers et al. 2023): the frozen base in 4 bits through bitsandbytes, adapters on it in full precision."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.models.adapters import has_adapter


def validate_options(load_in_4bit: bool, *, merge: bool) -> None:
    """UserError where --load_in_4bit cannot work here."""
    if not load_in_4bit:
        return
    if merge:
        raise UserError("--merge would round the adapter to the 4 bits of --load_in_4bit; merge it into the base later")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")


def load_options(load_in_4bit: bool, device: torch.device) -> dict[str, Any]:
    """What from_pretrained needs for the base of a run with these options; nothing without --load_in_4bit."""
    if not load_in_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def disable_weight_repacking(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from repacking weights on a CPU where no gradient is wanted.

    The packed ones take another kernel, in bf16, and PPO's first ratio compares the two.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def check_adapter(load_in_4bit: bool, model: PreTrainedModel) -> None:
    """UserError where a quantised base would be trained itself, which it cannot."""
    if load_in_4bit and not has_adapter(model):
        raise UserError("--load_in_4bit trains an adapter: give --lora_r, or an adapter's folder as --model")
