"""Small random models of many architectures, from transformers' own configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_trainer.models.from_scratch import build_tokenizer
from rlhf_trainer.models.loading import save_folder
from support.tiny import WORDS

WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
SPARSE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128}
MAMBA: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "mistral": WIDE | {"sliding_window": 6},
    "qwen2": WIDE | {"tie_word_embeddings": True},
    "qwen3": WIDE,
    "gemma": WIDE,
    "gemma2": WIDE | {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": WIDE | {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi": WIDE | {"partial_rotary_factor": 0.5},
    "phi3": WIDE,
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neox": WIDE,
    "openai-gpt": GPT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {key: value for key, value in WIDE.items() if key != "head_dim"},
    "opt": WIDE | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "cohere": WIDE | {"logit_scale": 0.25},
    "granite": WIDE | {"logits_scaling": 2.0},
    "olmo2": WIDE,
    "stablelm": WIDE,
    "mixtral": WIDE | SPARSE | {"router_jitter_noise": 0.3},
    "qwen3_moe": WIDE | SPARSE,
    "mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "falcon_mamba": MAMBA,
    "recurrent_gemma": WIDE | {"lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 16},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 128},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "t5": T5,
    "umt5": T5,
    "bart": ENCODER_DECODER,
    "marian": ENCODER_DECODER,
    "pegasus": ENCODER_DECODER | {"decoder_start_token_id": 0},
}


def zoo_tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer([WORDS, WORDS.replace(" ", "  ")] * 4, 300)


def zoo_model(name: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """A random model with weights large enough that what it reads changes its logits."""
    config = AutoConfig.for_model(
        name,
        **{
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **MODELS[name],
        },
    )
    torch.manual_seed(seed)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_config(config)
    if name == "bart":
        model.generation_config.forced_bos_token_id = tokenizer.bos_token_id
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def zoo_folder(folder: Path, name: str) -> str:
    tokenizer = zoo_tokenizer()
    save_folder(folder, zoo_model(name, tokenizer), tokenizer)
    return str(folder)
