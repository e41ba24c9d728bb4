"""Checks of `rlhf verify` on reward models: one learns the true reward; over-optimising another raises the alert."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_trainer.data.records import Pair
from rlhf_trainer.judging.rewards import RewardFunction, load_reward
from rlhf_trainer.models.loading import save_folder
from rlhf_trainer.models.scoring import load_normalisation
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.reward import RewardConfig, train_reward
from rlhf_trainer.training.runlog import read_metrics, read_records
from rlhf_trainer.verification.cases import BETA, PAIRS, CheckResult, fitted_reference, ppo_config, sampled_pairs
from rlhf_trainer.worlds.exact import PROMPTS, ExactWorld

LOSS_ABOVE = 0.02  # nats a pair above the loss of the true reward
CORRELATION = 0.90
FEW = 300  # pairs of the reward model that is over-optimised
LOOSE, LOOSE_UPDATES = 0.03, 60  # its beta, and updates of PPO
BETAS = (2.0, 1.0, 0.5, 0.25, 0.12, 0.06, LOOSE)
LOST = 0.02  # of the true reward: four standard errors of the mean over ten updates
ORACLE = "rlhf_trainer.worlds.exact:oracle"


def reward_config(folder: Path, seed: int) -> RewardConfig:
    """The options under which the gates were set."""
    options: dict[str, Any] = {
        "model": f"{folder}/reference",
        "output_dir": f"{folder}/reward",
        "report_to": ["none"],
        "heldout": 0,
    }
    return RewardConfig(epochs=4, batch_size=128, lr=3e-3, evals=1, seed=seed, device="cpu", **options)


def trained_reward(folder: Path, cfg: RewardConfig, pairs: Sequence[Pair], seed: int) -> RewardFunction:
    """A reward model on the reference policy's backbone, trained and loaded by the code of `rlhf reward`."""
    tokenizer, reference = fitted_reference(seed)
    save_folder(cfg.model, reference, tokenizer)
    train_reward(cfg, pairs=pairs)
    return load_reward(cfg.output_dir)


def all_scores(world: ExactWorld, reward: RewardFunction) -> Tensor:
    """Score of every response to every prompt [8, 1365], float64."""
    prompts, responses = [prompt for prompt, _ in world.pairs], [response for _, response in world.pairs]
    return torch.tensor(reward(prompts, responses), dtype=torch.float64).view(world.rewards.shape)


def pair_loss(world: ExactWorld, scores: Tensor) -> float:
    """Exactly: the expected loss of Bradley-Terry's labels for two answers of the reference, in nats."""
    total = 0.0
    for pi, rewards, own in zip(world.reference.exp(), world.rewards, scores, strict=True):
        label = (rewards.unsqueeze(1) - rewards).sigmoid()
        difference = own.unsqueeze(1) - own
        losses = -label * logsigmoid(difference) - (1 - label) * logsigmoid(-difference)
        total += (pi @ losses @ pi).item() / len(scores)
    return total


def correlation(world: ExactWorld, scores: Tensor) -> float:
    """Correlation of the scores with the true reward, each response weighted by its probability under the reference.

    Each prompt's mean is subtracted first: a reward model cannot learn it from pairs that share the prompt.
    """
    weights = world.reference.exp()
    own, true = (x - (weights * x).sum(-1, keepdim=True) for x in (scores, world.rewards))
    return ((weights * own * true).sum() / ((weights * own**2).sum() * (weights * true**2).sum()).sqrt()).item()


def check_reward(seed: int) -> list[CheckResult]:
    """A reward model from labelled pairs of the reference's own answers, against the reward behind the labels."""
    tokenizer, reference = fitted_reference(seed)
    world = ExactWorld(reference, tokenizer, BETA, 1.0)
    pairs = [tokenized.pair for tokenized in sampled_pairs(reference, tokenizer, PAIRS, seed)]
    with TemporaryDirectory() as place:
        cfg = reward_config(Path(place), seed)
        scores = all_scores(world, trained_reward(Path(place), cfg, pairs, seed))
        mean, std = load_normalisation(cfg.output_dir)
    above = pair_loss(world, scores * std + mean) - pair_loss(world, world.rewards)
    found = correlation(world, scores)
    return [
        CheckResult("reward model: loss above the true reward's", above, f"<= {LOSS_ABOVE}", above <= LOSS_ABOVE),
        CheckResult("reward model: correlation with it", found, f">= {CORRELATION:.2f}", found >= CORRELATION),
    ]


def true_rewards(world: ExactWorld, scores: Tensor) -> list[float]:
    """Exactly: the true reward of the policy that is optimal for `scores`, at each of BETAS."""
    best = [(world.reference + scores / beta).softmax(-1) for beta in BETAS]
    return [(pi * world.rewards).sum(-1).mean().item() for pi in best]


def overoptimised_run(folder: Path, reward: RewardFunction, seed: int) -> list[dict[str, Any]]:
    """The metrics of PPO against `reward` with hardly any penalty, the true reward watched; alerts lie in `folder`."""
    tokenizer, reference = fitted_reference(seed)
    options: dict[str, Any] = {"gold_reward": ORACLE, "output_dir": str(folder), "report_to": ["none"], "save_every": 0}
    train_ppo(
        replace(ppo_config(LOOSE_UPDATES, seed, LOOSE), **options),
        model=copy.deepcopy(reference),
        tokenizer=tokenizer,
        reward=reward,
        prompts=PROMPTS,
    )
    return read_metrics(folder)


def ten_updates(history: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Means of a metric over every ten updates in a row, as RewardHackingMonitor compares them."""
    values = [metrics[metric] for metrics in history]
    return [sum(values[start : start + 10]) / 10 for start in range(len(values) - 9)]


def warned(folder: Path, metric: str) -> int:
    """The first update with an alert about a metric, 0 if there was none."""
    records = read_records(folder / "alerts.jsonl")
    return next((record["step"] for record in records if record["metric"] == metric), 0)


def check_overoptimisation(seed: int) -> list[CheckResult]:
    """A reward model of few pairs, hardly any KL penalty: the score rises, the true reward falls, the alert comes."""
    tokenizer, reference = fitted_reference(seed)
    world = ExactWorld(reference, tokenizer, BETA, 1.0)
    pairs = [tokenized.pair for tokenized in sampled_pairs(reference, tokenizer, FEW, seed)][:FEW]
    with TemporaryDirectory() as place:
        cfg = replace(reward_config(Path(place), seed), batch_size=32, epochs=20)  # learnt by heart
        reward = trained_reward(Path(place), cfg, hard_labels(pairs, seed), seed)
        exact = true_rewards(world, all_scores(world, reward))
        history = overoptimised_run(Path(place) / "ppo", reward, seed)
        step = warned(Path(place) / "ppo", "objective/gold_scores")
    gold, scores = (ten_updates(history, f"objective/{name}") for name in ("gold_scores", "scores"))
    best = gold.index(max(gold))
    lost, risen = gold[best] - gold[-1], scores[-1] - scores[best]
    by_beta = {"beta": list(BETAS), "true_reward": exact}
    by_update = {name: [one[f"objective/{name}"] for one in history] for name in ("scores", "gold_scores")}
    at_loose, gate = max(exact) - exact[-1], f"> {LOST}"
    return [
        CheckResult(
            f"over-optimised: exact true reward lost from the best beta to {LOOSE}",
            at_loose,
            gate,
            at_loose > LOST,
            by_beta,
        ),
        CheckResult(
            "over-optimised: PPO's true reward lost since its best ten updates", lost, gate, lost > LOST, by_update
        ),
        CheckResult("over-optimised: its score risen meanwhile", risen, "> 0", risen > 0),
        CheckResult("over-optimised: update of the watch's warning", step, f"1 to {LOOSE_UPDATES}", step > 0),
    ]


def hard_labels(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """One labeller's choice of each pair, drawn from its label."""
    draws = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        replace(pair, label=1.0)
        if draw < pair.label
        else replace(pair, chosen=pair.rejected, rejected=pair.chosen, label=1.0)
        for pair, draw in zip(pairs, draws, strict=True)
    ]


CHECKS: dict[str, Callable[[int], list[CheckResult]]] = {
    "reward": check_reward,
    "overoptimisation": check_overoptimisation,
}
