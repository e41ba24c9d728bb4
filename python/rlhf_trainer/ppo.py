"""`rlhf ppo`: PPO with a KL penalty to a frozen reference in the reward, and a value head. The loop is `train_ppo`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
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
from rlhf_trainer.judging.functions import RewardFunction, reward_part
from rlhf_trainer.judging.rewards import load_reward, shared_scores
from rlhf_trainer.models import precision
from rlhf_trainer.models.adapters import Adapter, use_adapter
from rlhf_trainer.models.fingerprint import Fingerprint, model_part, sha256, tokenizer_part
from rlhf_trainer.models.sharding import load_device, prepare_model, prepare_trained_model, unsharded_tensor
from rlhf_trainer.onpolicy.checks import check_finite, check_first_kl, check_first_ratio, check_shares, validate_options
from rlhf_trainer.onpolicy.config import FULL_LR, PPOConfig
from rlhf_trainer.onpolicy.inputs import load_inputs, prompt_batch, starts_equal
from rlhf_trainer.onpolicy.metrics import adapt_kl_coef, phase_times, samples, stop_reason, summarize
from rlhf_trainer.onpolicy.terms import Batch, final_scores, group_baseline, kl_penalty
from rlhf_trainer.onpolicy.value_head import VALUE_HEAD, ValueHead, load_value_head
from rlhf_trainer.onpolicy.watch import RewardHackingMonitor
from rlhf_trainer.sampling.responses import exact_kl, token_outputs
from rlhf_trainer.sampling.rollout import Rollout
from rlhf_trainer.sampling.vllm import load_engine
from rlhf_trainer.training.alerts import Alerts, announce
from rlhf_trainer.training.checkpoint import Checkpoints, StopRequest, stop_on_signals
from rlhf_trainer.training.finish import finish
from rlhf_trainer.training.history import History
from rlhf_trainer.training.rates import with_lr
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
        model, tokenizer: the policy (trained in place; lora_r puts an adapter on it) and its tokenizer.
        ref_model: the frozen reference; None: the policy as it is now (with LoRA on the same base, not a copy).
        reward: `(prompts, completions) -> scores`, one finite number each.
        prompts: the texts to answer.
        on_update: called with the number of updates done and the policy, after each update.

    Under `accelerate launch` every rank calls it alike, and rank 0 writes.

    Raises:
        UserError: bad input, one sentence. InvariantError: a step-0 invariant does not hold.
    """
    validate_options(cfg)
    check_shares(
        distributed_context().world,
        rollout_engine=cfg.rollout_engine,
        batch_size=cfg.batch_size,
        minibatches=cfg.minibatches,
        group_size=cfg.group_size,
    )
    run = set_up(cfg, model, tokenizer, ref_model, reward, prompts)
    stopped = run.checkpoints.stopped or "all updates done"
    reporting: dict[str, Any] = {"start": run.start, "report_to": cfg.report_to, "options": asdict(cfg)}
    logging = RunLog(cfg.output_dir, cfg.updates, "ppo", **reporting) if cfg.output_dir else nullcontext()
    with logging as log, stop_on_signals(bool(cfg.output_dir)) as terminated:
        for update in range(run.start, run.start if run.checkpoints.stopped else cfg.updates):
            batch = one_update(run, update, cfg)
            if on_update is not None:
                on_update(update + 1, run.policy)
            stop = after_update(run, update, batch, log, terminated, cfg)
            if stop is not None:  # though a signal came too: the model is as good as done
                stopped = stop
                say(f"stopped after update {update + 1} of {cfg.updates}: {stop}")
                break
    tensors = {} if run.value_head is None else {VALUE_HEAD: run.value_head.tensors(run.policy)}
    if cfg.merge and cfg.value_adapter:  # the value adapter belongs to the unmerged base, so it is not saved
        tensors = {}
    saved: dict[str, Any] = {"output_dir": cfg.output_dir, "dtype": cfg.dtype, "merge": cfg.merge}
    finish(run.policy, run.tokenizer, tensors=tensors, **saved)
    if ref_model is not None:
        precision.narrow(ref_model)
    return PPOResult(run.policy, run.value_head, run.tokenizer, list(run.history), stopped, cfg.output_dir)


@dataclass
class Run:
    """What an update works on, made by `set_up`; beta and history change with every update."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | Adapter
    reference_is_policy: bool  # as they start: KL is 0 then
    reward: RewardFunction
    gold: RewardFunction | None
    prompts: list[str]
    value_head: ValueHead | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    generator: torch.Generator
    sample: Callable[..., Rollout]
    checkpoints: Checkpoints
    start: int
    beta: float
    history: History
    monitor: RewardHackingMonitor
    alerts: Alerts


def set_up(
    cfg: PPOConfig,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    ref_model: PreTrainedModel | None,
    reward: RewardFunction | None,
    prompts: list[str] | None,
) -> Run:
    """Loads what was not passed, places it on its device, and takes up a checkpoint if there is one to resume."""
    device = resolve_device(cfg.device)
    set_seed(cfg.seed)  # Python's and NumPy's too: a reward function may draw from them
    given = (model, tokenizer, ref_model, reward, prompts)
    policy, tokenizer, reference, reward, prompts = load_inputs(cfg, device, *given)
    reference_is_policy = starts_equal(policy, reference)
    gold = None if cfg.gold_reward is None else load_gold(cfg.gold_reward, cfg, device)
    value_head = None
    if cfg.advantage == "gae":
        value_head = load_value_head(policy, load_device(device), folder=cfg.model, own_adapter=cfg.value_adapter)
    heads = {} if value_head is None else {"value_head": value_head}
    restored = cfg.merge or model is not None
    prepare_trained_model(policy, device, *heads.values(), dtype=cfg.dtype, restored=restored)
    separate = None if isinstance(reference, Adapter) else reference  # else among the policy's frozen weights
    if separate is not None:
        prepare_model(separate, device)
    cfg = with_lr(cfg, policy, FULL_LR)
    optimizer, scheduler = make_optimizer(cfg, policy, value_head, device)
    generator = torch.Generator(device).manual_seed(cfg.seed)

    def inputs() -> Fingerprint:
        rewards = {"reward": reward} if gold is None else {"reward": reward, "gold_reward": gold}
        found = {name: reward_part(each) for name, each in rewards.items()}
        found |= {"prompts": {"texts": sha256(prompts)}, "tokenizer": tokenizer_part(tokenizer)}
        return found if separate is None else found | {"reference": model_part(separate)}

    modules = {"policy": policy, **heads}
    checkpoints = Checkpoints(asdict(cfg), modules, optimizer, scheduler, generator, inputs)
    start, extra, history = checkpoints.resume({"beta": cfg.kl_coef})
    sample = load_engine(
        cfg.rollout_engine,
        policy,
        group_size=cfg.group_size,
        gather=cfg.gather_for_rollout,
        vllm_memory=cfg.vllm_memory,
        seed=cfg.seed,
        trust_remote_code=cfg.trust_remote_code,
    )
    if cfg.output_dir:
        save_config(cfg, cfg.output_dir)
    return Run(
        policy=policy,
        tokenizer=tokenizer,
        reference=reference,
        reference_is_policy=reference_is_policy,
        reward=reward,
        gold=gold,
        prompts=prompts,
        value_head=value_head,
        optimizer=optimizer,
        scheduler=scheduler,
        generator=generator,
        sample=sample,
        checkpoints=checkpoints,
        start=start,
        beta=extra["beta"],
        history=history,
        monitor=RewardHackingMonitor(cfg.stop_kl, list(history)),
        alerts=Alerts(cfg.alert, history),
    )


def load_gold(source: str, cfg: PPOConfig, device: torch.device) -> RewardFunction:
    """The reward that is only watched, with the options of the reward itself."""
    return load_reward(
        source,
        label=cfg.gold_label,
        completion_only=cfg.reward_completion_only,
        pad_token=cfg.pad_token,
        trust_remote_code=cfg.trust_remote_code,
        device=device,
        dtype=cfg.dtype,
        timeout=cfg.reward_timeout,
        workers=cfg.reward_workers,
    )


def make_optimizer(
    cfg: PPOConfig, policy: PreTrainedModel, value_head: ValueHead | None, device: torch.device
) -> tuple[torch.optim.Optimizer, Any]:
    """Adam over what is trained of the policy, and over the value head at its own rate; its linear decay to 0."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("every parameter of the policy is frozen (requires_grad is False); there is nothing to train")
    assert cfg.lr is not None  # `with_lr` has chosen one
    groups: list[dict[str, Any]] = [{"params": trained, "lr": cfg.lr}]
    if value_head is not None:
        rate = value_head.learning_rate() if cfg.value_lr is None else cfg.value_lr
        groups.append({"params": list(value_head.parameters()), "lr": rate})
    optimizer = torch.optim.Adam(groups, eps=cfg.adam_eps, fused=device.type in ("cpu", "cuda"))
    return optimizer, get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=cfg.updates)


def one_update(run: Run, update: int, cfg: PPOConfig) -> Batch:
    """Rollout, scores, advantages, the epochs of the update; its metrics are the newest of run.history."""
    device, began = run.generator.device, time.perf_counter()
    texts = prompt_batch(run.prompts, update, batch_size=cfg.batch_size, group_size=cfg.group_size, seed=cfg.seed)
    with precision.autocast(cfg.dtype, device):
        rollout = run.sample(
            run.policy,
            run.tokenizer,
            texts,
            generator=run.generator,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            stop_token=cfg.stop_token,
            batch_size=cfg.rollout_batch_size,
        )
    rolled = time.perf_counter()
    # Old logprobs see the rows grouped as the first epoch will: same shapes, same bits, first ratio exactly 1.
    orders = [torch.randperm(cfg.batch_size, generator=run.generator, device=device) for _ in range(cfg.epochs)]
    raw_scores = shared_scores(run.reward, rollout, run.tokenizer, cfg.group_size).to(device)
    batch = compute_advantages(run.policy, run.reference, run.value_head, rollout, raw_scores, orders[0], run.beta, cfg)
    if update == 0:
        check_first_kl(batch.kl, run.reference_is_policy)
    scored = time.perf_counter()
    lr = run.scheduler.get_last_lr()[0]
    stats = update_policy(run.policy, run.value_head, run.optimizer, batch, orders, update, cfg)
    run.scheduler.step()
    seconds = time.perf_counter() - began
    metrics = summarize(batch, stats, run.beta, run.tokenizer, group_size=cfg.group_size) | {
        "lr": lr,
        "episode": (update + 1) * cfg.batch_size,
        "eps": cfg.batch_size / seconds,
        "tokens_per_second": int(rollout.response_mask.sum()) / seconds,
        "seconds/rollout": rolled - began,
        "seconds/scoring": scored - rolled,
        "seconds/update": time.perf_counter() - scored,
    }
    if run.gold is not None:
        gold_scores = shared_scores(run.gold, rollout, run.tokenizer, cfg.group_size, "gold reward")
        metrics["objective/gold_scores"] = gold_scores.mean().item()
    run.history.append(metrics)
    return batch


def after_update(
    run: Run, update: int, batch: Batch, log: RunLog | None, terminated: StopRequest, cfg: PPOConfig
) -> str | None:
    """Warnings, beta, log and checkpoint; why to stop, or None. Leaves with the signal's exit code where one came."""
    ranks, metrics, rollout = distributed_context(), run.history[-1], batch.rollout
    warnings = run.monitor.check(run.history, rollout)  # adds its own metrics
    alarms = run.alerts.check(metrics)
    beta = adapt_kl_coef(
        run.beta, metrics["objective/kl"], target=cfg.kl_target, episodes=cfg.batch_size, horizon=cfg.kl_horizon
    )
    criteria = {"stop_reward": cfg.stop_reward, "stop_gold": cfg.stop_gold, "stop_kl": cfg.stop_kl}
    reason = stop_reason(run.history, alarms if cfg.stop_on_alert else (), **criteria)
    run.beta, stop = ranks.broadcast_object((beta, reason))
    leave = ranks.any(bool(terminated))
    announce(log, update + 1, [*warnings, *alarms], rollout.completions)  # before a checkpoint has them
    if log is not None:
        log.step(update + 1, metrics, f"score {metrics['objective/scores']:.3f}  kl {metrics['objective/kl']:.2f}")
        if (update + 1) % max(1, cfg.updates // 10) == 0:
            log.completions(update + 1, samples(batch))
        if leave or (cfg.save_every and (update + 1) % cfg.save_every == 0):
            run.checkpoints.save(update + 1, stopped=stop, beta=run.beta)
    if stop is None and leave:
        raise terminated.exit(update + 1)
    return stop


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
    logprobs, values, ref_logprobs, exact = (torch.zeros(mask.shape, device=mask.device) for _ in range(4))
    for minibatch in order.tensor_split(cfg.minibatches):
        for rows, _ in ranks.shard_microbatches(minibatch, cfg.micro_batch_size):
            common, heads = (rollout, rows, cfg.temperature), list[dict[str, Any]]()
            with precision.autocast(cfg.dtype, mask.device):
                logprobs[rows], _, values[rows] = token_outputs(policy, value_head, *common, keep=heads)
            with precision.autocast(cfg.dtype, mask.device), use_adapter(reference) as ref_model:
                ref_logprobs[rows], _, _ = token_outputs(ref_model, None, *common, keep=heads)
                exact[rows] = exact_kl(heads[0], heads[1], cfg.temperature, logprobs[rows] - ref_logprobs[rows])
    ranks.sum_(logprobs, values, ref_logprobs, exact)
    kl = kl_penalty(logprobs, ref_logprobs)
    final = final_scores(scores, rollout.ended, cfg.missing_eos_penalty, replace=cfg.missing_eos == "replace")
    rewards = shaped_rewards(final, kl, mask, kl_coef=beta, clip=cfg.score_clip)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    if cfg.advantage == "gae":
        advantages, returns = gae(rewards, values, mask, gamma=cfg.gamma, lam=cfg.lam)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)
    else:
        bound = torch.inf if cfg.score_clip is None else cfg.score_clip
        groups: dict[str, Any] = {"group_size": cfg.group_size, "kind": cfg.advantage}
        advantages = group_baseline(final.clamp(-bound, bound), kl, mask, kl_coef=beta, **groups)
        returns = torch.zeros_like(values)
    return Batch(
        rollout=rollout,
        scores=final,
        logprobs=logprobs,
        values=values,
        kl=kl,
        exact_kl=exact,
        advantages=advantages,
        returns=returns,
    )


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
                loss, parts = ppo_loss(logprobs, entropy, values, batch, rows, tokens, cfg)
                for name, found in (("logprob", logprobs), ("value", values), ("loss", loss)):
                    check_finite(name, found, update + 1, rows, rollout)
                (loss * weight).backward()
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


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor,
    values: Tensor,
    batch: Batch,
    rows: Tensor,
    tokens: Tensor,
    cfg: PPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """policy + vf_coef * value - entropy_coef * entropy of a micro-batch, and its share of the minibatch's statistics.

    logprobs, entropy, values: [b, R] of the batch's `rows` now. tokens: how many count in the whole minibatch.
    """
    mask = batch.rollout.response_mask[rows]
    policy_part, policy_stats = policy_loss(
        logprobs,
        batch.logprobs[rows],
        batch.advantages[rows],
        mask,
        clip_low=cfg.clip,
        clip_high=cfg.clip,
        denominator=tokens,
    )
    entropy_mean, share = entropy.sum() / tokens, mask.sum() / tokens
    parts = {"policy_loss": policy_part, "entropy": entropy_mean}
    loss = policy_part - cfg.entropy_coef * entropy_mean if cfg.entropy_coef else policy_part
    if cfg.advantage == "gae":
        old, returns = batch.values[rows], batch.returns[rows]
        value_part, value_stats = value_loss(values, old, returns, mask, clip=cfg.value_clip, denominator=tokens)
        loss = loss + cfg.vf_coef * value_part
        parts |= {"value_loss": value_part, "value_clipfrac": value_stats["clip_fraction"] * share}
    clipped = policy_stats["clip_fraction_low"] + policy_stats["clip_fraction_high"]
    parts |= {"approx_kl": policy_stats["approx_kl"] * share, "ratio": policy_stats["ratio_mean"] * share}
    return loss, parts | {"clipfrac": clipped * share}
