"""Small encoder-decoder models with random weights, as ordinary folders."""

from __future__ import annotations

import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config, UMT5Config

from rlhf_trainer.models.from_scratch import build_tokenizer
from rlhf_trainer.models.loading import save_folder
from support.tiny import WORDS

T5 = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_model": 32}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
CONFIGS = {
    "t5": lambda ids: T5Config(**T5, **ids),
    "flan-t5": lambda ids: T5Config(**T5, **ids, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5": lambda ids: UMT5Config(**T5, **ids),
    "bart": lambda ids: BartConfig(**BART, **ids, bos_token_id=1, forced_eos_token_id=None),
}


def make_folder(folder, kind="flan-t5"):
    tokenizer = build_tokenizer([WORDS, WORDS.replace(" ", "  ")] * 4, 300)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[kind](ids))
    save_folder(folder, model, tokenizer)
    return str(folder)
