"""`rlhf generate`: several completions of every prompt, sampled from a model, for people or a reward model to rank."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.config import require
from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import resolve_device
from rlhf_trainer.data.stages import read_prompts
from rlhf_trainer.models.loading import load_causal, load_tokenizer, on_device
from rlhf_trainer.sampling.batches import BatchFile, sample_batches
from rlhf_trainer.sampling.options import SamplingConfig
from rlhf_trainer.sampling.rollout import encode_prompts, stop_token_id

SUMMARY = """Sample N completions of every prompt from a model into a JSON-lines file, to be ranked with `rlhf label`.

A line is {"prompt", "completions": [...], "ended": [...]}; ended: whether the completion came to an end by itself.
Every batch is on disk once sampled; after a crash --resume goes on and gives the same file, bit by bit on the CPU."""
EXAMPLE = (
    "rlhf generate --model runs/sft --prompts prompts.jsonl --output completions.jsonl --n 4\n"
    "  rlhf label completions.jsonl --criterion helpful"
)


@dataclass
class GenerateConfig(SamplingConfig):
    """Options of `rlhf generate`."""


Config = GenerateConfig


@dataclass
class GenerateResult:
    """records: {"prompt", "completions", "ended"} a prompt; figures: how many came, were distinct, and ended."""

    records: list[dict[str, Any]]
    figures: dict[str, int]
    output: str  # "": nothing was written


def generate_completions(
    cfg: GenerateConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: list[str] | None = None,
) -> GenerateResult:
    """Sample cfg.n completions of every prompt. What is not passed is loaded; without cfg.output nothing is written.

    Raises:
        UserError: bad input, one sentence; a file that is there already, without cfg.resume.
    """
    needed = {"model": model, "prompts": prompts}
    require(cfg, *(name for name, given in needed.items() if given is None))
    cfg.validate_numbers()
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, cfg.trust_remote_code)
    prompts = (read_prompts(cfg.prompts, tokenizer) if prompts is None else prompts)[: cfg.max_prompts]
    batch = max(1, cfg.batch_size // cfg.n)  # prompts whose completions are sampled together
    file = BatchFile(cfg.output, asdict(cfg), cfg.resume, cfg.prompts)
    start = file.resume_position(prompts, batch)
    if model is None:
        model = load_causal(cfg.model, tokenizer, trust_remote_code=cfg.trust_remote_code)
    model = on_device(model, resolve_device(cfg.device))
    # What does not fit is said before anything is sampled.
    encode_prompts(model, tokenizer, prompts, cfg.max_new_tokens)
    if cfg.stop_token is not None:
        stop_token_id(tokenizer, cfg.stop_token)
    begun = time.monotonic()
    batches = sample_batches(model, tokenizer, prompts, cfg.sampling, start=start, batch=batch)
    records = file.append_batches(batches, start=start, total=len(prompts), description="generate")
    seconds = time.monotonic() - begun
    count, total = len(records), len(records) * cfg.n
    distinct = sum(len(set(record["completions"])) for record in records)
    ended = sum(sum(record["ended"]) for record in records)
    say(
        f"{cfg.output or 'generate'}: {count} prompts x {cfg.n} completions, {distinct} distinct, {ended / total:.0%} "
        f"ended by themselves; {len(prompts) - start} prompts in {seconds:.0f} s"
    )
    figures = {"prompts": len(records), "completions": total, "distinct": distinct, "ended": ended}
    return GenerateResult(records, figures, cfg.output)


def run(cfg: GenerateConfig) -> dict[str, Any]:
    """Sample, appending a batch at a time; returns how many completions came, how many were distinct, and ended."""
    require(cfg, "model", "prompts", "output")
    return dict(generate_completions(cfg).figures)
