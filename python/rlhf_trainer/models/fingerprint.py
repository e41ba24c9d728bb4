"""Fingerprints of what a run depends on, in named parts: a resumed run can say which of them changed.

A part, such as the tokenizer, has aspects (its rules, its chat template), each with the SHA-256 of its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_trainer.data.rows import TokenizedExample, TokenizedPair
from rlhf_trainer.models.sharding import is_dtensor, unsharded_tensor

Part = dict[str, str]  # aspect -> SHA-256
Fingerprint = dict[str, Part]
# What a config or a tokenizer's file says besides how it computes: where it lay, how it was loaded last.
INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "truncation", "padding"}
INCIDENTAL |= {"base_model_name_or_path", "peft_version", "inference_mode"}


def sha256(value: Any) -> str:
    """Of a JSON value; the borders between its parts count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_part(tokenizer: PreTrainedTokenizerBase) -> Part:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    return {
        "rules": sha256(essential(rules)),
        "special tokens": sha256([tokenizer.special_tokens_map, tokenizer.all_special_ids]),
        "chat template": sha256(getattr(tokenizer, "chat_template", None)),
    }


def rows_part(rows: Sequence[TokenizedExample]) -> Part:
    """Of examples in tokens, with the border between prompt and completion."""
    return {"tokens": sha256([_without_line(row) for row in rows])}


def pairs_part(pairs: Sequence[TokenizedPair]) -> Part:
    return {
        "tokens": sha256([[_without_line(row) for row in (pair.chosen, pair.rejected)] for pair in pairs]),
        "labels": sha256([pair.pair.label for pair in pairs]),
        "margins": sha256([pair.pair.margin for pair in pairs]),
    }


def _without_line(row: TokenizedExample) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name != "line"}


def model_part(model: nn.Module, *, frozen: bool = True) -> Part:
    """Config and frozen weights, or all. Those trained are in every checkpoint: nothing depends on their start."""
    part = {"weights": weights_digest(model, frozen=frozen)}
    configs = [getattr(model, name, None) for name in ("config", "generation_config")]
    if configs[0] is not None:
        configs += getattr(model, "peft_config", {}).values()
        part["config"] = sha256([config and essential(config.to_dict()) for config in configs])
    return part


def essential(value: Any) -> Any:
    """A JSON value without the INCIDENTAL keys, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): essential(each) for key, each in value.items() if key not in INCIDENTAL}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [essential(each) for each in value] if isinstance(value, (list, tuple)) else value


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, themselves, not copies; of tied ones the first name only."""
    kept, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        place = id(tensor) if is_dtensor(tensor) else tensor.data_ptr()
        if place not in seen or tensor.numel() == 0:
            seen.add(place)
            kept[name] = tensor
    return kept


def trained_part(module: nn.Module) -> dict[str, Tensor]:
    """`weights_of` without what is frozen, or belongs to it (a quantised weight's scales): that is the base's."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    found = weights_of(module)
    scales = {name for name in found if ".weight." in name and f"{name.partition('.weight.')[0]}.weight" in frozen}
    return {name: tensor for name, tensor in found.items() if name not in frozen | scales}


def weights_digest(module: nn.Module, frozen: bool = False) -> str:
    """SHA-256 over names and values of all weights, or of those that are not trained."""
    trained = trained_part(module).keys() if frozen else ()
    return tensors_digest({name: tensor for name, tensor in weights_of(module).items() if name not in trained})


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values; one at a time is copied."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(unsharded_tensor(tensor.detach()).cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
