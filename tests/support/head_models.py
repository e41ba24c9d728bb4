"""Tiny models of every kind of head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

V, D = 61, 16


SMALL = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def llama(**options: object) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2))


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager"
    )
    return transformers.Gemma2ForCausalLM(config)


def cohere() -> nn.Module:
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.3))


def granite() -> nn.Module:
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=4.0)
    )


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart(**options: object) -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        vocab_size=V, d_model=D, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16, **layers, **options
    )
    model = transformers.BartForConditionalGeneration(config)
    nn.init.normal_(model.final_logits_bias)
    return model


def bart_with_biased_layer() -> nn.Module:
    model = bart(tie_word_embeddings=False)
    model.lm_head.bias = nn.Parameter(torch.zeros(V))
    return model


def phi() -> nn.Module:
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL))  # a head with a bias


MODELS = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "gemma2": gemma2,
    "cohere": cohere,
    "granite": granite,
    "t5": t5,
    "bart": bart,
    "bart untied": lambda: bart(tie_word_embeddings=False),
    "bart biased": bart_with_biased_layer,
    "phi": phi,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model
