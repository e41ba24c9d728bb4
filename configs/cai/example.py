"""Constitutional AI from end to end in a tiny world, offline, on the CPU: python configs/cai/example.py FOLDER

A model of two layers answers rudely half of the time, and has learned to criticise and revise what it is shown. It
revises its own answers by the rule `kind` and is fine-tuned on that; then a judge prefers thankful answers by the rule
`thankful`, a reward model learns that, and PPO follows it. Each command is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from rlhf_trainer.cli import main as rlhf
from rlhf_trainer.constitutional.constitution import load_constitution
from rlhf_trainer.constitutional.dialogue import critique_request, make_prompt, revision_request
from rlhf_trainer.data.files import write_jsonl

HERE = Path(__file__).resolve().parent
RUDE, PLAIN, THANKFUL = " sorry you fool no", " yes", " thanks yes"
PROMPTS = [f"{a} {b}" for a in ("one", "two", "three", "red", "blue") for b in ("day", "night", "good", "bad")]


def write_world(folder: Path) -> None:
    """Prompts, and what the first model learns: to answer, half rudely; to criticise an answer; to revise one."""
    (rule,) = load_constitution(HERE / "rules.yaml").only(["kind"]).rules
    examples = []
    for i, text in enumerate(PROMPTS):
        examples += [{"prompt": text, "completion": answer} for answer in (RUDE, RUDE, PLAIN, THANKFUL)]
        prompt, kind = make_prompt(text, None, False, ""), (PLAIN, THANKFUL)[i % 2]
        for answer, critique, revision in ((RUDE, " it is rude", kind), (kind, " it is not", kind)):
            asked = critique_request(prompt, answer, rule, False, [])
            examples.append({"prompt": asked, "completion": critique})
            asked = revision_request(prompt, answer, rule, critique, False, [])
            examples.append({"prompt": asked, "completion": revision})
    write_jsonl(folder / "sft.jsonl", examples)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    write_jsonl(folder / "eval.jsonl", [{"prompt": prompt} for prompt in PROMPTS * 10])


def run(folder: Path) -> dict[str, dict[str, float]]:
    """The whole chain; returns for each policy the share of kind and of thankful answers."""
    folder.mkdir(parents=True, exist_ok=True)
    write_world(folder)
    f, rules, judge = str(folder), f"--constitution {HERE}/rules.yaml", f"{HERE}/judge.py"
    prompts, small = f"--prompts {f}/prompts.jsonl", "--max_new_tokens 8 --device cpu"
    fit = "--batch_size 16 --heldout 0 --device cpu"
    commands = [
        f"init --text {f}/sft.jsonl --output_dir {f}/base --vocab_size 360 --hidden_size 32 --layers 2 --heads 2",
        f"sft --model {f}/base --data {f}/sft.jsonl --output_dir {f}/rude --epochs 15 --lr 1e-2 {fit}",
        f"cai revise {rules} --rules kind --model {f}/rude {prompts} --n 4 --output {f}/revised.jsonl {small}",
        f"sft --model {f}/rude --data {f}/revised.jsonl --output_dir {f}/sft-cai --epochs 4 --lr 3e-3 {fit}",
        f"cai label {rules} --rules thankful --model {f}/sft-cai --judge {judge}:by_rule {prompts} --n 4 "
        f"--output {f}/pairs.jsonl {small}",
        f"reward --model {f}/sft-cai --data {f}/pairs.jsonl --output_dir {f}/reward --epochs 4 --lr 3e-3 {fit}",
        f"ppo --model {f}/sft-cai --reward {f}/reward {prompts} --output_dir {f}/ppo --updates 12 "
        f"--kl_coef 0.2 --lr 1e-3 --save_every 0 {small}",
        f"eval --before {f}/rude --after {f}/sft-cai {f}/ppo --prompts {f}/eval.jsonl --output_dir {f}/eval {small} "
        f"--measures kind={judge}:kind thankful={judge}:thankful",
    ]
    for command in commands:
        print(f"\nrlhf {command}", file=sys.stderr, flush=True)
        if code := rlhf(shlex.split(command)):
            raise SystemExit(code)
    policies = json.loads((folder / "eval" / "eval.json").read_text(encoding="utf-8"))["policies"]
    return {
        name: {measure: found["measures"][measure]["mean"] for measure in ("kind", "thankful")}
        for name, found in policies.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for everything; must not hold an earlier run")
    for name, shares in run(parser.parse_args().folder).items():
        print(f"{name:8} kind {shares['kind']:.0%}  thankful {shares['thankful']:.0%}")
