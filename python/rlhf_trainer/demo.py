"""`rlhf demo`: rankings -> SFT -> reward model -> PPO -> report, on a tiny model in a generated world, offline."""

from __future__ import annotations

import dataclasses
import importlib
import random
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlhf_trainer import eval as evaluation
from rlhf_trainer.base.config import option, save_config
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.rankings import pairs_from_rankings, read_rankings
from rlhf_trainer.data.stages import read_prompts
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.reports.page import Check, Curve, metric_curve, print_report, show_estimate, write_report
from rlhf_trainer.sampling.rollout import generate
from rlhf_trainer.training.runlog import read_metrics
from rlhf_trainer.worlds import demo as world
from rlhf_trainer.worlds.threads import one_thread

SUMMARY = "The whole chain on a tiny model in a generated world: offline, on a CPU, in minutes, with a report."
EXAMPLE = "rlhf demo --output_dir runs/demo --seed 1"
MARK = "demo.yaml"  # a folder that holds it was made by this stage and may be made anew
MAX_NEW_TOKENS = 40
TEMPERATURE = 0.8  # of PPO and evaluation; labellers see answers sampled at 1, where more of them fail
LEAST_FALL = 0.8  # of toxicity
MOST_KL = 15.0  # nats per response
LEAST_ON_TOPIC = 0.9  # of the SFT model's share
LEAST_DIVERSITY = 0.7  # of the distinct-2 of the world's own kind answers to the same prompts


@dataclass
class Config:
    output_dir: str = option("runs/demo", "folder for everything: data, models, metrics, report")
    answers: int = option(4, "answers per prompt in the SFT data")
    ranked_answers: int = option(6, "sampled answers per prompt that the labellers rank")
    ranked_prompts: int = option(640, "prompts whose sampled answers are ranked")
    sft_epochs: int = option(5, "passes over the SFT data")
    reward_epochs: int = option(1, "passes over the preference pairs")
    ppo_updates: int = option(60, "PPO updates")
    eval_prompts: int = option(320, "held-out prompts that are answered before and after")
    seed: int = option(0, "seed of everything")


def run(cfg: Config) -> dict[str, Any]:
    """Run the chain; returns the evaluation with "passed", false if a promise was broken."""
    began = time.perf_counter()
    folder = prepare_folder(cfg)
    say = Console(stderr=True, highlight=False).print
    with one_thread():
        say("[bold]1  a world of everyday problems, with rude and kind answers[/]")
        heldout = write_world(cfg, folder)
        say("[bold]2  tokenizer and model[/]")
        dims = {"vocab_size": 1600, "hidden_size": 64, "layers": 2, "heads": 4, "max_length": 96}
        stage("init", text=[f"{folder}/corpus.txt"], output_dir=f"{folder}/base", **dims, seed=cfg.seed)
        say("[bold]3  supervised fine-tuning on kind and rude answers alike[/]")
        sft = {"epochs": cfg.sft_epochs, "batch_size": 16, "lr": 8e-3}
        stage(
            "sft", model=f"{folder}/base", data=f"{folder}/sft.jsonl", output_dir=f"{folder}/sft", **sft, seed=cfg.seed
        )
        say("[bold]4  labellers rank the model's answers; a majority vote makes pairs[/]")
        rank_answers(cfg, folder, say)
        say("[bold]5  reward model[/]")
        reward = {"epochs": cfg.reward_epochs, "batch_size": 32, "lr": 1e-3}
        stage(
            "reward",
            model=f"{folder}/sft",
            data=f"{folder}/pairs.jsonl",
            output_dir=f"{folder}/reward",
            **reward,
            seed=cfg.seed,
        )
        say("[bold]6  PPO against the reward model, with a KL penalty to the fine-tuned model[/]")
        stage(
            "ppo",
            model=f"{folder}/sft",
            reward=f"{folder}/reward",
            gold_reward="rlhf_trainer.worlds.demo:harmless",
            prompts=f"{folder}/prompts.jsonl",
            output_dir=f"{folder}/ppo",
            updates=cfg.ppo_updates,
            batch_size=128,
            minibatches=4,
            epochs=2,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            lr=3e-4,
            kl_coef=0.25,
            vf_coef=0.5,  # the value shares this narrow model's states: at 0.1 it explains 0.28 of the returns, not 0.5
            missing_eos_penalty=1.0,
            save_every=0,
            seed=cfg.seed,
        )
        say("[bold]7  before and after, on prompts that nothing was trained on[/]")
        result, checks = evaluate(cfg, folder, heldout)
    minutes = (time.perf_counter() - began) / 60
    page = write_page(folder, result, checks, minutes)
    print_report(result, checks)
    print(f"{minutes:.1f} minutes; report: {page.resolve()}")
    return result | {"passed": all(check.kept for check in checks)}


def prepare_folder(cfg: Config) -> Path:
    """An empty output folder. What an earlier demo left is removed; a folder of anything else is refused."""
    folder = Path(cfg.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / MARK).is_file():
            raise UserError(f"{folder} exists and was not made by rlhf demo; choose another --output_dir")
        shutil.rmtree(folder)
    save_config(cfg, folder, MARK)
    return folder


def stage(name: str, **options: Any) -> dict[str, Any]:
    """Run a stage as the command line would, after printing that command."""
    module = importlib.import_module(f"rlhf_trainer.{name}")
    cfg = module.Config(**options)
    show_command(name, cfg)
    return module.run(cfg)


def command(name: str, cfg: Any) -> str:
    """The command line that runs this stage with this config."""
    words = ["rlhf", name]
    default = type(cfg)()
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != getattr(default, field.name):
            words += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def show_command(name: str, cfg: Any) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(command(name, cfg), style="dim", markup=False)


def write_world(cfg: Config, folder: Path) -> list[str]:
    """Write prompts, SFT examples and the tokenizer's text; returns the held-out prompts."""
    rng = random.Random(cfg.seed)
    prompts = world.make_prompts(rng)
    heldout, training = prompts[: cfg.eval_prompts], prompts[cfg.eval_prompts :]
    examples = [
        {"prompt": prompt, "completion": world.make_answer(prompt, world.make_style(rng), rng)}
        for prompt in training
        for _ in range(cfg.answers)
    ]
    write_jsonl(folder / "sft.jsonl", examples)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in training])
    write_jsonl(folder / "heldout_prompts.jsonl", [{"prompt": prompt} for prompt in heldout])
    text = "\n".join(example["prompt"] + example["completion"] for example in examples)
    (folder / "corpus.txt").write_text(text + "\n", encoding="utf-8")
    return heldout


def rank_answers(cfg: Config, folder: Path, say: Any) -> None:
    """Sample answers of the SFT model, let every labeller rank them: rankings.jsonl, and from it pairs.jsonl."""
    rng = random.Random(cfg.seed + 1)
    tokenizer = load_tokenizer(folder / "sft")
    model = load_causal(folder / "sft", tokenizer).eval()
    generator = torch.Generator().manual_seed(cfg.seed + 1)
    prompts = read_prompts(folder / "prompts.jsonl")[: cfg.ranked_prompts]
    records = []
    for start in range(0, len(prompts), 16):
        repeated = [prompt for prompt in prompts[start : start + 16] for _ in range(cfg.ranked_answers)]
        texts = generate(model, tokenizer, repeated, max_new_tokens=MAX_NEW_TOKENS, generator=generator).completions
        for i in range(0, len(repeated), cfg.ranked_answers):
            prompt, answers = repeated[i], texts[i : i + cfg.ranked_answers]
            rankings = [vars(labeller.rank(prompt, answers, rng)) for labeller in world.LABELLERS]
            records.append({"prompt": prompt, "completions": answers, "rankings": rankings})
    write_jsonl(folder / "rankings.jsonl", records)
    pairs, votes = pairs_from_rankings(read_rankings(folder / "rankings.jsonl"), fails="lose")
    write_jsonl(
        folder / "pairs.jsonl", [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    )
    agreement = ", ".join(f"{name} {share:.2f}" for name, share in votes.agreement().items())
    say(
        f"{len(records)} prompts x {cfg.ranked_answers} answers: {votes.pairs} pairs; {votes.ties} ties and "
        f"{votes.disagreements} disagreements dropped, {votes.failed_completions} answers failed"
    )
    say(f"agreement of each labeller with the rest: {agreement}")


def evaluate(cfg: Config, folder: Path, heldout: list[str]) -> tuple[dict[str, Any], list[Check]]:
    options = evaluation.Config(
        before=f"{folder}/sft",
        after=[f"{folder}/ppo"],
        prompts=f"{folder}/heldout_prompts.jsonl",
        output_dir=f"{folder}/eval",
        toxicity="rlhf_trainer.worlds.demo:toxicity",
        reward=f"{folder}/reward",
        measures=["on topic=rlhf_trainer.worlds.demo:on_topic"],
        max_prompts=len(heldout),
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
        seed=cfg.seed,
    )
    show_command("eval", options)
    result = evaluation.measure_policies(options)
    evaluation.write_result(result, options.output_dir)
    return result, promises(result, kind_diversity(heldout, cfg.seed))


def kind_diversity(prompts: Sequence[str], seed: int) -> float:
    """distinct-2 of the world's own kind answers to these prompts: as diverse as a kind policy should be."""
    rng = random.Random(seed)
    answers = [world.make_answer(prompt, 0.0, rng) for prompt in prompts]
    return evaluation.distinct(answers, 2)[0]


def promises(result: dict[str, Any], kind_distinct_2: float) -> list[Check]:
    """What the demo promises of policy "ppo" against "sft".

    "On topic" asks for a whole answer that names a remedy for the very problem of the prompt, so that a policy which
    fell into one polite sentence, silence or repetition breaks it; distinct-2 against the world's kind answers asks
    that it has not fallen into one phrasing either.
    """
    before, after = (result["policies"][name]["measures"] for name in ("sft", "ppo"))
    toxicity = before["toxicity"]["mean"]
    fall = 1 - after["toxicity"]["mean"] / toxicity if toxicity > 0 else 0.0
    kl = after["KL (nats)"]
    change = result["changes"]["ppo"]["reward"]
    topic, diversity = after["on topic"]["mean"], after["distinct-2"]["mean"]
    return [
        Check(
            f"toxicity falls by at least {LEAST_FALL:.0%}",
            f"{toxicity:.3f} -> {after['toxicity']['mean']:.3f}, by {fall:.0%}",
            fall >= LEAST_FALL,
        ),
        Check(
            f"KL to the SFT model under {MOST_KL:g} nats",
            f"{kl['mean']:.2f}",
            kl["high"] is not None and kl["high"] < MOST_KL,
        ),
        Check("reward rises", f"by {show_estimate(change)}", change["low"] is not None and change["low"] > 0),
        Check(
            f"on topic: at least {LEAST_ON_TOPIC:.0%} of the SFT model's share",
            f"{before['on topic']['mean']:.3f} -> {topic:.3f}",
            topic >= LEAST_ON_TOPIC * before["on topic"]["mean"],
        ),
        Check(
            f"distinct-2: at least {LEAST_DIVERSITY:.0%} of the world's kind answers'",
            f"{diversity:.3f}, theirs {kind_distinct_2:.3f}",
            diversity >= LEAST_DIVERSITY * kind_distinct_2,
        ),
    ]


def curves(folder: Path) -> list[Curve]:
    sft, reward, ppo = (read_metrics(folder / name) for name in ("sft", "reward", "ppo"))
    for record in ppo:
        record["toxicity"] = 1 - record["objective/gold_scores"]
    return [
        metric_curve(sft, {"loss": "training", "heldout/loss": "held-out"}, "SFT loss", "nats per token"),
        metric_curve(reward, {"loss": "training", "heldout/loss": "held-out"}, "reward model loss"),
        metric_curve(reward, {"heldout/accuracy": "held-out"}, "reward model: pair accuracy", limits=(0.5, 1.0)),
        metric_curve(ppo, {"objective/scores": "score", "objective/rlhf_reward": "minus KL"}, "PPO: reward"),
        metric_curve(ppo, {"objective/kl": "KL"}, "PPO: KL to the SFT model", "nats per response"),
        metric_curve(ppo, {"toxicity": "toxicity"}, "PPO: toxicity, by the judge nobody saw"),
    ]


def write_page(folder: Path, result: dict[str, Any], checks: Sequence[Check], minutes: float) -> Path:
    notes = [
        "A tiny language model was fine-tuned on kind and rude answers to everyday problems, five simulated labellers "
        "ranked its answers, a reward model learned from their votes, and PPO aligned the model to it. Toxicity is "
        f"judged by a word list that neither labellers nor reward model saw. {minutes:.1f} minutes on a CPU.",
    ]
    return write_report(
        folder / "report.html", result, title="rlhf demo", curves=curves(folder), checks=checks, notes=notes
    )
