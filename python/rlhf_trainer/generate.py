"""`rlhf generate`: several completions of every prompt, sampled from a model, for people or a reward model to rank."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.config import option, require, save_config, say
from rlhf_trainer.data import read_prompts
from rlhf_trainer.errors import UserError
from rlhf_trainer.files import read_jsonl
from rlhf_trainer.models import load_causal, load_tokenizer, resolve_device
from rlhf_trainer.rollout import encode_prompts, generate, stop_token_id

SUMMARY = """Sample N completions of every prompt from a model into a JSON-lines file, to be ranked with `rlhf label`.

A line is {"prompt", "completions": [...], "ended": [...]}; ended: whether the completion came to an end by itself.
Every batch is on disk once sampled; after a crash --resume goes on and gives the same file, bit by bit on the CPU."""
EXAMPLE = (
    "rlhf generate --model runs/sft --prompts prompts.jsonl --output completions.jsonl --n 4\n"
    "  rlhf label completions.jsonl --criterion helpful"
)


@dataclass
class GenerateConfig:
    model: str = option("", "folder or hub name of the model that answers")
    prompts: str = option("", "file of prompts: JSONL with a `prompt` field, or a prompt a line (.txt); .gz too")
    output: str = option("", "JSON-lines file to write; the options are kept beside it, in .config.yaml")
    n: int = option(4, "completions per prompt")
    max_prompts: int | None = option(None, "how many prompts of the file are used, from its beginning; default all")
    max_new_tokens: int = option(128, "longest completion in tokens")
    temperature: float = option(1.0, "sampling temperature; there is no top-k and no top-p")
    stop_token: str | None = option(None, "a token that ends a completion as EOS does, such as a newline")
    batch_size: int = option(32, "completions sampled at once")
    seed: int = option(0, "seed of the sampling")
    resume: bool = option(False, "go on where an interrupted run with the same options stopped")
    device: str = option("auto", "auto, cpu or cuda")
    pad_token: str | None = option(None, "pad token to add to a tokenizer that has none or pads with EOS")
    trust_remote_code: bool = option(False, "run code that comes with the model folder")


Config = GenerateConfig


@dataclass
class GenerateResult:
    """records: {"prompt", "completions", "ended"} a prompt; figures: how many came, were distinct, and ended."""

    records: list[dict[str, Any]]
    figures: dict[str, int]
    output: str  # "": nothing was written


def validate_numbers(cfg: GenerateConfig) -> None:
    for name in ("n", "max_new_tokens", "batch_size", *(["max_prompts"] if cfg.max_prompts is not None else [])):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if not cfg.temperature > 0:
        raise UserError(f"--temperature {cfg.temperature}: must be more than 0")


def config_path(cfg: GenerateConfig) -> Path:
    return Path(cfg.output).with_suffix(".config.yaml")


def _same_options(cfg: GenerateConfig) -> None:
    """UserError unless the interrupted run was started with the same options."""
    path = config_path(cfg)
    try:
        before = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError):
        raise UserError(f"--resume: cannot read {path}, the options of the run that began {cfg.output}") from None
    now = dataclasses.asdict(cfg)
    changed = [key for key in now if key not in ("resume", "device", "output") and before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise UserError(f"--resume: {cfg.output} was begun with --{key} {before.get(key)}, now it is {now[key]}")


def finished(cfg: GenerateConfig, prompts: Sequence[Any], batch: int) -> int:
    """Prompts that an interrupted run has finished, in whole batches; what it wrote beyond them is cut off."""
    path = Path(cfg.output)
    if path.suffix == ".gz":
        raise UserError(f"--output {path}: it grows by a batch at a time, uncompressed; name it .jsonl")
    if not path.exists() or path.stat().st_size == 0:  # an earlier run ended before its first batch
        return 0
    if not cfg.resume:
        raise UserError(f"{path} exists; --resume goes on with it, or delete it")
    _same_options(cfg)
    whole = path.read_bytes().split(b"\n")[:-1]  # the last line has no end if writing it was interrupted
    keep = len(whole) if len(whole) >= len(prompts) else len(whole) // batch * batch
    with open(path, "r+b") as file:
        file.truncate(sum(len(line) + 1 for line in whole[:keep]))
    for (number, record), prompt in zip(read_jsonl(path), prompts, strict=False):
        if record.get("prompt") != prompt:
            raise UserError(f"{path}:{number}: another prompt than prompt {number} of {cfg.prompts}")
    if keep > len(prompts):
        raise UserError(f"--resume: {path} has {keep} lines, more than the {len(prompts)} prompts")
    return keep


def sample_batches(
    cfg: GenerateConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    start: int,
    batch: int,
) -> Iterator[list[dict[str, Any]]]:
    """Records of `batch` prompts at a time from prompt `start`; each batch has its own seed, so any can be first."""
    device = next(model.parameters()).device
    for first in range(start, len(prompts), batch):
        generator = torch.Generator(device).manual_seed(cfg.seed * 1_000_003 + first)
        some = prompts[first : first + batch]
        rollout = generate(
            model,
            tokenizer,
            [prompt for prompt in some for _ in range(cfg.n)],
            max_new_tokens=cfg.max_new_tokens,
            generator=generator,
            temperature=cfg.temperature,
            stop_token=cfg.stop_token,
        )
        ended = rollout.ended.tolist()
        yield [
            {"prompt": prompt, "completions": rollout.completions[at : at + cfg.n], "ended": ended[at : at + cfg.n]}
            for at, prompt in zip(range(0, len(ended), cfg.n), some, strict=True)
        ]


def progress(description: str) -> Progress:
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def collect(
    cfg: GenerateConfig,
    batches: Iterator[list[dict[str, Any]]],
    start: int,
    total: int,
    description: str,
    options: GenerateConfig | None = None,
) -> list[dict[str, Any]]:
    """All records, those of an interrupted run first; each batch is on disk before the next one is made.

    Without cfg.output nothing is written. options: kept beside it as the run's, where cfg names another file of it.
    """
    records: list[dict[str, Any]] = []
    with ExitStack() as stack:
        bar = stack.enter_context(progress(description))
        task = bar.add_task(description, total=total, completed=start)
        file = None
        if cfg.output:
            path = Path(cfg.output)
            save_config(options or cfg, path.parent, config_path(cfg).name)
            file = stack.enter_context(open(path, "a", encoding="utf-8"))
        for found in batches:
            records += found
            if file is not None:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in found)
                file.flush()
                os.fsync(file.fileno())
            bar.advance(task, len(found))
    return [record for _, record in read_jsonl(cfg.output)] if cfg.output else records


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
    validate_numbers(cfg)
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, cfg.trust_remote_code)
    prompts = (read_prompts(cfg.prompts, tokenizer) if prompts is None else prompts)[: cfg.max_prompts]
    batch = max(1, cfg.batch_size // cfg.n)  # prompts whose completions are sampled together
    start = finished(cfg, prompts, batch) if cfg.output else 0
    if model is None:
        model = load_causal(cfg.model, tokenizer, trust_remote_code=cfg.trust_remote_code)
    model = model.to(resolve_device(cfg.device)).eval()
    # What does not fit is said before anything is sampled.
    encode_prompts(model, tokenizer, prompts, cfg.max_new_tokens)
    if cfg.stop_token is not None:
        stop_token_id(tokenizer, cfg.stop_token)
    begun = time.monotonic()
    batches = sample_batches(cfg, model, tokenizer, prompts, start, batch)
    records = collect(cfg, batches, start, len(prompts), "generate")
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
