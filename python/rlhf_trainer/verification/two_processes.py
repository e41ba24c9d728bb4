"""The check of `rlhf verify` on several processes: two that share each batch give the same run as one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.models.loading import save_folder
from rlhf_trainer.onpolicy.config import PPOConfig
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.training.runlog import read_metrics
from rlhf_trainer.worlds.exact import MAX_TOKENS, PROMPTS

UPDATES = 20
COMPARED = ("objective/", "policy/", "loss/", "val/ratio", "val/clipfrac", "val/response_length", "grad_norm")


def largest_difference(reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> float:
    """Between the metrics of 20 updates by one process and by two, each with half of every batch, over gloo.

    Raises:
        UserError: the two could not be started, or one failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_folder(Path(folder) / "policy", reference, tokenizer)
        (Path(folder) / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        options: dict[str, Any] = {"model": f"{folder}/policy", "prompts": f"{folder}/prompts.txt", "lr": 1e-3}
        options |= {"reward": "rlhf_trainer.worlds.exact:oracle", "updates": UPDATES, "batch_size": 32, "epochs": 2}
        options |= {"max_new_tokens": MAX_TOKENS, "kl_coef": 0.3, "seed": seed, "save_every": 0, "device": "cpu"}
        # Rounding must not grow: no ratio or value comes near its clip, and Adam's epsilon is above most gradients.
        options |= {"clip": 10.0, "value_clip": 100.0, "adam_eps": 1e-3}
        one = train_ppo(replace(PPOConfig(), **options)).metrics
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rlhf_trainer", "ppo"]
        arguments = [f"--{key}={value}" for key, value in options.items()]
        command = [sys.executable, "-m", *launcher, *arguments, f"--output_dir={folder}/two", "--report_to=none"]
        ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        two = read_metrics(f"{folder}/two")
        if ran.returncode or len(two) != len(one):
            said = [line for line in ran.stderr.splitlines() if "error: " in line or "Error: " in line]
            raise UserError(f"two processes failed where one did not: {' / '.join(said)[:500]}")
    names = [name for name in one[0] if name.startswith(COMPARED)]
    return max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True) for name in names)
