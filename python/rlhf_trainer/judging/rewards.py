"""Rewards as one callable `(prompts, completions) -> scores`: a reward model, a classifier's class logit, or Python."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.rows import cut_rows
from rlhf_trainer.judging.functions import RewardFunction, limited, scores_of
from rlhf_trainer.models.adapters import (
    REWARD,
    Adapter,
    adapter_over,
    attach_reward,
    score_head,
    tensors_of,
    use_adapter,
)
from rlhf_trainer.models.fingerprint import Part, essential, model_part, sha256, tensors_digest, tokenizer_part
from rlhf_trainer.models.loading import context_length, fit_vocabulary, load_reward_model, load_tokenizer
from rlhf_trainer.models.precision import autocast, to_bf16
from rlhf_trainer.models.scoring import classifier_outputs, load_normalisation, row_outputs
from rlhf_trainer.models.seq2seq import is_encoder_decoder
from rlhf_trainer.models.sharding import all_weights_gathered, prepare_model

if TYPE_CHECKING:
    from rlhf_trainer.sampling.rollout import Rollout


def load_reward(
    source: str,
    *,
    label: str | None = None,
    completion_only: bool = False,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
    base: PreTrainedModel | None = None,
    dtype: str = "float32",
    timeout: float | None = None,
    workers: int = 1,
) -> RewardFunction:
    """The reward that `source` names.

    Args:
        source: "file.py:function" or "package.module:function", or a folder with a sequence classifier: a reward model
            from `rlhf reward` (its scores normalised as its folder says) or any classifier.
        label: for a classifier of several classes, the class whose *logit* is the reward, by name or number.
        completion_only: show a classifier the completion without its prompt.
        base: a model with adapters; a reward model that is an adapter over the same base joins it, without a copy
            (decoders only).
        dtype: bfloat16: a model's linear layers in bf16, its head in float32.
        timeout, workers: of a function, see `LimitedFunction`.

    Raises:
        UserError: no such folder, file, function or class.
    """
    if is_function(source):
        return limited(load_function(source), timeout, workers)
    mean, std = load_normalisation(source)
    model: PreTrainedModel | Adapter
    head: nn.Linear | None = None
    if base is not None and not is_encoder_decoder(base) and (adapter := adapter_over(base, source)):
        head = attach_reward(base, adapter).to(device)
        model, index = Adapter(base, REWARD), output_index(head.out_features, label, source)
        tokenizer = load_tokenizer(source, pad_token, trust_remote_code)
    else:
        model = load_reward_model(source, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(source, pad_token, trust_remote_code, generates=score_head(model) is not None)
        index = label_index(model.config, label, source)
        model = fit_vocabulary(model, tokenizer if score_head(model) is not None else None)
        model.eval().requires_grad_(False)
        own = score_head(model)
        for part in model.children():  # before the device takes them
            if part is not own:
                to_bf16(part, dtype, include_trainable=True)
        prepare_model(model, torch.device(device))

    return ModelReward(
        model=model,
        tokenizer=tokenizer,
        head=head,
        label=index,
        mean=mean,
        std=std,
        completion_only=completion_only,
        device=torch.device(device),
        batch_size=batch_size,
        dtype=dtype,
    )


@dataclass(frozen=True)
class ModelReward:
    """A classifier, or an adapter with a head, as a reward: output `label`, brought to mean 0 and std 1.

    completion_only: it sees the completion without its prompt.
    """

    model: PreTrainedModel | Adapter
    tokenizer: PreTrainedTokenizerBase
    head: nn.Linear | None
    label: int
    mean: float
    std: float
    completion_only: bool
    device: torch.device
    batch_size: int
    dtype: str

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        shown = [""] * len(prompts) if self.completion_only else prompts
        return self._scores(lambda model, **how: classifier_outputs(model, self.tokenizer, shown, completions, **how))

    def fingerprint(self) -> Part:
        """Of an adapter on the policy's base that adapter alone: the base is the policy's."""
        part = tokenizer_part(self.tokenizer) | {"normalisation": sha256([self.mean, self.std])}
        if isinstance(self.model, Adapter):
            assert self.head is not None
            lora: Any = self.model.model.peft_config[REWARD]
            tensors = tensors_of(self.model.model, REWARD) | self.head.state_dict(prefix="head.")
            return part | {"config": sha256(essential(lora.to_dict())), "weights": tensors_digest(tensors)}
        return part | model_part(self.model)

    def reads_ids(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the ids of `tokenizer` mean the same here, so that nothing needs to be written as text and read."""
        decoder = self.head is not None or score_head(cast(PreTrainedModel, self.model)) is not None
        return decoder and not self.completion_only and tokenizer.get_vocab() == self.tokenizer.get_vocab()

    def score_ids(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        """Scores of (prompt's ids, response's ids without its end), which EOS closes as in training."""
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id

        def outputs(model: PreTrainedModel, **how: Any) -> torch.Tensor:
            limit = context_length(model) or sys.maxsize
            cut = [cut_rows(prompt, [[*response, eos]], limit, bos) for prompt, response in rows]
            return row_outputs(model, self.tokenizer, [(row[0], was_cut) for row, was_cut in cut], **how)

        return self._scores(outputs)

    def _scores(self, outputs: Callable[..., torch.Tensor]) -> list[float]:
        with use_adapter(self.model) as scorer, all_weights_gathered(scorer), autocast(self.dtype, self.device):
            raw = outputs(scorer, batch_size=self.batch_size, head=self.head)[:, self.label]
        return ((raw - self.mean) / self.std).tolist()


def label_index(config: Any, label: str | None, source: str, option: str = "--reward_label") -> int:
    """Which output of a classifier `label` names; a model with one output needs none."""
    if label is None:
        if config.num_labels == 1:
            return 0
        raise UserError(f"{source} has the classes {list(config.id2label.values())}; say which with {option}")
    names = {str(name): int(number) for number, name in config.id2label.items()}
    if label in names:
        return names[label]
    if label.isdigit() and int(label) < config.num_labels:
        return int(label)
    raise UserError(f"{source} has no class {label!r}; it has {list(names)}")


def output_index(outputs: int, label: str | None, source: str) -> int:
    """Which of a head's outputs `label` numbers; a head alone has no names for them."""
    number = label or ("0" if outputs == 1 else "")
    if not number.isdigit() or int(number) >= outputs:
        raise UserError(f"{source} has {outputs} classes without names; say which by number with --reward_label")
    return int(number)


def is_function(source: str) -> bool:
    """Whether `source` names a function, and no folder or hub name."""
    return ":" in source and not Path(source).is_dir()


def load_function(source: str) -> RewardFunction:
    """The function that "file.py:function" or "package.module:function" names."""
    place, _, name = source.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None or not Path(place).is_file():
                raise UserError(f"{place}: no such Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's code may raise anything, SystemExit too
        raise UserError(f"{source}: cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{source}: {place} has no function {name!r}")
    return function


def shared_scores(
    reward: RewardFunction,
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    group_size: int,
    what: str = "reward",
) -> torch.Tensor:
    """The scores [B] of a rollout; each rank calls the function for its share of the rows, in whole groups.

    A reward model of the same tokenizer as the policy's reads the sampled ids themselves.
    """
    ranks, count = distributed_context(), len(rollout.prompts)
    shard = ranks.contiguous_shard(count, group_size)
    if isinstance(reward, ModelReward) and reward.reads_ids(tokenizer):
        model, rows = reward, rollout.token_rows(shard)

        def reward(prompts: list[str], completions: list[str]) -> list[float]:
            return model.score_ids(rows)

    mine = scores_of(reward, rollout.prompts[shard], rollout.completions[shard], what, shard.start)
    return ranks.all_gather_rows(shard, mine, count)
