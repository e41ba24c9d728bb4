"""A tokenizer and a randomly initialised model, made from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_trainer.base.errors import UserError

ARCHITECTURES = ("llama", "gpt2", "qwen2")


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with distinct <pad>, <bos> and <eos>; BOS is put before every prompt, so that none is empty."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def build_model(
    arch: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int = 256,
    layers: int = 4,
    heads: int = 4,
    max_length: int = 512,
    seed: int = 0,
) -> PreTrainedModel:
    """A randomly initialised causal LM of one of ARCHITECTURES with the tokenizer's vocabulary."""
    if arch not in ARCHITECTURES:
        raise UserError(f"--arch {arch}: not one of {', '.join(ARCHITECTURES)}")
    if hidden_size % heads:
        raise UserError(f"--hidden_size {hidden_size} is not a multiple of --heads {heads}")
    dims: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    if arch == "gpt2":
        dims |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        dims |= {"intermediate_size": 4 * hidden_size, "num_key_value_heads": heads}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **dims))
