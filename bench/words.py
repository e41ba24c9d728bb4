"""A tokenizer with a word for each token, and prompts of a given length, for runs of the trainers on random models."""

from __future__ import annotations

from typing import Any


def tokenizer(vocab: int) -> Any:
    """Of w0, w1, ... and, as the last two of `vocab` tokens, padding and EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab - 2)} | {"<pad>": vocab - 2, "<eos>": vocab - 1}
    found = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="<eos>")


def prompts(vocab: int, count: int, length: int) -> list[str]:
    """Random ones of `length` tokens, the same in every run."""
    import torch

    drawn = torch.randint(0, vocab - 2, (count, length), generator=torch.Generator().manual_seed(0))
    return [" ".join(f"w{i}" for i in row) for row in drawn.tolist()]
