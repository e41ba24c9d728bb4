"""A tokenizer and a random model that load in milliseconds, as ordinary folders."""

from __future__ import annotations

from pathlib import Path

from rlhf_trainer.models.from_scratch import build_model, build_tokenizer
from rlhf_trainer.models.loading import save_folder

WORDS = "a good bad day night red blue one two three yes no thanks sorry fool"
SIZES = {"hidden_size": 32, "layers": 2, "heads": 2, "max_length": 64}


def tiny_folder(folder: Path, arch: str = "llama", text: str = WORDS, seed: int = 0, **sizes: int) -> str:
    tokenizer = build_tokenizer([text, text.replace(" ", "  ")] * 4, 300)
    save_folder(folder, build_model(arch, tokenizer, seed=seed, **{**SIZES, **sizes}), tokenizer)
    return str(folder)
