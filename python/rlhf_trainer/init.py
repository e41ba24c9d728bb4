"""`rlhf init`: a tokenizer trained on the given text and a small random model, for those without a pretrained one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.config import option, require, save_config
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import is_jsonl, read_jsonl, read_lines
from rlhf_trainer.data.records import text_field
from rlhf_trainer.models.from_scratch import build_model, build_tokenizer
from rlhf_trainer.models.loading import save_folder

SUMMARY = (
    "Train a byte-level BPE tokenizer on text and write a small, randomly initialised model as a Hugging Face folder."
)
EXAMPLE = "rlhf init --text corpus.txt --output_dir runs/base --arch llama --hidden_size 256 --layers 4"


@dataclass
class InitConfig:
    text: list[str] = option([], "training files of the tokenizer: text, or JSON lines (all strings in them); .gz too")
    output_dir: str = option("", "folder to write the model and tokenizer to")
    arch: str = option("llama", "llama, gpt2 or qwen2")
    vocab_size: int = option(4096, "size of the vocabulary, at least 259 (256 bytes and 3 special tokens)")
    hidden_size: int = option(256, "width of the model")
    layers: int = option(4, "number of transformer layers")
    heads: int = option(4, "attention heads; must divide hidden_size")
    max_length: int = option(512, "longest sequence in tokens")
    seed: int = option(0, "seed of the random weights")


Config = InitConfig


@dataclass
class InitResult:
    """What `init_model` returns: a random model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    output_dir: str  # "": nothing was written


def texts_of(path: str) -> Iterator[str]:
    """The lines of a text file, or every string of every object of a JSON-lines file; .gz too."""
    if not is_jsonl(path):
        yield from (line for _, line in read_lines(path))
        return
    for number, record in read_jsonl(path):
        waiting = [record]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                yield text_field({"text": value}, "text", f"{path}:{number}")
            elif isinstance(value, (dict, list)):
                waiting.extend(value.values() if isinstance(value, dict) else value)


def refuse_another_model(folder: str) -> None:
    """UserError if a model is there that `rlhf init` did not make: random weights are no reason to lose it."""
    if not folder or not (Path(folder) / "config.json").exists():
        return
    options = Path(folder) / "config_resolved.yaml"
    if not options.exists() or "arch" not in (yaml.safe_load(options.read_text(encoding="utf-8")) or {}):
        raise UserError(f"--output_dir {folder} holds a model that rlhf init did not make; name another folder")


def init_model(cfg: InitConfig, *, texts: list[str] | None = None) -> InitResult:
    """Train a tokenizer on cfg.text, or on `texts`, and make a random model; without cfg.output_dir nothing is written.

    Raises:
        UserError: no text, a size that cannot be, an unknown architecture, a folder with a model of another stage.
    """
    require(cfg, *(["text"] if texts is None else []))
    if cfg.vocab_size < 259:
        raise UserError(f"--vocab_size {cfg.vocab_size}: at least 259, one for each byte and three special tokens")
    for name in ("hidden_size", "layers", "heads", "max_length"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    refuse_another_model(cfg.output_dir)
    if texts is None:
        texts = [text for path in cfg.text for text in texts_of(path)]
    if not any(text.strip() for text in texts):
        raise UserError(f"{', '.join(cfg.text)}: no text in it")
    tokenizer = build_tokenizer(texts, cfg.vocab_size)
    model = build_model(
        cfg.arch,
        tokenizer,
        hidden_size=cfg.hidden_size,
        layers=cfg.layers,
        heads=cfg.heads,
        max_length=cfg.max_length,
        seed=cfg.seed,
    )
    if cfg.output_dir:
        save_folder(cfg.output_dir, model, tokenizer)
        save_config(cfg, cfg.output_dir)
    return InitResult(model, tokenizer, cfg.output_dir)


def run(cfg: InitConfig) -> dict[str, Any]:
    require(cfg, "text", "output_dir")
    made = init_model(cfg)
    parameters, tokenizer = sum(p.numel() for p in made.model.parameters()), made.tokenizer
    say(f"{cfg.output_dir}: {cfg.arch}, {parameters:,} parameters, vocabulary {len(tokenizer)}")
    return {"parameters": parameters, "vocab_size": len(tokenizer)}
