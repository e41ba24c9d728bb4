"""--dtype bfloat16 and --gradient_checkpointing: what they change in a model, and around its forward passes.

A model of 16-bit weights, as an object may come, is widened to float32 and given back as it came.

bfloat16 is mixed precision: matrix products in bf16 (torch.autocast), what is trained in float32, with it Adam's state,
norms, embeddings and losses. Weights of frozen linear layers are kept in bf16: autocast would round them so anyway, and
no bit of a result changes. Their float32 values are kept in CPU memory where `restore` will need them: --merge adds
to the base as it was, and a model passed as an object is given back as it came.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError

DTYPES = ("float32", "bfloat16")
FP32_COPY = "exact"  # attribute of a rounded parameter: its float32 values, on the CPU
CAME_IN = "came_in"  # attribute of a widened tensor: its dtype before


def validate_dtype(dtype: str) -> None:
    """UserError for a dtype that is none of ours."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: it takes {', '.join(DTYPES)}")


def fast_on_cpu() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU; where it does not, torch does so by itself, slowly."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_where_slow(dtype: str, device: torch.device) -> None:
    if dtype == "bfloat16" and device.type == "cpu" and not fast_on_cpu():
        say("--dtype bfloat16: this CPU has no fast bf16 products, they take up to 100 times as long; use float32 here")


def autocast(dtype: str, device: torch.device | str) -> torch.autocast:
    """Around forward passes, never around a backward or an optimizer's step: it caches rounded weights."""
    # FSDP frees a layer's weights after its use; the rounded copies in autocast's cache would stay.
    options = {"enabled": dtype == "bfloat16", "cache_enabled": not distributed_context().sharded}
    return torch.autocast(torch.device(device).type, torch.bfloat16, **options)


def autocast_disabled(device: torch.device) -> torch.autocast:
    """No autocast: around a small head whose numbers need more than bf16's 8 bits."""
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def widen(model: nn.Module, dtype: str) -> None:
    """Every weight and buffer of 16 bits in float32, in place, until `narrow`: an optimizer's steps need its 24 bits.

    With dtype bfloat16 the frozen linear weights that are bf16 already stay so: `to_bf16` would round them again.
    """
    kept = {id(parameter) for parameter in _rounded(model, include_trainable=False)} if dtype == "bfloat16" else set()
    for tensor in (*model.parameters(), *model.buffers()):
        vars(tensor).pop(CAME_IN, None)  # left by a stage that ended with an error
        if tensor.dtype in (torch.bfloat16, torch.float16):
            setattr(tensor, CAME_IN, tensor.dtype)
            if tensor.dtype != torch.bfloat16 or id(tensor) not in kept:
                tensor.data = tensor.data.float()


def narrow(model: nn.Module) -> None:
    """What `widen` widened in the dtype that it came in."""
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = vars(tensor).pop(CAME_IN, None)
        if dtype is not None:
            tensor.data = tensor.data.to(dtype)


def _rounded(model: nn.Module, include_trainable: bool) -> Iterator[nn.Parameter]:
    """The parameters of linear layers that bfloat16 rounds: those that no embedding shares."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            for parameter in module.parameters(recurse=False):
                if (include_trainable or not parameter.requires_grad) and id(parameter) not in shared:
                    yield parameter


@torch.no_grad()
def to_bf16(model: nn.Module, dtype: str, include_trainable: bool = False, keep_fp32_copy: bool = False) -> None:
    """With dtype bfloat16: round the model's frozen linear weights to bf16, but not those that an embedding shares.

    include_trainable: the trainable ones too. keep_fp32_copy: for `restore`, on the CPU, where rounding changed one.
    """
    if dtype != "bfloat16":
        return
    for parameter in _rounded(model, include_trainable):
        if parameter.dtype == torch.float32:
            vars(parameter).pop(FP32_COPY, None)  # left by a stage that ended with an error: older values
            exact, parameter.data = parameter.data, parameter.data.bfloat16()
            if keep_fp32_copy and not torch.equal(parameter.data.float(), exact):
                setattr(parameter, FP32_COPY, exact.cpu())


def restore(model: nn.Module, dtype: str) -> None:
    """float32 again, for whoever uses the model after training: the values that `to_bf16` kept where it did.

    On the CPU, if the device's memory does not hold them.
    """
    if dtype != "bfloat16":
        return
    try:
        _restore(model)
    except torch.OutOfMemoryError:
        say("the model in float32 does not fit the device beside what is there; it is on the CPU now")
        _restore(model.to("cpu"))


def _restore(model: nn.Module) -> None:
    for parameter in model.parameters():
        exact = vars(parameter).pop(FP32_COPY, None)
        # Not if the weights have been loaded anew since.
        if exact is not None and torch.equal(parameter.data, exact.bfloat16().to(parameter.device)):
            parameter.data = exact.to(parameter.device)
    nn.Module.float(model)  # transformers' own refuses a quantised model, whose 4-bit weights this leaves alone


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Layers keep no activations in training mode, and none inside `checkpointing_in_eval_mode`.

    Raises:
        UserError: the model has no gradient checkpointing.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers and peft on each other's names
            enable({"use_reentrant": False})
    except ValueError:
        raise UserError(f"--gradient_checkpointing: {type(model).__name__} does not support it") from None


@contextmanager
def checkpointing_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Checkpointing in evaluation mode: only the layers' own flag changes, dropout inside them stays off."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
