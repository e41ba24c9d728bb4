"""`rlhf STAGE --config file.yaml --key value`: finds the stage, parses its config, runs it."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from rlhf_trainer.base.errors import UserError, one_line

# Stage -> (module, what it does). A stage's module has Config, run(cfg), SUMMARY and EXAMPLE; it may have POSITIONAL,
# the option that leading arguments without dashes belong to, and COMMANDS, further modules like it by a first word.
STAGES = {
    "init": ("init", "train a tokenizer and make a small, randomly initialised model"),
    "generate": ("generate", "several completions of every prompt from a model, to be ranked"),
    "label": ("label", "a local page where people rank completions"),
    "prefs": ("prefs", "rankings, scores or pairs of many formats -> preference pairs; who agrees with whom"),
    "sft": ("sft", "fine-tune a model on prompts and completions"),
    "reward": ("reward", "train a reward model on preference pairs"),
    "bon": ("bon", "best-of-N: the best of several completions by a reward, as data for sft"),
    "dpo": ("dpo", "align a policy on preference pairs directly, with DPO or IPO"),
    "ppo": ("ppo", "align a policy with PPO against a reward and a frozen reference"),
    "cai": ("cai", "rules instead of labellers: a model revises and compares answers by a constitution"),
    "eval": ("eval", "compare models on the same prompts, before and after; HTML report"),
    "verify": ("verify", "check PPO on this machine against a world with a known optimum"),
    "demo": ("demo", "the whole chain on a tiny model, offline, in minutes"),
}

SHARED = ("sft", "reward", "dpo", "ppo")  # stages that several processes of `accelerate launch` share


def usage() -> str:
    lines = [f"  {stage:8} {summary}" for stage, (_, summary) in STAGES.items()]
    head = "usage: rlhf STAGE [--config FILE.yaml] [--key value ...]\n\nstages, in the order they are used:"
    return "\n".join([head, *lines, "", "rlhf STAGE --help explains every option. Start with: rlhf demo"])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 1 when a check of the stage failed, 2 after one sentence about a bad input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    stage, rest = argv[0], argv[1:]
    if stage not in STAGES:
        print(f"rlhf: error: unknown stage {stage!r}; the stages are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    from transformers.utils import logging

    from rlhf_trainer.base.config import parse_config
    from rlhf_trainer.base.distributed import rank_and_world_size

    module: Any = None
    debug = "--debug" in rest
    try:
        if rank_and_world_size()[1] > 1 and stage not in SHARED:
            raise UserError("it runs in one process; of several, each would write the same files")
        logging.disable_progress_bar()  # one bar per stage, ours
        module = importlib.import_module(f"rlhf_trainer.{STAGES[stage][0]}")
        if rest and rest[0] in getattr(module, "COMMANDS", {}):
            stage, module, rest = f"{stage} {rest[0]}", module.COMMANDS[rest[0]], rest[1:]
        if rest and not rest[0].startswith("-") and hasattr(module, "POSITIONAL"):
            rest = [f"--{module.POSITIONAL}", *rest]
        cfg = parse_config(module.Config, rest, f"rlhf {stage}", module.SUMMARY, getattr(module, "EXAMPLE", ""))
        result = module.run(cfg)
    except KeyboardInterrupt:
        kept = "; --resume goes on from what is saved" if hasattr(getattr(module, "Config", None), "resume") else ""
        print(f"rlhf {stage}: interrupted{kept}", file=sys.stderr, flush=True)
        return 130
    except Exception as error:  # the one boundary: whatever is left of an error becomes a sentence
        if debug:
            raise
        if not getattr(error, "told_by_rank_0", False):
            print(f"rlhf {stage}: error: {one_line(sentence(error))}", file=sys.stderr, flush=True)
        return 2
    return 0 if result.get("passed", True) else 1


def sentence(error: Exception) -> str:
    """What the user is told of an error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # a folder that nobody may write to, a full disk
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{(error.strerror or str(error)).lower()}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return f"out of memory; a smaller --micro_batch_size or --batch_size needs less: {error}"
    return f"{type(error).__name__} in {place}: {error}; --debug shows the traceback"
