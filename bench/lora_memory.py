"""Peak memory of PPO with LoRA on one shared base, against separate copies and against training every weight.

    python bench/lora_memory.py [--hidden_size 768] [--layers 8]

Each mode is `rlhf ppo` in a process of its own, on the same random model, with a reference and a reward model. What is
compared is the peak of the resident set less what the process held before it loaded a model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LORA = {"lora_r": 16, "lora_targets": ["all-linear"]}
MODES = {
    "LoRA, one base": {"model": "base", "reward": "reward", **LORA},
    "LoRA, one base, value adapter": {"model": "base", "reward": "reward", "value_adapter": True, **LORA},
    "LoRA, separate copies": {"model": "base", "ref_model": "copy", "reward": "reward_merged", **LORA},
    "every weight, separate copies": {"model": "base", "reward": "reward_merged"},
}
WORDS = "a good bad day night red blue one two three yes no thanks sorry fool"


def status(key: str) -> int:
    """MiB of a line of /proc/self/status, such as VmHWM, the peak of the resident set."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) // 1024


def prepare(folder: Path, hidden_size: int, layers: int) -> int:
    """The base, a copy of it, and a reward adapter over it, merged too; returns the base's MiB."""
    from rlhf_trainer import reward
    from rlhf_trainer.data.files import write_jsonl
    from rlhf_trainer.models.from_scratch import build_model, build_tokenizer
    from rlhf_trainer.models.loading import save_folder

    tokenizer = build_tokenizer([WORDS] * 4, 300)
    model = build_model("llama", tokenizer, hidden_size=hidden_size, layers=layers, heads=8, max_length=256)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) // 2**20
    save_folder(folder / "base", model, tokenizer)
    shutil.copytree(folder / "base", folder / "copy")
    pairs = [{"prompt": word, "chosen": " thanks yes", "rejected": " fool no"} for word in WORDS.split()[:8]]
    data = str(write_jsonl(folder / "pairs.jsonl", pairs))
    options = {"model": str(folder / "base"), "data": data, "heldout": 0, "batch_size": 8, "device": "cpu", **LORA}
    for name, merge in (("reward", False), ("reward_merged", True)):
        reward.run(reward.Config(**options, output_dir=str(folder / name), merge=merge))
    return size


def measure(folder: Path, mode: str) -> None:
    """Run one mode here and print its peak as JSON."""
    from rlhf_trainer import PPOConfig, train_ppo

    options = {k: str(folder / v) if k in ("model", "ref_model", "reward") else v for k, v in MODES[mode].items()}
    before = status("VmRSS")
    cfg = PPOConfig(updates=2, batch_size=8, micro_batch_size=4, max_new_tokens=16, device="cpu", **options)
    result = train_ppo(cfg, prompts=[WORDS[i : i + 30] for i in range(8)])
    assert result.metrics[0]["objective/kl"] == 0.0
    print(json.dumps({"before": before, "peak": status("VmHWM")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(Path(arguments.child[0]), arguments.child[1])
        return
    with tempfile.TemporaryDirectory() as name:
        size = prepare(Path(name), arguments.hidden_size, arguments.layers)
        print(f"base model {size} MiB; peak above what the process held before loading it:")
        peaks: dict[str, int] = {}
        for mode in MODES:
            command = [sys.executable, __file__, "--child", name, mode]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            peaks[mode] = found["peak"] - found["before"]
            print(f"{mode:32} {peaks[mode]:6} MiB  {peaks[mode] / size:5.2f} x the base", flush=True)
        for shared in list(MODES)[:2]:
            for mode in list(MODES)[2:]:
                print(f"{shared} / {mode}: {peaks[shared] / peaks[mode]:.2f}")


if __name__ == "__main__":
    main()
