"""What a PPO run starts from: policy, tokenizer, reference, reward and prompts, loaded and checked before it writes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.config import require
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.stages import read_prompts
from rlhf_trainer.judging.functions import RewardFunction, limited
from rlhf_trainer.judging.rewards import load_reward
from rlhf_trainer.models import precision
from rlhf_trainer.models.adapters import (
    MAIN,
    REFERENCE,
    Adapter,
    adapter_over,
    add_adapter,
    attach,
    copy_adapter,
    has_adapter,
    is_base,
    is_zero,
    same_adapters,
)
from rlhf_trainer.models.loading import check_vocabulary, load_causal, load_tokenizer, same_weights
from rlhf_trainer.models.quantised import check_adapter, load_options
from rlhf_trainer.models.seq2seq import force_eager_attention, is_encoder_decoder
from rlhf_trainer.sampling.rollout import encode_prompts

if TYPE_CHECKING:
    from rlhf_trainer.onpolicy.config import PPOConfig


def load_inputs(
    cfg: PPOConfig,
    device: torch.device,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reference: PreTrainedModel | None,
    reward: RewardFunction | None,
    prompts: list[str] | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel | Adapter, RewardFunction, list[str]]:
    """Everything that was not passed as an object, from the folders and files that cfg names; prompts are checked."""
    needed = {"model": policy, "reward": reward, "prompts": prompts}
    require(cfg, *(name for name, given in needed.items() if given is None))
    remote = cfg.trust_remote_code
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, remote)
    if prompts is None:
        prompts = read_prompts(cfg.prompts, tokenizer)
    if policy is None:
        policy = load_causal(cfg.model, tokenizer, trust_remote_code=remote, **load_options(cfg.load_in_4bit, device))
    for model in (policy, *([] if reference is None else [reference])):
        force_eager_attention(model)
    if not cfg.gather_for_rollout and is_encoder_decoder(policy):
        raise UserError("--gather_for_rollout false is for decoders; an encoder-decoder's ranks cannot take turns")
    check_adapter(cfg.load_in_4bit, add_adapter(policy, cfg.lora, output_dir=cfg.output_dir))
    frozen = load_reference(cfg, policy, tokenizer, reference, device)
    encode_prompts(policy, tokenizer, prompts, cfg.max_new_tokens)
    if reward is None:
        reward = load_reward(
            cfg.reward,
            label=cfg.reward_label,
            completion_only=cfg.reward_completion_only,
            device=device,
            pad_token=cfg.pad_token,
            trust_remote_code=remote,
            base=policy,
            dtype=cfg.dtype,
            timeout=cfg.reward_timeout,
            workers=cfg.reward_workers,
        )
    else:
        reward = limited(reward, cfg.reward_timeout, cfg.reward_workers)
    policy.eval()
    if cfg.gradient_checkpointing:
        precision.enable_checkpointing(policy)
    if not isinstance(frozen, Adapter):
        precision.widen(frozen, cfg.dtype)
        if frozen is not reference:  # one that was given is the caller's
            precision.to_bf16(frozen, cfg.dtype, include_trainable=True)
    return policy, tokenizer, frozen if isinstance(frozen, Adapter) else frozen.eval(), reward, prompts


def load_reference(
    cfg: PPOConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: PreTrainedModel | None,
    device: torch.device,
) -> PreTrainedModel | Adapter:
    """The frozen reference: given, named, or the policy as it is now.

    Of a policy that is an adapter it is the same base: without adapter, or with the one the policy starts from.
    """
    if given is not None and given is not policy:
        return given
    if given is None and cfg.ref_model is not None:
        check_vocabulary(cfg.ref_model, tokenizer, cfg.trust_remote_code)
        adapter = adapter_over(policy, cfg.ref_model)
        if adapter is not None:
            attach(policy, adapter, REFERENCE, trained=False)
            return Adapter(policy, REFERENCE)
        if has_adapter(policy) and is_base(policy, cfg.ref_model):
            return Adapter(policy, None)
        options = load_options(cfg.load_in_4bit, device)
        return load_causal(cfg.ref_model, tokenizer, trust_remote_code=cfg.trust_remote_code, **options)
    if not has_adapter(policy):
        return copy.deepcopy(policy)
    return Adapter(policy, None) if is_zero(policy, MAIN) else copy_adapter(policy, MAIN, REFERENCE)


def starts_equal(policy: PreTrainedModel, reference: PreTrainedModel | Adapter) -> bool:
    """Whether the reference is the policy as it stands, so that KL is 0 at step 0."""
    if not isinstance(reference, Adapter):
        return same_weights(policy, reference)
    if reference.name is None:
        return is_zero(policy, MAIN)
    return same_adapters(policy, MAIN, reference.name)


def prompt_batch(prompts: list[str], update: int, *, batch_size: int, group_size: int, seed: int) -> list[str]:
    """The prompts of an update (from 0): a fresh permutation for every pass over the file, by the seed alone.

    Each prompt stands there group_size times in a row.
    """
    batch: list[str] = []
    count = batch_size // group_size
    for index in range(update * count, (update + 1) * count):
        epoch, place = divmod(index, len(prompts))
        if not batch or place == 0:
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        batch += [prompts[order[place]]] * group_size
    return batch
