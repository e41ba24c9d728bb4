"""LoRA: adapters on a frozen base, in peft's own folder layout; several adapters share one base in memory.

The base stays an ordinary transformers model whose linear layers are peft's; one adapter at a time is switched on, or
none. Switching never changes which parameters are trained.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.folders import check_base, check_safetensors, checked_folder, write_base_record

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# peft's name for the only one, and ours for its neighbours
MAIN, REFERENCE, REWARD, VALUE = "default", "reference", "reward", "value"
GROWN = "grown"  # attribute of a model: how many rows its vocabulary grew by since it was loaded
PREFIX = "base_model.model."  # of every name in peft's files
HEADS = ("score", "classification_head")  # a reward model's head by architecture, kept beside its adapter


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model that carries several; `name` None: the base alone. `use_adapter` makes a model of it."""

    model: PreTrainedModel
    name: str | None


@contextmanager
def use_adapter(model: PreTrainedModel | Adapter) -> Iterator[PreTrainedModel]:
    """The model with the adapter switched on, then its main adapter again; a plain model as it is."""
    if not isinstance(model, Adapter):
        yield model
        return
    _switch(model.model, model.name)
    try:
        yield model.model
    finally:
        _switch(model.model, MAIN)


def _switch(model: nn.Module, name: str | None) -> None:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
    for parameter, flag in flags:  # peft freezes what it switches off
        parameter.requires_grad_(flag)


def has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter."""
    named = model.named_parameters()  # an embedding's end with the adapter's name, others go on after it
    return {key: parameter for key, parameter in named if name in key.split(".") and ".lora_" in key}


# Making adapters


@dataclass(frozen=True)
class LoraOptions:
    """A new adapter; of rank 0 there is none."""

    rank: int
    alpha: int
    targets: list[str]  # module names, or all-linear; none: peft's choice for the architecture
    dropout: float = 0.0  # PPO has none: its ratios compare two forward passes

    def validate(self) -> None:
        """UserError for options that cannot work, by the names they have on the command line."""
        for name, value, low in (("lora_r", self.rank, 0), ("lora_alpha", self.alpha, 1)):
            if value < low:
                raise UserError(f"--{name} {value}: must be at least {low}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora_dropout {self.dropout}: must be at least 0 and less than 1")


def add_adapter(
    model: PreTrainedModel, lora: LoraOptions, *, output_dir: str = "", task: str | None = None
) -> PreTrainedModel:
    """Freeze `model` and put a new trained adapter on it; rank 0 changes nothing.

    A new adapter adds exactly 0. UserError where the model carries one already, or peft knows no targets for it.
    """
    if has_adapter(model):
        _check_config(model.peft_config[MAIN], "the model")
    if lora.rank and has_adapter(model):
        raise UserError(f"--lora_r {lora.rank}: the model is an adapter already; without --lora_r it is trained on")
    if output_dir and (lora.rank or has_adapter(model)) and os.path.abspath(output_dir) == base_name(model):
        raise UserError(f"--output_dir {output_dir}: the adapter needs its base, which lies there; name another one")
    if not lora.rank:
        return model
    targets = lora.targets or None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        exclude_modules=rf"{HEADS[1]}\..*" if hasattr(model, HEADS[1]) else None,  # peft knows the other by itself
        task_type=task or ("SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"),
        base_model_name_or_path=base_name(model),
    )
    _inject(model, config, MAIN, trained=True)
    if vars(model).get(GROWN):
        say(
            f"the tokenizer has {vars(model)[GROWN]} tokens that the base {base_name(model)} has not: their rows are "
            "the mean of the others, frozen, and not in the adapter's folder. If they shall be learned, train without "
            "--lora_r once, or name the embedding in --lora_targets; with --merge the folder holds the rows"
        )
    targets_of = [layer.get_base_layer() for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if model.config.is_encoder_decoder and any(_shares_weight(model, layer) for layer in targets_of):
        raise UserError(
            "--lora_targets: names a head or an embedding whose weight encoder, decoder and head share; an adapter on "
            "one of them would leave the others; take it out"
        )
    return model


def _inject(
    model: PreTrainedModel, lora: LoraConfig, name: str, trained: bool, source: str | Path | None = None
) -> None:
    """source: the folder whose config `lora` is; None: the options'."""
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()} if has_adapter(model) else {}
    if model.config.model_type == "gpt2":
        lora.fan_in_fan_out = True  # its Conv1D; peft corrects it too, with a warning
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several on one base are meant
            inject_adapter_in_model(lora, model, name)
    except Exception as error:  # no targets found; or what an odd folder's config says, which may trip peft anywhere
        reason = " ".join(str(error).split())
        if source is not None:
            raise UserError(f"{source}/{CONFIG}: {reason[:300]}") from None
        if not isinstance(error, ValueError):
            raise
        raise UserError(f"--lora_targets: {reason[:300]}; `all-linear` takes every linear layer") from None
    own = parameters_of(model, name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trained if key in own else flags.get(key, False))
        if key in own:  # peft gives it the base's dtype, in whose 16 bits an optimizer's steps would be lost
            parameter.data = parameter.data.float()
    _switch(model, MAIN)


def copy_adapter(model: PreTrainedModel, source: str, target: str, trained: bool = False) -> Adapter:
    """A copy of an adapter beside it, on the same base."""
    config: Any = copy.deepcopy(model.peft_config[source])
    _inject(model, config, target, trained)
    load_adapter_weights(model, target, tensors_of(model, source), source)
    return Adapter(model, target)


def tensors_of(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """The weights of one adapter under peft's names, which do not say whose they are."""
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def load_adapter_weights(model: PreTrainedModel, name: str, tensors: dict[str, Tensor], source: str) -> None:
    """Give an adapter these weights; UserError naming `source` where they are not its own."""
    expected = tensors_of(model, name)
    wrong = sorted(expected.keys() ^ tensors.keys()) or [
        key for key in expected if expected[key].shape != tensors[key].shape
    ]
    if wrong:
        raise UserError(f"{source}: the adapter does not fit its base: {', '.join(wrong[:3])}")
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def is_zero(model: nn.Module, name: str) -> bool:
    """Whether the adapter leaves the base's outputs as they are: of every pair A, B one is 0."""
    own = parameters_of(model, name)
    pairs = [(p, own[key.replace("_B.", "_A.")]) for key, p in own.items() if "_B." in key]
    return not any(bool(b.any()) and bool(a.any()) for b, a in pairs)


def same_adapters(model: nn.Module, first: str, second: str) -> bool:
    """Whether two adapters of a model are equal, bit by bit."""
    a = {key.replace(f".{first}", ""): p for key, p in parameters_of(model, first).items()}
    b = {key.replace(f".{second}", ""): p for key, p in parameters_of(model, second).items()}
    return a.keys() == b.keys() and all(torch.equal(a[key].to(b[key].dtype), b[key]) for key in a)


# Folders


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with an adapter: where its base lies, and peft's config."""

    path: str | Path
    base: str
    config: LoraConfig


def adapter_folder(path: str | Path) -> AdapterFolder | None:
    """The adapter that lies in a folder, None of any other folder.

    Raises:
        UserError: it is no LoRA adapter, or names no base, or one that is an adapter too or a folder that is gone.
    """
    if not (Path(path) / CONFIG).is_file():
        return None
    config = _read_config(path)
    base = str(config.base_model_name_or_path)
    if os.path.isabs(base) and not os.path.isdir(base):
        raise UserError(f"{path}: its base model {base} is gone; write the new place to base_model_name_or_path")
    if (Path(base) / CONFIG).is_file():
        raise UserError(f"{path}: its base {base} is an adapter itself; merge that one first")
    return AdapterFolder(path, base, config)


def _read_config(path: str | Path) -> LoraConfig:
    checked_folder(path, "adapter")
    try:
        config = PeftConfig.from_pretrained(str(path))
    except Exception as error:  # what a file holds may trip a library anywhere
        raise UserError(f"{path}/{CONFIG}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: a {config.peft_type} adapter; only LoRA is supported")
    if not config.base_model_name_or_path:
        raise UserError(f"{path}/{CONFIG} names no base model; write its folder to base_model_name_or_path")
    _check_config(config, str(path))
    return config


def _check_config(config: Any, name: str) -> None:
    """UserError for an adapter with more than LoRA's matrices: the base with the adapter off is the reference."""
    replaced = set(config.modules_to_save or [])
    if replaced - set(HEADS):
        raise UserError(f"{name}: besides LoRA it replaces {sorted(replaced)}; merge it with peft first")
    if config.bias != "none":
        raise UserError(f"{name}: its adapter trains biases of the base, the reference's too; merge it with peft first")
    if config.trainable_token_indices:
        raise UserError(f"{name}: besides LoRA it replaces rows of the embedding; merge it with peft first")


def base_name(model: PreTrainedModel) -> str:
    """Where the model came from, folders as absolute paths; empty if it was made in memory."""
    name = str(model.config.name_or_path or "")
    return os.path.abspath(name) if os.path.isdir(name) else name


def adapter_over(model: PreTrainedModel, path: str | Path) -> AdapterFolder | None:
    """The adapter in a folder if it is over the base that `model` carries adapters on, else None."""
    adapter = adapter_folder(path) if has_adapter(model) else None
    return adapter if adapter is not None and is_base(model, adapter.base) else None


def is_base(model: PreTrainedModel, path: str | Path) -> bool:
    """Whether the model was loaded from this place."""
    return (os.path.abspath(path) if os.path.isdir(path) else str(path)) == base_name(model)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(adapter, head) tensors of an adapter folder; the head is empty where there is none."""
    if not (Path(path) / WEIGHTS).is_file():  # peft would look for a pickle next
        raise UserError(f"{path}: there is no {WEIGHTS}; convert an adapter of another format")
    check_safetensors(Path(path) / WEIGHTS)
    try:
        tensors = load_peft_weights(str(path), device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot read the adapter: {' '.join(str(error).split())[:300]}") from None
    named = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    head = {key.partition(".")[2]: tensor for key, tensor in named.items() if key.partition(".")[0] in HEADS}
    return {key: tensor for key, tensor in named.items() if key.partition(".")[0] not in HEADS}, head


def attach(model: PreTrainedModel, adapter: AdapterFolder, name: str = MAIN, trained: bool = True) -> dict[str, Tensor]:
    """Put the adapter on `model`, its base; returns the head that lies with it."""
    config = copy.deepcopy(adapter.config)
    config.modules_to_save = None
    check_base(adapter.path, adapter.base)
    tensors, head = read_weights(adapter.path)
    _inject(model, config, name, trained, adapter.path)
    load_adapter_weights(model, name, tensors, str(adapter.path))
    return head


def attach_reward(model: PreTrainedModel, adapter: AdapterFolder) -> nn.Linear:
    """Put a reward model's adapter on the base that `model` already carries, and return its head."""
    head = attach(model, adapter, REWARD, trained=False)
    if "weight" not in head:
        raise UserError(f"{adapter.path}: the adapter has no `score` head, so that it is no reward model")
    linear = nn.Linear(head["weight"].shape[1], head["weight"].shape[0], bias="bias" in head)
    linear.load_state_dict(head)
    return linear.requires_grad_(False)


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The main adapter and the head of a reward model, under the names of peft's files."""
    tensors = tensors_of(model, MAIN)
    for name in HEADS:
        if isinstance(getattr(model, name, None), nn.Module):
            tensors |= {f"{name}.{key}": tensor for key, tensor in getattr(model, name).state_dict().items()}
    return {PREFIX + key: tensor for key, tensor in tensors.items()}


def save_adapter(model: PreTrainedModel, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the `saved_tensors`, on the CPU, as peft does; nothing of the base."""
    folder.mkdir(parents=True, exist_ok=True)
    lora: Any = copy.deepcopy(model.peft_config[MAIN])
    for name in HEADS:
        if isinstance(getattr(model, name, None), nn.Module):
            lora.modules_to_save = [name]
    lora.inference_mode = True
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_base_record(folder, base_name(model))


def merge(model: PreTrainedModel) -> None:
    """Add the main adapter, if there is one, into the base's weights, in place; an ordinary model is left.

    A weight that another layer shares, as a tied head, becomes the layer's own: the other one has no adapter.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            if _shares_weight(model, base):
                base.weight = nn.Parameter(base.weight.detach().clone(), base.weight.requires_grad)
                model.config.tie_word_embeddings = False
            layer.merge(safe_merge=True, adapter_names=[MAIN])
            model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _shares_weight(model: nn.Module, layer: nn.Module) -> bool:
    return sum(getattr(module, "weight", None) is getattr(layer, "weight", None) for module in _plain(model)) > 1


def _plain(model: nn.Module) -> Iterator[nn.Module]:
    """The modules without peft's wrappers, which show their base's weight as theirs."""
    return (module for module in model.modules() if not isinstance(module, BaseTunerLayer))


def score_head(model: nn.Module) -> nn.Module | None:
    """The head that reads a decoder's state at the last token; None of a classifier that pools in its own way."""
    return next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)
