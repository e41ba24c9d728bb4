"""Completions of many prompts, a batch at a time, into a file that an interrupted run can go on with."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.config import save_config
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import read_jsonl
from rlhf_trainer.sampling.options import SamplingConfig
from rlhf_trainer.sampling.rollout import generate


def config_path(cfg: SamplingConfig) -> Path:
    return Path(cfg.output).with_suffix(".config.yaml")


def _same_options(cfg: SamplingConfig) -> None:
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


def resume_position(cfg: SamplingConfig, prompts: Sequence[Any], batch: int) -> int:
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
    cfg: SamplingConfig,
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


def append_batches(
    cfg: SamplingConfig,
    batches: Iterator[list[dict[str, Any]]],
    start: int,
    total: int,
    description: str,
    options: SamplingConfig | None = None,
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
