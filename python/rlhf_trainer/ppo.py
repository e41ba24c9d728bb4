"""`rlhf ppo`: PPO with a KL penalty to a frozen reference in the reward, and a value head. The loop is `train_ppo`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed

from rlhf_kernels import (
    gae,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from rlhf_trainer.base.config import save_config
from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import distributed_context, on_all_ranks, resolve_device
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.judging.rewards import RewardFunction, load_reward, shared_scores
from rlhf_trainer.models import precision
from rlhf_trainer.models.adapters import Adapter, use_adapter
from rlhf_trainer.models.sharding import load_device, prepare_model, prepare_trained_model, unsharded_tensor
from rlhf_trainer.onpolicy.checks import check_finite, check_first_kl, check_first_ratio, check_shares, validate_options
from rlhf_trainer.onpolicy.config import PPOConfig
from rlhf_trainer.onpolicy.inputs import load_inputs, prompt_batch, starts_equal
from rlhf_trainer.onpolicy.metrics import adapt_kl_coef, phase_times, samples, stop_reason, summarize
from rlhf_trainer.onpolicy.terms import Batch, final_scores, group_baseline, kl_penalty
from rlhf_trainer.onpolicy.value_head import VALUE_HEAD, ValueHead, load_value_head
from rlhf_trainer.onpolicy.watch import RewardHackingMonitor
from rlhf_trainer.sampling.responses import token_outputs
from rlhf_trainer.sampling.rollout import Rollout
from rlhf_trainer.sampling.vllm import load_engine
from rlhf_trainer.training.alerts import Alerts, announce
from rlhf_trainer.training.checkpoint import Checkpoints, stop_on_signals
from rlhf_trainer.training.finish import finish
from rlhf_trainer.training.runlog import RunLog

SUMMARY = "Align a policy with PPO: reward minus KL to the frozen reference, value head, clipped updates."
EXAMPLE = "rlhf ppo --model runs/sft --reward runs/reward --prompts prompts.jsonl --output_dir runs/ppo --kl_coef 0.05"


Config = PPOConfig


@dataclass
class PPOResult:
    """What `train_ppo` returns: the trained modules, the metrics of every update, and why it stopped."""

    policy: PreTrainedModel
    value_head: ValueHead | None  # None without gae
    tokenizer: PreTrainedTokenizerBase
    metrics: list[dict[str, float]]
    stopped: str
    output_dir: str = ""  # "": nothing was written


def run(cfg: PPOConfig) -> dict[str, Any]:
    result = train_ppo(cfg)
    say(phase_times(result.metrics))
    return {"stopped": result.stopped, "metrics": result.metrics[-1] if result.metrics else {}}


@on_all_ranks
def train_ppo(
    cfg: PPOConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ref_model: PreTrainedModel | None = None,
    reward: RewardFunction | None = None,
    prompts: list[str] | None = None,
    on_update: Callable[[int, PreTrainedModel], None] | None = None,
) -> PPOResult:
    """Train a policy with PPO. What is not passed as an object is loaded from the folder or file that cfg names.

    Args:
        model, tokenizer: the policy (trained in place; lora_r puts an adapter on it) and its tokenizer, which must
            have a pad token other than EOS.
        ref_model: the frozen reference; None: the policy as it is now (with LoRA on the same base, not a copy).
        reward: `(prompts, completions) -> scores`, one finite number each.
        prompts: the texts to answer.
        on_update: called with the number of updates done and the policy, after each update.

    Under `accelerate launch` every rank calls it alike, and rank 0 writes.

    Raises:
        UserError: bad input, one sentence. InvariantError: a step-0 invariant does not hold.
    """
    validate_options(cfg)
    ranks = distributed_context()
    check_shares(cfg, ranks.world)
    device = resolve_device(cfg.device)
    set_seed(cfg.seed)  # Python's and NumPy's too: a reward function may draw from them
    given = (model, tokenizer, ref_model, reward, prompts)
    policy, tokenizer, reference, reward, prompts = load_inputs(cfg, device, *given)
    reference_is_policy = starts_equal(policy, reference)
    gold = None
    if cfg.gold_reward is not None:
        kind: dict[str, Any] = {"label": cfg.gold_label, "completion_only": cfg.reward_completion_only}
        folder: dict[str, Any] = {"pad_token": cfg.pad_token, "trust_remote_code": cfg.trust_remote_code}
        gold = load_reward(cfg.gold_reward, **kind, **folder, device=device, dtype=cfg.dtype)
    value_head = load_value_head(cfg, policy, load_device(device)) if cfg.advantage == "gae" else None
    heads = {} if value_head is None else {"value_head": value_head}
    prepare_trained_model(cfg, policy, device, *heads.values(), given=model is not None)
    separate = None if isinstance(reference, Adapter) else reference  # else among the policy's frozen weights
    if separate is not None:
        prepare_model(separate, device)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("every parameter of the policy is frozen (requires_grad is False); there is nothing to train")
    parameters = [*trained, *(parameter for head in heads.values() for parameter in head.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=cfg.lr, eps=cfg.adam_eps, fused=device.type in ("cpu", "cuda"))
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=cfg.updates)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    beta = cfg.kl_coef
    checkpoints = Checkpoints(
        cfg, {"policy": policy, **heads}, optimizer, scheduler, generator, {"prompts": prompts}, separate
    )
    start, beta, history = checkpoints.resume(beta)
    stopped = checkpoints.stopped or "all updates done"
    sample = load_engine(
        cfg.rollout_engine,
        policy,
        group_size=cfg.group_size,
        gather=cfg.gather_for_rollout,
        vllm_memory=cfg.vllm_memory,
        seed=cfg.seed,
        trust_remote_code=cfg.trust_remote_code,
    )
    watch, alerts = RewardHackingMonitor(cfg, history), Alerts(cfg.alert, history)
    sampling = {name: getattr(cfg, name) for name in ("max_new_tokens", "temperature", "stop_token")}
    sampling["batch_size"] = cfg.rollout_batch_size
    if cfg.output_dir:
        save_config(cfg, cfg.output_dir)

    reporting: dict[str, Any] = {"start": start, "report_to": cfg.report_to, "cfg": cfg}
    logging = RunLog(cfg.output_dir, cfg.updates, "ppo", **reporting) if cfg.output_dir else nullcontext()
    with logging as log, stop_on_signals(bool(cfg.output_dir)) as terminated:
        for update in range(start, start if checkpoints.stopped else cfg.updates):
            began = time.perf_counter()
            texts = prompt_batch(prompts, update, cfg)
            with precision.autocast(cfg.dtype, device):
                rollout = sample(policy, tokenizer, texts, generator=generator, **sampling)
            rolled = time.perf_counter()
            # Old logprobs see the rows grouped as the first epoch will: same shapes, same bits, first ratio exactly 1.
            orders = [torch.randperm(cfg.batch_size, generator=generator, device=device) for _ in range(cfg.epochs)]
            raw_scores = shared_scores(reward, rollout, cfg.group_size).to(device)
            batch = compute_advantages(policy, reference, value_head, rollout, raw_scores, orders[0], beta, cfg)
            if update == 0:
                check_first_kl(batch.kl, reference_is_policy)
            scored = time.perf_counter()
            lr = scheduler.get_last_lr()[0]
            stats = update_policy(policy, value_head, optimizer, batch, orders, update, cfg)
            scheduler.step()

            metrics = summarize(batch, stats, beta, tokenizer) | {
                "lr": lr,
                "episode": (update + 1) * cfg.batch_size,
                "eps": cfg.batch_size / (time.perf_counter() - began),
                "tokens_per_second": int(rollout.response_mask.sum()) / (time.perf_counter() - began),
                "seconds/rollout": rolled - began,
                "seconds/scoring": scored - rolled,
                "seconds/update": time.perf_counter() - scored,
            }
            if gold is not None:
                gold_scores = shared_scores(gold, rollout, cfg.group_size, "gold reward")
                metrics["objective/gold_scores"] = gold_scores.mean().item()
            history.append(metrics)
            if on_update is not None:
                on_update(update + 1, policy)
            warnings = watch.check(history, rollout)  # adds its own metrics
            alarms = alerts.check(metrics)
            next_beta = adapt_kl_coef(beta, metrics["objective/kl"], cfg)
            beta, stop = ranks.broadcast_object((next_beta, stop_reason(metrics, cfg, alarms)))
            leave = ranks.any(bool(terminated))
            announce(log, update + 1, [*warnings, *alarms], rollout.completions)  # before a checkpoint has them
            if log is not None:
                note = f"score {metrics['objective/scores']:.3f}  kl {metrics['objective/kl']:.2f}"
                log.step(update + 1, metrics, note)
                if (update + 1) % max(1, cfg.updates // 10) == 0:
                    log.completions(update + 1, samples(batch))
                if leave or (cfg.save_every and (update + 1) % cfg.save_every == 0):
                    checkpoints.save(update + 1, beta, stop)
            if stop is not None:  # though a signal came too: the model is as good as done
                stopped = stop
                say(f"stopped after update {update + 1} of {cfg.updates}: {stop}")
                break
            if leave:
                raise terminated.exit(update + 1)
    tensors = {} if value_head is None else {VALUE_HEAD: value_head.tensors(policy)}
    if cfg.merge and cfg.value_adapter:  # the value adapter belongs to the unmerged base, so it is not saved
        tensors = {}
    finish(cfg, policy, tokenizer, tensors=tensors)
    return PPOResult(policy, value_head, tokenizer, history, stopped, cfg.output_dir)


@torch.no_grad()
def compute_advantages(
    policy: PreTrainedModel,
    reference: PreTrainedModel | Adapter,
    value_head: ValueHead | None,
    rollout: Rollout,
    scores: Tensor,
    order: Tensor,
    beta: float,
    cfg: PPOConfig,
) -> Batch:
    """Logprobs, values, KL-shaped rewards, advantages and returns of a rollout; `order` groups the forward passes."""
    ranks, mask = distributed_context(), rollout.response_mask
    logprobs, values, ref_logprobs = (torch.zeros(mask.shape, device=mask.device) for _ in range(3))
    for minibatch in order.tensor_split(cfg.minibatches):
        for rows, _ in ranks.shard_microbatches(minibatch, cfg.micro_batch_size):
            with precision.autocast(cfg.dtype, mask.device):
                logprobs[rows], _, values[rows] = token_outputs(policy, value_head, rollout, rows, cfg.temperature)
            with precision.autocast(cfg.dtype, mask.device), use_adapter(reference) as ref_model:
                ref_logprobs[rows], _, _ = token_outputs(ref_model, None, rollout, rows, cfg.temperature)
    ranks.sum_(logprobs, values, ref_logprobs)
    kl = kl_penalty(logprobs, ref_logprobs)
    final = final_scores(scores, rollout.ended, cfg)
    rewards = shaped_rewards(final, kl, mask, kl_coef=beta, clip=cfg.score_clip)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    if cfg.advantage == "gae":
        advantages, returns = gae(rewards, values, mask, gamma=cfg.gamma, lam=cfg.lam)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)
    else:
        advantages, returns = group_baseline(rewards, mask, cfg), torch.zeros_like(values)
    return Batch(rollout, final, logprobs, values, kl, advantages, returns)


def update_policy(
    policy: PreTrainedModel,
    value_head: ValueHead | None,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    orders: list[Tensor],
    update: int,
    cfg: PPOConfig,
) -> list[dict[str, float]]:
    """The epochs of one update; returns the statistics of every minibatch."""
    ranks, rollout, mask = distributed_context(), batch.rollout, batch.rollout.response_mask
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    minibatch_stats: list[dict[str, float]] = []
    for order in orders:
        for minibatch in order.tensor_split(cfg.minibatches):
            tokens = mask[minibatch].sum()  # the mean is over the whole minibatch, whatever the micro-batches
            stats: dict[str, Tensor] = {}
            for rows, weight in ranks.shard_microbatches(minibatch, cfg.micro_batch_size):
                with precision.autocast(cfg.dtype, mask.device), precision.checkpointing_in_eval_mode(policy):
                    logprobs, entropy, values = token_outputs(
                        policy, value_head, rollout, rows, cfg.temperature, entropy_bonus=cfg.entropy_coef != 0
                    )
                if update == 0 and not minibatch_stats:
                    check_first_ratio(logprobs, batch.logprobs[rows], mask[rows])
                pg_loss, pg_stats = policy_loss(
                    logprobs,
                    batch.logprobs[rows],
                    batch.advantages[rows],
                    mask[rows],
                    clip_low=cfg.clip,
                    clip_high=cfg.clip,
                    denominator=tokens,
                )
                entropy_mean = entropy.sum() / tokens
                share = mask[rows].sum() / tokens
                parts = {"policy_loss": pg_loss, "entropy": entropy_mean}
                loss = pg_loss - cfg.entropy_coef * entropy_mean if cfg.entropy_coef else pg_loss
                if value_head is not None:
                    old, returns = batch.values[rows], batch.returns[rows]
                    vf_loss, vf_stats = value_loss(
                        values, old, returns, mask[rows], clip=cfg.value_clip, denominator=tokens
                    )
                    loss = loss + cfg.vf_coef * vf_loss
                    parts |= {"value_loss": vf_loss, "value_clipfrac": vf_stats["clip_fraction"] * share}
                for name, values_ in (("logprob", logprobs), ("value", values), ("loss", loss)):
                    check_finite(name, values_, update + 1, rows, rollout)
                (loss * weight).backward()
                parts |= {"approx_kl": pg_stats["approx_kl"] * share, "ratio": pg_stats["ratio_mean"] * share}
                clipped = pg_stats["clip_fraction_low"] + pg_stats["clip_fraction_high"]
                parts |= {"clipfrac": clipped * share}
                for name, part in parts.items():
                    stats[name] = stats.get(name, 0.0) + weight * part.detach()
            ranks.sum_gradients(parameters)
            norm = unsharded_tensor(torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm))
            check_finite("gradient", norm, update + 1, minibatch, rollout)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sums = torch.stack([value.double() for value in stats.values()])
            ranks.sum_(sums)
            minibatch_stats.append(dict(zip(stats, sums.tolist(), strict=True)) | {"grad_norm": float(norm)})
            if cfg.target_kl is not None and minibatch_stats[-1]["approx_kl"] > cfg.target_kl:
                return minibatch_stats
    return minibatch_stats
