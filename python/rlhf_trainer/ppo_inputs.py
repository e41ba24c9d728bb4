"""What a PPO run starts from: policy, tokenizer, reference, reward and prompts, loaded and checked before it writes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.config import require
from rlhf_trainer.data import read_prompts
from rlhf_trainer.errors import UserError
from rlhf_trainer.models import load_causal, load_tokenizer
from rlhf_trainer.rewards import RewardFunction, load_reward
from rlhf_trainer.rollout import encode_prompts

if TYPE_CHECKING:
    from rlhf_trainer.ppo import PPOConfig


def load_inputs(
    cfg: PPOConfig,
    device: torch.device,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reference: PreTrainedModel | None,
    reward: RewardFunction | None,
    prompts: list[str] | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel, RewardFunction, list[str]]:
    """Everything that was not passed as an object, from the folders and files that cfg names; prompts are checked."""
    needed = {"model": policy, "reward": reward, "prompts": prompts}
    require(cfg, *(name for name, given in needed.items() if given is None))
    remote = cfg.trust_remote_code
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, remote)
    if prompts is None:
        prompts = read_prompts(cfg.prompts, tokenizer)
    if not prompts:
        raise UserError("no prompts were given; PPO needs at least one")
    policy = (load_causal(cfg.model, tokenizer, trust_remote_code=remote) if policy is None else policy).to(device)
    if reference is None and cfg.ref_model is not None:
        reference = load_causal(cfg.ref_model, tokenizer, trust_remote_code=remote)
    if reference is None or reference is policy:
        reference = copy.deepcopy(policy)
    encode_prompts(policy, tokenizer, prompts, cfg.max_new_tokens)
    if reward is None:
        reward = load_reward(
            cfg.reward,
            label=cfg.reward_label,
            completion_only=cfg.reward_completion_only,
            device=device,
            pad_token=cfg.pad_token,
            trust_remote_code=remote,
        )
    return policy.eval(), tokenizer, reference.to(device).eval(), reward, prompts
