"""PPO in exact worlds other than the standard one: other rewards, betas, temperatures and lengths, nothing tuned."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.verification.cases import CheckResult, fitted_reference, ppo_config
from rlhf_trainer.worlds.exact import LETTERS, PROMPTS, ExactReward, ExactWorld

UPDATES, SEEDS, GAP = 250, 3, 0.985


@dataclass(frozen=True)
class OtherWorld:
    """A reward, and what the penalty, the sampling and the longest response are beside it."""

    reward: ExactReward
    beta: float
    temperature: float
    max_tokens: int


def counted(prompts: Sequence[str], texts: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """+0.8 for each of the prompt's first letter, at most 2, -0.4 for each letter twice in a row, -1 without EOS."""
    return [
        0.8 * min(text.count(prompt[0]), 2) - 0.4 * sum(a == b for a, b in itertools.pairwise(text)) - 1.0 * (not done)
        for prompt, text, done in zip(prompts, texts, ended, strict=True)
    ]


def drawn(seed: int, prompts: Sequence[str], texts: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """A random number, of deviation 0.7, for each step from a letter to the next or to EOS; -1 without EOS."""
    steps = (0.7 * torch.randn(len(LETTERS), len(LETTERS) + 1, generator=_seeded(seed))).tolist()
    found = []
    for prompt, text, done in zip(prompts, texts, ended, strict=True):
        path = [LETTERS.index(letter) for letter in prompt[-1] + text]
        total = sum(steps[a][b] for a, b in itertools.pairwise(path))
        found.append(total + (steps[path[-1]][-1] if done else -1.0))
    return found


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WORLDS = {
    "counted letters": OtherWorld(counted, beta=0.1, temperature=1.0, max_tokens=4),
    "drawn steps": OtherWorld(functools.partial(drawn, 1), beta=0.2, temperature=0.8, max_tokens=5),
    "drawn steps, longer": OtherWorld(functools.partial(drawn, 2), beta=0.4, temperature=1.3, max_tokens=6),
}


def gap_in(world: OtherWorld, seed: int, updates: int) -> float:
    """What PPO closes of the gap, under the options of the standard world's gates."""
    tokenizer, reference = fitted_reference(seed)
    exact = ExactWorld(
        reference, tokenizer, world.beta, world.temperature, reward=world.reward, max_tokens=world.max_tokens
    )
    policy = copy.deepcopy(reference)
    cfg = replace(ppo_config(updates, seed, world.beta, world.temperature), max_new_tokens=world.max_tokens)

    def reward(prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        return world.reward(prompts, texts, [len(text) < world.max_tokens for text in texts])

    train_ppo(cfg, model=policy, tokenizer=tokenizer, reward=reward, prompts=PROMPTS)
    return exact.gap_closed(exact.measure(policy).objective, exact.measure(reference).objective)


def check_worlds(seed: int) -> list[CheckResult]:
    """The mean gap of three seeds in each world."""
    lines = []
    for name, world in WORLDS.items():
        gaps = [gap_in(world, seed + i, UPDATES) for i in range(SEEDS)]
        mean = sum(gaps) / SEEDS
        lines.append(CheckResult(f"{name}: gap closed", mean, f">= {GAP}", mean >= GAP, {"gaps": gaps}))
    return lines
