"""Every architecture through generate, sft, reward, ppo and eval, folder to folder, or stopped by one sentence."""

from __future__ import annotations

import json

import pytest
from support.stages import PROMPTS
from support.zoo import MODELS, zoo_folder

from rlhf_trainer.cli import main
from rlhf_trainer.data.files import write_jsonl

QUICK = ("mamba",)
# No attention mask as ours: padding, or tokens that come later, change what they give.
STOPS_AT_GENERATE = {"recurrent_gemma", "rwkv", "xlnet"}
# Of these transformers has no sequence classifier that reads a decoder's last state.
STOPS_AT_REWARD = {
    *("cohere", "falcon_mamba", "granite", "mamba", "mamba2", "marian", "pegasus"),
}


def stages(root, name):
    """stage -> its arguments; PPO's reward is the reward model where there is one."""
    folder = zoo_folder(root / "base", name)
    examples = write_jsonl(root / "sft.jsonl", [{"prompt": p, "completion": f" {p} yes"} for p in PROMPTS])
    pairs = [{"prompt": p, "chosen": f" {p} yes", "rejected": " sorry fool"} for p in PROMPTS]
    pairs = write_jsonl(root / "pairs.jsonl", pairs)
    prompts = write_jsonl(root / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    fit = ["--heldout", 0, "--batch_size", 2, "--report_to", "none", "--device", "cpu"]
    sample = ["--prompts", prompts, "--max_new_tokens", 5, "--device", "cpu"]
    yield "generate", ["--model", folder, *sample, "--n", 2, "--output", root / "answers.jsonl"]
    yield "sft", ["--model", folder, "--data", examples, "--output_dir", root / "sft", *fit]
    yield "reward", ["--model", root / "sft", "--data", pairs, "--output_dir", root / "reward", *fit]
    reward = root / "reward" if (root / "reward" / "config.json").exists() else "support.stages:count_letters"
    ppo = ["--updates", 2, "--batch_size", 4, "--minibatches", 1, "--epochs", 1, "--report_to", "none"]
    yield "ppo", ["--model", root / "sft", "--reward", reward, "--output_dir", root / "ppo", *ppo, *sample]
    yield "eval", ["--before", root / "sft", "--after", root / "ppo", "--output_dir", root / "eval", *sample]


def go_through(name, root, capsys):
    stopped = {}
    for stage, arguments in stages(root, name):
        if main([stage, *map(str, arguments)]):
            stopped[stage] = capsys.readouterr().err
        if stage == "generate" and stopped:
            break
    assert all(f"rlhf {stage}: error: " in text and "Traceback" not in text for stage, text in stopped.items())
    expected = {"generate"} if name in STOPS_AT_GENERATE else {"reward"} if name in STOPS_AT_REWARD else set()
    assert stopped.keys() == expected, stopped
    if name not in STOPS_AT_GENERATE:
        assert json.loads((root / "ppo" / "metrics.jsonl").read_text().splitlines()[0])["objective/kl"] == 0.0
        assert (root / "eval" / "eval.json").exists()


@pytest.mark.parametrize("name", QUICK)
def test_from_generate_to_eval(name, tmp_path, capsys):
    go_through(name, tmp_path, capsys)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(QUICK)))
def test_from_generate_to_eval_elsewhere(name, tmp_path, capsys):
    go_through(name, tmp_path, capsys)
