"""An iteration of PPO, ours against TRL's last PPO trainer: seconds of each phase, and peak memory.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13 trl==1.12
    python bench/trl_ppo.py --trl_python /tmp/trl/bin/python

TRL had `trl.experimental.ppo` up to 1.12. A GPT-2 of 4 layers, width 256, vocabulary 50257, float32; 32 prompts of 32
tokens, responses of 32; 4 epochs of one optimizer step, accumulated over micro-batches of 8; a reward model of the same
size. TRL's value model is a third network, as its trainer wants it; ours is a head on the policy. Each run is a process
of its own, ours and TRL's in turn; the first iteration of a process is not counted. Memory is the peak of the resident
set: in all, and above what the process held once its libraries were imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import words

VOCAB, LAYERS, WIDTH, HEADS = 50257, 4, 256, 4
BATCH, PROMPT, RESPONSE, EPOCHS, MICRO = 32, 32, 32, 4, 8
LR, KL_COEF, VF_COEF = 1e-5, 0.05, 0.1
PAD, EOS = VOCAB - 2, VOCAB - 1
PHASES = ("rollout", "scoring", "update")


def status(key: str) -> int:
    """MiB of a line of /proc/self/status: VmRSS, the resident set, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) // 1024


def prepare(folder: Path) -> None:
    """The same policy, reward model, tokenizer (a word a token) and prompts for both."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    tokenizer = words.tokenizer(VOCAB)
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    options = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 128, **ids}
    for name, kind in (("policy", GPT2LMHeadModel), ("reward", GPT2ForSequenceClassification)):
        torch.manual_seed(0)
        kind(GPT2Config(**options, **({"num_labels": 1} if name == "reward" else {}))).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.json").write_text(json.dumps(words.prompts(VOCAB, 256, PROMPT)), encoding="utf-8")


def ours(folder: Path, updates: int, rollout_batch: int) -> dict[str, Any]:
    """Iterations of `train_ppo`."""
    import rlhf_kernels
    from rlhf_trainer import PPOConfig, train_ppo

    before = status("VmRSS")
    cfg = PPOConfig(
        model=str(folder / "policy"),
        reward=str(folder / "reward"),
        updates=updates,
        batch_size=BATCH,
        rollout_batch_size=rollout_batch,
        micro_batch_size=MICRO,
        minibatches=1,
        epochs=EPOCHS,
        max_new_tokens=RESPONSE,
        lr=LR,
        kl_coef=KL_COEF,
        vf_coef=VF_COEF,
        device="cpu",
    )
    result = train_ppo(cfg, prompts=json.loads((folder / "prompts.json").read_text(encoding="utf-8")))
    rows = [{phase: metrics[f"seconds/{phase}"] for phase in PHASES} for metrics in result.metrics]
    length = result.metrics[-1]["val/response_length"]
    return {"version": rlhf_kernels.__version__, "iterations": rows, "before": before, "length": length}


def trl(folder: Path, updates: int, rollout_batch: int) -> dict[str, Any]:
    """Iterations of TRL's PPOTrainer, its phases told apart by the functions that open and close them."""
    import torch
    import trl as library
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    before = status("VmRSS")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    rows: list[dict[str, float]] = []
    marks: dict[str, float] = {}

    def generation(*arguments: Any, original: Any = ppo_trainer.batch_generation) -> Any:
        marks.clear()
        marks["began"] = time.perf_counter()
        found = original(*arguments)
        marks["rolled"] = time.perf_counter()
        return found

    def forward(*arguments: Any, original: Any = ppo_trainer.forward) -> Any:
        if torch.is_grad_enabled():
            marks.setdefault("scored", time.perf_counter())
        return original(*arguments)

    class Timed(PPOTrainer):
        def log(self, *arguments: Any, **options: Any) -> None:  # at the end of an iteration
            points = [marks["began"], marks["rolled"], marks["scored"], time.perf_counter()]
            rows.append({phase: points[i + 1] - points[i] for i, phase in enumerate(PHASES)})

    ppo_trainer.batch_generation, ppo_trainer.forward = generation, forward
    args = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=updates * BATCH,
        local_rollout_forward_batch_size=rollout_batch,
        response_length=RESPONSE,
        temperature=1.0,
        learning_rate=LR,
        kl_coef=KL_COEF,
        vf_coef=VF_COEF,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)

    trainer = Timed(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        ref_model=None,
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts]),
    )
    trainer.train()
    return {"version": library.__version__, "iterations": rows, "before": before, "length": RESPONSE}


def child(name: str, folder: Path, updates: int, rollout_batch: int, threads: int) -> None:
    """Run one contender here and print what it took as a line of JSON."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    found = {"ours": ours, "trl": trl}[name](folder, updates, rollout_batch)
    found |= {"peak": status("VmHWM"), "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(found))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all counted iterations; the largest of the peaks."""
    counted = [row for run in runs for row in run["iterations"][1:]]
    seconds = {phase: statistics.median(row[phase] for row in counted) for phase in PHASES}
    seconds["iteration"] = statistics.median(sum(row.values()) for row in counted)
    peak = max(run["peak"] for run in runs)
    above = max(run["peak"] - run["before"] for run in runs)
    versions = {key: runs[0][key] for key in ("version", "torch", "transformers")}
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "peak_above_libraries_mib": above,
        "iterations": len(counted),
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter of the environment with trl 1.12")
    parser.add_argument("--updates", type=int, default=4, help="iterations of a process; the first is not counted")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each contender, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rollout_batch", type=int, default=BATCH, help="responses sampled at once, by both")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "trl_ppo.json")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder = options.child
        child(name, Path(folder), options.updates, options.rollout_batch, options.threads)
        return
    from harness import OtherProcesses, environment

    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    others = OtherProcesses()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for _ in range(options.repeats):
            for contender, python in (("ours", sys.executable), ("trl", options.trl_python)):
                command = [python, __file__, "--child", contender, name, "--updates", str(options.updates)]
                command += ["--rollout_batch", str(options.rollout_batch), "--threads", str(options.threads)]
                threads = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=threads)
                runs[contender].append(json.loads(done.stdout.splitlines()[-1]))
    found = {contender: summary(both) for contender, both in runs.items()}
    mine, theirs = found["ours"], found["trl"]
    ratios = {phase: theirs["seconds"][phase] / mine["seconds"][phase] for phase in mine["seconds"]}
    ratios |= {key: mine[key] / theirs[key] for key in ("peak_mib", "peak_above_libraries_mib")}
    for key in (*mine["seconds"], "peak_mib", "peak_above_libraries_mib"):
        a, b = (x["seconds"][key] if key in x["seconds"] else x[key] for x in (mine, theirs))
        what = "TRL / ours" if key in mine["seconds"] else "ours / TRL"
        print(f"{key:26} ours {a:9.2f}   TRL {theirs['version']} {b:9.2f}   {what} {ratios[key]:.2f}")
    setting = {key: getattr(options, key) for key in ("updates", "repeats", "threads", "rollout_batch")}
    record = {"environment": environment(), "others": others.share(), "setting": setting, **found, "ratios": ratios}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"other processes had {record['others']:.0%} of the cores; written to {options.out}")


if __name__ == "__main__":
    main()
