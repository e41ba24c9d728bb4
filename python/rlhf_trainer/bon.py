"""`rlhf bon`: best-of-N. N completions of every prompt, scored by a reward; the best one is kept."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base import shared
from rlhf_trainer.base.config import option, refuse_overwriting, require
from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import resolve_device
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import write_text
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.stages import read_prompts
from rlhf_trainer.judging.rewards import RewardFunction, load_reward, scores_of
from rlhf_trainer.models.loading import load_causal, load_tokenizer, on_device
from rlhf_trainer.reports.intervals import estimate, units_of
from rlhf_trainer.reports.page import COLOURS, embed, html_table, show_estimate, show_number, write_page
from rlhf_trainer.sampling.batches import BatchFile, file_beside, sample_batches
from rlhf_trainer.sampling.options import SamplingConfig
from rlhf_trainer.sampling.rollout import encode_prompts, stop_token_id

SUMMARY = """Sample N completions of every prompt, score them with a reward, keep the best: data for `rlhf sft`.

Beside --output lie .samples.jsonl (all completions with their scores), .report.json and .report.html (reward for every
n up to N, with the KL that choosing costs at most). After a crash --resume goes on and gives the same files."""
EXAMPLE = (
    "rlhf bon --model runs/sft --reward runs/reward --prompts prompts.jsonl --output best.jsonl --n 16\n"
    "  rlhf sft --model runs/sft --data best.jsonl --output_dir runs/distilled"
)


@dataclass
class BonConfig(SamplingConfig):
    output: str = option("", "JSON-lines file for the best completion of every prompt; the other files lie beside it")
    n: int = shared.n(16)
    reward: str = shared.reward("")
    reward_label: str | None = shared.reward_label()
    reward_timeout: float | None = shared.reward_timeout()
    reward_workers: int = shared.reward_workers()
    reward_completion_only: bool = shared.reward_completion_only()
    missing_eos_penalty: float = option(0.0, "reward units taken from a completion that did not end by itself")
    pairs: str | None = option(None, "also write the best and the worst of each prompt as preference pairs, here")
    bootstrap: int = shared.bootstrap()


Config = BonConfig


@dataclass
class BonResult:
    """best: {"prompt", "completion", "score", "ended"} a prompt; samples: all of them; figures: .report.json's."""

    best: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    figures: dict[str, Any]
    output: str  # "": nothing was written


def run(cfg: BonConfig) -> dict[str, Any]:
    require(cfg, "model", "prompts", "reward", "output")
    figures = best_of_n(cfg).figures
    last = figures["by_n"][-1]
    one, best = (show_estimate(entry["reward"]) for entry in (figures["by_n"][0], last))
    say(
        f"{cfg.output}: mean reward {one} of one completion, {best} of the best of {cfg.n}, at most "
        f"{show_number(last['kl_bound'])} nats away; {Path(cfg.output).with_suffix('.report.html')}"
    )
    return figures


def best_of_n(
    cfg: BonConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward: RewardFunction | None = None,
    prompts: list[str] | None = None,
) -> BonResult:
    """Sample, score, choose. What is not passed is loaded from what cfg names; without cfg.output nothing is written.

    Raises:
        UserError: bad input, one sentence.
    """
    needed = {"model": model, "reward": reward, "prompts": prompts}
    require(cfg, *(name for name, given in needed.items() if given is None))
    cfg.validate_numbers()
    if cfg.bootstrap < 1:
        raise UserError(f"--bootstrap {cfg.bootstrap}: must be at least 1")
    refuse_overwriting("output", cfg.output, cfg.prompts)
    refuse_overwriting("pairs", cfg.pairs, cfg.prompts, cfg.output)
    device = resolve_device(cfg.device)
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, cfg.trust_remote_code)
    prompts = (read_prompts(cfg.prompts, tokenizer) if prompts is None else prompts)[: cfg.max_prompts]
    file = BatchFile(file_beside(cfg.output, ".samples.jsonl"), asdict(cfg), cfg.resume, cfg.prompts)
    batch = max(1, cfg.batch_size // cfg.n)
    start = file.resume_position(prompts, batch)
    if model is None:
        model = load_causal(cfg.model, tokenizer, trust_remote_code=cfg.trust_remote_code)
    model = on_device(model, device)
    encode_prompts(model, tokenizer, prompts, cfg.max_new_tokens)
    if cfg.stop_token is not None:
        stop_token_id(tokenizer, cfg.stop_token)
    if reward is None:
        reward = load_reward(
            cfg.reward,
            label=cfg.reward_label,
            completion_only=cfg.reward_completion_only,
            timeout=cfg.reward_timeout,
            workers=cfg.reward_workers,
            device=device,
            pad_token=cfg.pad_token,
            trust_remote_code=cfg.trust_remote_code,
        )
    batches = sample_batches(model, tokenizer, prompts, cfg.sampling, start=start, batch=batch)
    scored = (score(records, reward, cfg.missing_eos_penalty) for records in batches)
    samples = file.append_batches(scored, start=start, total=len(prompts), description="best of n")
    best = [chosen(record) for record in samples]
    figures = statistics(cfg, samples)
    if cfg.output:
        write_files(cfg, best, samples, figures)
    return BonResult(best, samples, figures, cfg.output)


def score(records: list[dict[str, Any]], reward: RewardFunction, missing_eos_penalty: float) -> list[dict[str, Any]]:
    """The records with their completions' "scores", less the penalty where a completion did not end by itself."""
    prompts = [record["prompt"] for record in records for _ in record["completions"]]
    completions = [completion for record in records for completion in record["completions"]]
    ended = torch.tensor([end for record in records for end in record["ended"]])
    scores = scores_of(reward, prompts, completions) - missing_eos_penalty * (~ended).float()
    by_prompt = scores.view(len(records), -1).tolist()
    return [record | {"scores": own} for record, own in zip(records, by_prompt, strict=True)]


def chosen(record: dict[str, Any]) -> dict[str, Any]:
    """The first of the best completions."""
    index = max(range(len(record["scores"])), key=lambda i: record["scores"][i])
    return {
        "prompt": record["prompt"],
        "completion": record["completions"][index],
        "score": record["scores"][index],
        "ended": record["ended"][index],
    }


def worst_pair(record: dict[str, Any]) -> dict[str, Any]:
    """The best completion against the first of the worst, with the distance of their scores as margin."""
    best = chosen(record)
    index = min(range(len(record["scores"])), key=lambda i: record["scores"][i])
    rejected, distance = record["completions"][index], best["score"] - record["scores"][index]
    return {"prompt": record["prompt"], "chosen": best["completion"], "rejected": rejected, "margin": distance}


def expected_best(scores: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """scores [P, N] -> [P] expected best of n <= N of them drawn without replacement.

    Over all n-subsets of the N samples, without bias: the i-th smallest is the best of C(i - 1, n - 1) subsets.
    """
    total = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
    return np.asarray(np.sort(scores, 1) @ weights)


def kl_bound(n: int) -> float:
    """log n - (n - 1)/n nats: KL(best-of-n || policy) at most, reached where no two completions score the same."""
    return math.log(n) - (n - 1) / n


def statistics(cfg: BonConfig, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Reward for n = 1, 2, 4, ... N with 95 % intervals over the prompts, the KL bound, how many samples differ."""
    scores = np.array([record["scores"] for record in samples])
    units = units_of([record["prompt"] for record in samples])
    sizes = sorted({*(2**i for i in range(cfg.n.bit_length())), cfg.n})
    by_n = [
        {
            "n": n,
            "reward": estimate(expected_best(scores, n), cfg.bootstrap, cfg.seed, units, share=False),
            "kl_bound": kl_bound(n),
        }
        for n in sizes
    ]
    return {
        "prompts": len(samples),
        "n": cfg.n,
        "distinct": sum(len(set(record["completions"])) for record in samples) / scores.size,
        "ended": float(np.mean([record["ended"] for record in samples])),
        "best_ended": float(np.mean([chosen(record)["ended"] for record in samples])),
        "by_n": by_n,
    }


def write_files(
    cfg: BonConfig, best: list[dict[str, Any]], samples: list[dict[str, Any]], figures: dict[str, Any]
) -> None:
    write_jsonl(cfg.output, best)
    if cfg.pairs:
        found = [worst_pair(record) for record in samples]
        write_jsonl(cfg.pairs, [pair for pair in found if pair["margin"] > 0])
    path = Path(cfg.output).with_suffix(".report.json")
    write_text(path, dumps(figures, indent=2) + "\n")
    rows = [
        [f"best of {one['n']}", show_estimate(one["reward"]), show_number(one["kl_bound"])] for one in figures["by_n"]
    ]
    shown = [[record["prompt"], record["completions"][0], best[i]["completion"]] for i, record in enumerate(samples)]
    parts = [
        f"<p>{figures['prompts']} prompts, {cfg.n} completions each, of which {figures['distinct']:.0%} are distinct; "
        f"{figures['ended']:.0%} ended by themselves, {figures['best_ended']:.0%} of the best did.</p>",
        f"<p>Reward: {html.escape(cfg.reward)}</p>",
        html_table(["", "reward, mean and 95 % interval", "KL to the policy, nats, at most"], rows),
        embed(reward_figure(figures), "reward against the bound of the KL"),
        "<h2>One completion, and the best</h2>",
        html_table(["prompt", "first", f"best of {cfg.n}"], shown[:20], numbers=False),
    ]
    write_page(path.with_suffix(".html"), f"Best of {cfg.n}", parts)


def reward_figure(figures: dict[str, Any]) -> Figure:
    """Reward with its interval against the KL bound, a point for each n."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    x = [one["kl_bound"] for one in figures["by_n"]]
    rewards = [one["reward"] for one in figures["by_n"]]
    axes.plot(x, [reward["mean"] for reward in rewards], marker="o", color=COLOURS[1])
    if rewards[0]["low"] is not None:
        axes.fill_between(x, [r["low"] for r in rewards], [r["high"] for r in rewards], color=COLOURS[1], alpha=0.15)
    for place, one in zip(x, figures["by_n"], strict=True):
        text = str(one["n"])
        axes.annotate(text, (place, one["reward"]["mean"]), xytext=(0, 6), textcoords="offset points", fontsize=8)
    axes.set(xlabel="log n - (n - 1)/n, nats", ylabel="reward of the best of n")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
