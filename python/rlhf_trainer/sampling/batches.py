"""Completions of many prompts, a batch at a time, into a file that an interrupted run can go on with."""

from __future__ import annotations

import os
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

from rlhf_trainer.base.config import save_options
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import named, write_whole
from rlhf_trainer.data.files import read_jsonl
from rlhf_trainer.sampling.options import Sampling
from rlhf_trainer.sampling.rollout import generate


@dataclass(frozen=True)
class BatchFile:
    """The JSON-lines file to which a run adds its records batch by batch, the run's options beside it in .config.yaml.

    path: "" where nothing is written. options: name -> value of every option of the run. resume: whether the run goes
    on with a file that is there already. source: the file of the prompts, as errors name it.
    """

    path: str
    options: dict[str, Any]
    resume: bool
    source: str

    @property
    def config_path(self) -> Path:
        return Path(self.path).with_suffix(".config.yaml")

    def resume_position(self, prompts: Sequence[Any], batch: int) -> int:
        """How many prompts an interrupted run has finished, in whole batches; records after those are cut off.

        Raises:
            UserError: a file that is there without `resume`, or one of other options or prompts.
        """
        if not self.path:
            return 0
        path = Path(self.path)
        if path.suffix == ".gz":
            raise UserError(f"--output {path}: it grows by a batch at a time, uncompressed; name it .jsonl")
        if not path.exists() or path.stat().st_size == 0:  # an earlier run ended before its first batch
            return 0
        if not self.resume:
            raise UserError(f"{path} exists; --resume goes on with it, or delete it")
        self._check_options()
        whole = path.read_bytes().split(b"\n")[:-1]  # the last line has no end if writing it was interrupted
        keep = len(whole) if len(whole) >= len(prompts) else len(whole) // batch * batch
        with open(path, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in whole[:keep]))
        for (number, record), prompt in zip(read_jsonl(path), prompts, strict=False):
            if record.get("prompt") != prompt:
                raise UserError(f"{path}:{number}: another prompt than prompt {number} of {self.source}")
        if keep > len(prompts):
            raise UserError(f"--resume: {path} has {keep} lines, more than the {len(prompts)} prompts")
        return keep

    def _check_options(self) -> None:
        """UserError unless the interrupted run was started with the same options."""
        path, now = self.config_path, self.options
        try:
            before = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError, ValueError):
            raise UserError(f"--resume: cannot read {path}, the options of the run that began {self.path}") from None
        changed = [key for key in now if key not in ("resume", "device", "output") and before.get(key) != now[key]]
        if changed:
            key = changed[0]
            raise UserError(f"--resume: {self.path} was begun with --{key} {before.get(key)}, now it is {now[key]}")

    def append_batches(
        self, batches: Iterator[list[dict[str, Any]]], start: int, total: int, description: str
    ) -> list[dict[str, Any]]:
        """All records, those of an interrupted run first; each batch is on disk before the next one is made."""
        records: list[dict[str, Any]] = []
        with ExitStack() as stack:
            bar = stack.enter_context(progress(description))
            task = bar.add_task(description, total=total, completed=start)
            file = None
            if self.path:
                save_options(self.options, self.config_path)
                file = stack.enter_context(open(self.path, "ab", buffering=0))
            for found in batches:
                records += found
                if file is not None:
                    with named(self.path):
                        write_whole(file, "".join(dumps(each, ensure_ascii=False) + "\n" for each in found).encode())
                        os.fsync(file.fileno())
                bar.advance(task, len(found))
        return [record for _, record in read_jsonl(self.path)] if self.path else records


def file_beside(output: str, suffix: str) -> str:
    """The path of a further file of the run that writes `output`; "" where nothing is written."""
    return str(Path(output).with_suffix(suffix)) if output else ""


def sample_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    start: int,
    batch: int,
) -> Iterator[list[dict[str, Any]]]:
    """Records of `batch` prompts at a time, from prompt number `start`, with `sampling.n` completions of each.

    Each batch has its own seed: a run that starts at a later batch samples the same completions there.
    """
    device = next(model.parameters()).device
    for first in range(start, len(prompts), batch):
        generator = torch.Generator(device).manual_seed(sampling.seed * 1_000_003 + first)
        some = prompts[first : first + batch]
        rollout = generate(
            model,
            tokenizer,
            [prompt for prompt in some for _ in range(sampling.n)],
            max_new_tokens=sampling.max_new_tokens,
            generator=generator,
            temperature=sampling.temperature,
            stop_token=sampling.stop_token,
        )
        ended, n = rollout.ended.tolist(), sampling.n
        yield [
            {"prompt": prompt, "completions": rollout.completions[at : at + n], "ended": ended[at : at + n]}
            for at, prompt in zip(range(0, len(ended), n), some, strict=True)
        ]


def progress(description: str) -> Progress:
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)
