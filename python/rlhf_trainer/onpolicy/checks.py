"""PPO's guards: options that cannot work, invariants that hold by construction, numbers that stopped being finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_trainer.base.conditions import parse_gates
from rlhf_trainer.base.errors import InvariantError, UserError
from rlhf_trainer.models import precision, quantised
from rlhf_trainer.sampling import vllm as rollout_vllm
from rlhf_trainer.sampling.rollout import Rollout
from rlhf_trainer.training.trackers import chosen_trackers

if TYPE_CHECKING:
    from rlhf_trainer.onpolicy.config import PPOConfig


def validate_options(cfg: PPOConfig) -> None:
    """UserError for options that cannot work, before anything is loaded."""
    if cfg.kl_estimator != "k1":
        raise UserError(
            f"--kl_estimator {cfg.kl_estimator}: as a penalty inside the reward only k1 has the gradient of the KL; "
            "k2, k3 and abs there reward dropping tokens that the reference likes"
        )
    cfg.lora.validate()
    precision.validate_dtype(cfg.dtype)
    quantised.validate_options(cfg.load_in_4bit, merge=cfg.merge)
    rollout_vllm.validate_options(cfg.rollout_engine, vllm_memory=cfg.vllm_memory, load_in_4bit=cfg.load_in_4bit)
    chosen_trackers(cfg.report_to)
    parse_gates(cfg.alert, None, "--alert")
    if cfg.missing_eos not in ("subtract", "replace"):
        raise UserError(f"--missing_eos {cfg.missing_eos}: it takes subtract or replace")
    if cfg.advantage not in ("gae", "grpo", "rloo", "mean"):
        raise UserError(f"--advantage {cfg.advantage}: it takes gae, grpo, rloo, mean")
    at_least_one = ("updates", "batch_size", "group_size", "minibatches", "epochs", "max_new_tokens", "kl_horizon")
    for name in (*at_least_one, "micro_batch_size", "rollout_batch_size"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if cfg.gradient_checkpointing and cfg.value_adapter:
        raise UserError(
            "--gradient_checkpointing does not go with --value_adapter: layers would run again with the wrong adapter"
        )
    if cfg.stop_gold is not None and cfg.gold_reward is None:
        raise UserError("--stop_gold needs --gold_reward")
    if cfg.minibatches > cfg.batch_size:
        raise UserError(f"--minibatches {cfg.minibatches}: more than --batch_size {cfg.batch_size}")
    if cfg.batch_size % cfg.group_size:
        raise UserError(f"--group_size {cfg.group_size} does not divide --batch_size {cfg.batch_size}")
    if cfg.value_adapter and cfg.advantage != "gae":
        raise UserError(f"--value_adapter: --advantage {cfg.advantage} has no value function")
    if cfg.advantage != "gae" and cfg.whiten_rewards:
        raise UserError(f"--whiten_rewards: for gae; --advantage {cfg.advantage} compares whole scores")
    if cfg.advantage != "gae" and cfg.group_size < 2:
        raise UserError(f"--advantage {cfg.advantage} compares responses to one prompt; --group_size must be 2 or more")
    positive = ("temperature", "lr", "value_lr", "adam_eps", "max_grad_norm", "kl_target", "score_clip", "target_kl")
    for name in positive:
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: must be more than 0")
    for name, high in (
        *((name, 1.0) for name in ("gamma", "lam")),
        *((name, math.inf) for name in ("kl_coef", "clip", "value_clip", "vf_coef", "save_every")),
    ):
        value = getattr(cfg, name)
        if not (0 <= value <= high and value < math.inf):
            raise UserError(f"--{name} {value}: must be at least 0" + (" and at most 1" if high == 1 else ""))
    for name in ("entropy_coef", "missing_eos_penalty", "stop_reward", "stop_gold", "stop_kl"):
        value = getattr(cfg, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a number")


def check_shares(
    world: int, *, rollout_engine: str = "hf", batch_size: int, minibatches: int = 1, group_size: int = 1
) -> None:
    """UserError where a rank would have nothing to do, or an option is for one process."""
    if world > 1 and rollout_engine != "hf":
        raise UserError(f"--rollout_engine {rollout_engine} is for one process; {world} share their rollouts with hf")
    rows, groups = batch_size // minibatches, batch_size // group_size
    if min(rows, groups) < world:
        raise UserError(
            f"{world} processes share each minibatch of {rows} responses and each rollout of {groups} groups; there "
            "must be at least one for each process: raise --batch_size or start fewer"
        )


def check_first_kl(kl: Tensor, equal_weights: bool) -> None:
    """At step 0 a policy with the reference's weights is at KL 0 exactly, token by token."""
    if equal_weights and bool((kl != 0).any()):
        raise InvariantError(
            f"invariant violated at step 0: the policy has the reference's weights, but their logprobs differ by up to "
            f"{kl.abs().max().item():.3g} nats; the two forward passes do not compute the same thing"
        )


def check_first_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> None:
    """At the first minibatch nothing has been updated: the ratio is 1 to the bit."""
    difference = (logprobs.detach() - old_logprobs)[mask]
    if bool((difference != 0).any()):
        raise InvariantError(
            f"invariant violated at step 0: the first minibatch's ratio is not 1 (logprobs differ by up to "
            f"{difference.abs().max().item():.3g} nats); dropout, or rollout and update disagree on mask or temperature"
        )


def check_finite(name: str, values: Tensor, update: int, rows: Tensor, rollout: Rollout) -> None:
    """Stop before optimizer.step() when something is NaN or inf, naming the samples."""
    bad = ~torch.isfinite(values.detach())
    if bool(bad.any()):
        samples = rows[bad.reshape(len(rows), -1).any(-1)].tolist() if bad.dim() else rows.tolist()
        texts = [rollout.completions[sample][:60] for sample in samples[:3]]
        raise UserError(
            f"update {update}: {name} is not finite in samples {samples[:8]}, such as {texts}; nothing was updated"
        )
