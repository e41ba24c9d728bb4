"""Checks of `rlhf verify`: what must reach the same optimum as PPO, and best-of-N against its exact figures."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_trainer.bon import BonConfig, best_of_n, kl_bound
from rlhf_trainer.data.records import Pair
from rlhf_trainer.data.rows import TokenizedExample, TokenizedPair
from rlhf_trainer.dpo import DPOConfig, fit_pairs, reference_logprobs
from rlhf_trainer.models.adapters import Adapter, use_adapter
from rlhf_trainer.onpolicy.config import PPOConfig
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.sampling.rollout import generate
from rlhf_trainer.verification.two_processes import largest_difference
from rlhf_trainer.worlds.exact import (
    MAX_TOKENS,
    PROMPTS,
    ExactWorld,
    fit_reference,
    make_model,
    make_seq2seq,
    make_tokenizer,
    oracle,
)

QUICK, QUICK_GAP = 60, 0.95  # updates of PPO, and what they must close of the gap
BETA = 0.3  # of DPO's gate: at a smaller beta the reference hardly samples what pi* prefers, and its pairs lack it
DPO_GAP = 0.95
GROUP_GAPS = {"grpo": 0.90, "rloo": 0.95}
GROUP_UPDATES = 30
GROUP_SIZE = 16
COLD = 0.7  # a sampling temperature
MICRO, MICRO_UPDATES = 48, 5  # sequences; does not divide a minibatch of 256
SAME_KL = 1e-6  # nats between policies trained with and without micro-batches: what the order of sums may change
PAIRS = 2048  # of each prompt
BEST_OF = 16
REPEATS = 64  # of each prompt
RANKS_DIFFERENCE = 0.00001  # of any metric over 20 updates: the order of float32 sums
ERRORS = 4  # standard errors by which a Monte Carlo mean may be off: once in 16,000 runs


@dataclass(frozen=True)
class CheckResult:
    """One line of the table: what was reached, the gate in words, whether it holds, and the curves behind it."""

    name: str
    reached: float
    gate: str
    kept: bool
    series: dict[str, list[float]] = field(default_factory=dict)


@functools.lru_cache(maxsize=2)
def fitted_reference(seed: int) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """The world's tokenizer and reference policy, fitted once a process; not to be trained further."""
    tokenizer = make_tokenizer()
    reference = make_model(tokenizer, seed)
    fit_reference(reference, tokenizer, seed)
    return tokenizer, reference


@functools.lru_cache(maxsize=1)
def fitted_seq2seq(seed: int) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """As `fitted_reference`, of an encoder-decoder model."""
    tokenizer = make_tokenizer()
    reference = make_seq2seq(tokenizer, seed)
    fit_reference(reference, tokenizer, seed)
    return tokenizer, reference


def ppo_config(updates: int, seed: int = 0, beta: float = BETA, temperature: float = 1.0) -> PPOConfig:
    """The options under which the gates were set."""
    return PPOConfig(
        updates=updates,
        batch_size=512,
        minibatches=2,
        epochs=4,
        max_new_tokens=MAX_TOKENS,
        temperature=temperature,
        lr=2e-3,
        kl_coef=beta,
        vf_coef=0.5,
        seed=seed,
        device="cpu",
    )


def trained(cfg: PPOConfig, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A copy of the reference after `train_ppo`."""
    policy = copy.deepcopy(reference)
    train_ppo(cfg, model=policy, tokenizer=tokenizer, reward=oracle, prompts=PROMPTS)
    return policy


def gap_line(
    name: str, cfg: PPOConfig, tokenizer: PreTrainedTokenizerFast, reference: PreTrainedModel, gate: float
) -> CheckResult:
    """What PPO with these options closes of the gap."""
    world = ExactWorld(reference, tokenizer, BETA, cfg.temperature)
    policy = trained(cfg, reference, tokenizer)
    gap = world.gap_closed(world.measure(policy).objective, world.measure(reference).objective)
    return CheckResult(f"{name}: gap closed", gap, f">= {gate}", gap >= gate)


def check_temperature(seed: int) -> list[CheckResult]:
    """PPO in the world of a colder policy."""
    return [gap_line(f"temperature {COLD}", ppo_config(QUICK, seed, BETA, COLD), *fitted_reference(seed), QUICK_GAP)]


def check_seq2seq(seed: int) -> list[CheckResult]:
    """PPO of an encoder-decoder model in its own world: its reference is another one."""
    return [gap_line("encoder-decoder (T5)", ppo_config(QUICK, seed), *fitted_seq2seq(seed), QUICK_GAP)]


def check_micro(seed: int) -> list[CheckResult]:
    """The same policy, whether minibatches go through the model whole or in parts of unequal size."""
    tokenizer, reference = fitted_reference(seed)
    world = ExactWorld(reference, tokenizer, BETA, 1.0)
    cfg = ppo_config(MICRO_UPDATES, seed)
    whole, parts = (
        world.log_policy(trained(replace(cfg, micro_batch_size=size), reference, tokenizer)) for size in (None, MICRO)
    )
    kl = (whole.exp() * (whole - parts)).sum(-1).mean().abs().item()
    return [CheckResult("micro-batches: KL between with and without", kl, f"<= {SAME_KL}", kl <= SAME_KL)]


def lora_config(seed: int) -> PPOConfig:
    """PPO with LoRA, the head included: with its head frozen this model cannot be as sure as pi* is, 0.93 at most."""
    targets = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"]
    return replace(ppo_config(QUICK, seed, BETA), lora_r=8, lora_alpha=16, lora_targets=targets, lr=4e-3)


def check_lora(seed: int) -> list[CheckResult]:
    """PPO with LoRA reaches the optimum too; its reference is the same base, which must not have moved."""
    tokenizer, reference = fitted_reference(seed)
    world = ExactWorld(reference, tokenizer, BETA, 1.0)
    policy = trained(lora_config(seed), reference, tokenizer)
    end, start = world.measure(policy), world.measure(reference).objective
    with use_adapter(Adapter(policy, None)) as base:
        moved = (world.log_policy(base) - world.reference).abs().max().item()
    gap = world.gap_closed(end.objective, start)
    return [
        CheckResult("PPO with LoRA: gap closed", gap, f">= {QUICK_GAP}", gap >= QUICK_GAP),
        CheckResult("PPO with LoRA: base moved", moved, "0", moved == 0),
    ]


def sampled_pairs(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> list[TokenizedPair]:
    """`count` pairs of each prompt, both answers sampled from the reference; the label is Bradley-Terry's probability.

    They hold the tokens as sampled: an answer of 5 letters never ended, and has no EOS.
    """
    generator = torch.Generator().manual_seed(seed)
    rollout = generate(reference, tokenizer, PROMPTS * (2 * count), max_new_tokens=MAX_TOKENS, generator=generator)
    rewards = oracle(rollout.prompts, rollout.completions, rollout.ended.tolist())
    start, half = rollout.prompt_length, len(PROMPTS) * count
    examples = [
        TokenizedExample(ids[real].tolist(), int(real[:start].sum()))
        for ids, real in zip(rollout.ids, rollout.mask, strict=True)
    ]
    texts = rollout.completions
    return [
        TokenizedPair(
            Pair(
                rollout.prompts[i], texts[i], texts[i + half], label=1 / (1 + math.exp(rewards[i + half] - rewards[i]))
            ),
            examples[i],
            examples[i + half],
        )
        for i in range(half)
        if examples[i].ids != examples[i + half].ids
    ]


def dpo_config(seed: int) -> DPOConfig:
    """The options under which the gate was set."""
    return DPOConfig(beta=BETA, batch_size=256, epochs=4, lr=4e-3, heldout=0, seed=seed, device="cpu")


def check_dpo(seed: int) -> list[CheckResult]:
    """DPO on labelled pairs of the reference's own answers, through the code of `rlhf dpo`."""
    tokenizer, reference = fitted_reference(seed)
    world = ExactWorld(reference, tokenizer, BETA, 1.0)
    policy = copy.deepcopy(reference).train()
    cfg, pairs, pad_id = dpo_config(seed), sampled_pairs(reference, tokenizer, PAIRS, seed), tokenizer.pad_token_id
    fit_pairs(cfg, policy, reference_logprobs(cfg, policy, pairs, pad_id, {}), [], pad_id)
    end = world.measure(policy.eval())
    gap = world.gap_closed(end.objective, world.measure(reference).objective)
    return [CheckResult("DPO: gap closed", gap, f">= {DPO_GAP}", gap >= DPO_GAP)]


def best_of(world: ExactWorld, n: int) -> tuple[Tensor, Tensor]:
    """Exactly: probability of every response [8, 1365] as the best of n, and the log of its ratio to the policy's.

    With F the policy's distribution function of the reward, the best of n has a reward v with probability
    F(v)^n - F(v-)^n; among responses of one reward it keeps the policy's proportions.
    """
    pi = world.reference.exp()
    pi = pi / pi.sum(-1, keepdim=True)
    below, level = torch.empty_like(pi), torch.empty_like(pi)
    for i, rewards in enumerate(world.rewards):
        below[i] = (rewards < rewards.unsqueeze(1)).double() @ pi[i]
        level[i] = (rewards == rewards.unsqueeze(1)).double() @ pi[i]
    ratio = ((below + level) ** n - below**n) / level
    return pi * ratio, ratio.log()


def check_bon(seed: int) -> list[CheckResult]:
    """Reward and KL of what `rlhf bon` keeps, against the enumeration."""
    tokenizer, reference = fitted_reference(seed)
    world = ExactWorld(reference, tokenizer, BETA, 1.0)
    cfg = BonConfig(n=BEST_OF, max_new_tokens=MAX_TOKENS, batch_size=2048, bootstrap=1, seed=seed, device="cpu")
    prompts = PROMPTS * REPEATS
    best = best_of_n(cfg, model=reference, tokenizer=tokenizer, reward=oracle, prompts=prompts).best
    place = {pair: i for i, pair in enumerate(world.pairs)}
    drawn = torch.tensor([place[record["prompt"], record["completion"]] for record in best])
    probability, log_ratio = best_of(world, BEST_OF)
    lines = []
    for name, values in (("mean reward", world.rewards), ("KL to the policy", log_ratio)):
        exact, found = (probability * values).sum(-1), values.flatten()[drawn].mean().item()
        variance = ((probability * values.square()).sum(-1) - exact.square()).mean().item()
        bound, centre = ERRORS * math.sqrt(variance / len(prompts)), exact.mean().item()
        gate = f"{centre:.4f} +- {bound:.4f}"
        lines.append(CheckResult(f"best of {BEST_OF}: {name}", found, gate, abs(found - centre) <= bound))
    kl = (probability * log_ratio).sum(-1).max().item()
    limit = kl_bound(BEST_OF)
    return [*lines, CheckResult(f"best of {BEST_OF}: exact KL, at most", kl, f"<= {limit:.4f}", kl <= limit)]


def check_group(kind: str, seed: int) -> list[CheckResult]:
    """PPO's loop with a group baseline in place of the value head, and half of PPO's quick updates.

    grpo divides the scores by their deviation and so has the optimum of beta times that: its kl_coef is beta by the
    deviation at the optimum, where the two are one. Groups are a sample whose deviations differ: hence its own gate.
    """
    tokenizer, reference = fitted_reference(seed)
    deviation = ExactWorld(reference, tokenizer, BETA, 1.0).score_deviation() if kind == "grpo" else 1.0
    cfg = replace(ppo_config(GROUP_UPDATES, seed, BETA / deviation), advantage=kind, group_size=GROUP_SIZE)
    return [gap_line(kind, cfg, tokenizer, reference, GROUP_GAPS[kind])]


def check_ranks(seed: int) -> list[CheckResult]:
    """The command in two processes that share each batch, against one."""
    tokenizer, reference = fitted_reference(seed)
    difference = largest_difference(reference, tokenizer, seed)
    return [
        CheckResult(
            "two ranks: metrics differ by", difference, f"<= {RANKS_DIFFERENCE}", difference <= RANKS_DIFFERENCE
        )
    ]


CHECKS: dict[str, Callable[[int], list[CheckResult]]] = {
    "lora": check_lora,
    "grpo": functools.partial(check_group, "grpo"),
    "rloo": functools.partial(check_group, "rloo"),
    "dpo": check_dpo,
    "bon": check_bon,
    "ranks": check_ranks,
    "micro": check_micro,
    "temperature": check_temperature,
    "seq2seq": check_seq2seq,
}
