"""The metrics of a PPO update under TRL's names, sample completions; adaptive KL and the criteria to stop on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedTokenizerBase

from rlhf_trainer.onpolicy.terms import Batch, without_spread
from rlhf_trainer.training.alerts import Alert

STOP_UPDATES = 5  # behind a decision to stop
PHASES = ("rollout", "scoring", "update")


def summarize(
    batch: Batch,
    minibatches: list[dict[str, float]],
    beta: float,
    tokenizer: PreTrainedTokenizerBase,
    *,
    group_size: int = 1,
) -> dict[str, float]:
    """The metrics of one update, under the names of TRL's PPO trainer."""
    mask = batch.rollout.response_mask
    kl, sampled = batch.exact_kl.sum(-1).mean().item(), batch.kl.sum(-1).mean().item()
    scores = batch.scores.mean().item()
    average = {name: sum(s[name] for s in minibatches) / len(minibatches) for name in minibatches[0]}
    ratios = torch.tensor([s["ratio"] for s in minibatches])
    metrics = {
        "objective/kl": kl,
        "objective/kl_sampled": sampled,
        "objective/entropy": -batch.logprobs.sum(-1).mean().item(),
        "objective/non_score_reward": -beta * kl,
        "objective/rlhf_reward": scores - beta * kl,
        "objective/scores": scores,
        "objective/kl_coef": beta,
        "policy/approxkl_avg": average["approx_kl"],
        "policy/clipfrac_avg": average["clipfrac"],
        "policy/entropy_avg": average["entropy"],
        "loss/policy_avg": average["policy_loss"],
        "val/ratio": average["ratio"],
        "val/ratio_var": ratios.var(correction=0).item(),
        "val/num_eos_tokens": float((batch.rollout.responses[mask] == tokenizer.eos_token_id).sum()),
        "val/missing_eos": 1 - batch.rollout.ended.float().mean().item(),
        "val/response_length": mask.sum(-1).float().mean().item(),
        "grad_norm": average["grad_norm"],
    }
    if group_size > 1:
        metrics["val/groups_without_spread"] = without_spread(batch.scores, group_size).float().mean().item()
    if "value_loss" in average:  # there is a value head
        errors, targets = (batch.returns - batch.values)[mask], batch.returns[mask]
        spread = targets.var(correction=0).item()
        metrics["loss/value_avg"] = average["value_loss"]
        metrics["val/clipfrac_avg"] = average["value_clipfrac"]
        metrics["val/var_explained"] = 1 - errors.var(correction=0).item() / spread if spread > 0 else 0.0
    return metrics


def phase_times(history: list[dict[str, float]]) -> str:
    """Seconds of each phase over a run, and its share of them."""
    seconds = {phase: sum(row.get(f"seconds/{phase}", 0.0) for row in history) for phase in PHASES}
    total = sum(seconds.values())
    shares = (f"{phase} {value:.1f} s ({value / total:.0%})" for phase, value in seconds.items() if total)
    return f"{len(history)} updates: " + ", ".join(shares)


def adapt_kl_coef(beta: float, kl: float, *, target: float | None, episodes: int, horizon: int) -> float:
    """beta after a rollout of so many episodes: fixed, or moved towards the target KL (Ziegler et al. 2019)."""
    if target is None:
        return beta
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def samples(batch: Batch, count: int = 8) -> list[dict[str, Any]]:
    """The first completions of a rollout with their scores and KL."""
    kl = batch.exact_kl.sum(-1).tolist()
    rows = zip(batch.rollout.prompts, batch.rollout.completions, batch.scores.tolist(), kl, strict=True)
    return [dict(zip(("prompt", "completion", "score", "kl"), row, strict=True)) for row in rows][:count]


def surely_at_least(history: Sequence[dict[str, float]], metric: str) -> float | None:
    """Where the one-sided 95 % interval of a metric's mean over the last STOP_UPDATES updates begins.

    None before so many updates: the mean of one rollout of a few prompts may lie anywhere.
    """
    values = [row[metric] for row in history[-STOP_UPDATES:] if metric in row]
    if len(values) < STOP_UPDATES:
        return None
    spread = float(np.std(values, ddof=1)) / STOP_UPDATES**0.5
    return float(np.mean(values)) - float(stats.t.ppf(0.95, STOP_UPDATES - 1)) * spread


def stop_reason(
    history: Sequence[dict[str, float]],
    alarms: Sequence[Alert] = (),
    *,
    stop_reward: float | None,
    stop_gold: float | None,
    stop_kl: float | None,
) -> str | None:
    """Why to stop after the newest update of the history, None to go on. alarms: alerts of it that stop the run."""
    if alarms:
        return f"alert: {alarms[0].metric}: {alarms[0].reason}"
    bars = (("score", "scores", "stop_reward", stop_reward), ("gold reward", "gold_scores", "stop_gold", stop_gold))
    for what, metric, option, bar in bars:
        low = surely_at_least(history, f"objective/{metric}")
        if bar is not None and low is not None and low >= bar:
            return f"the mean {what} of the last {STOP_UPDATES} updates, surely {low:.3f}, reached --{option} {bar}"
    kl = history[-1]["objective/kl"]
    if stop_kl is not None and kl > stop_kl:
        return f"KL {kl:.2f} nats exceeded --stop_kl {stop_kl}"
    return None
