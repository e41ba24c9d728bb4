"""FSDP 2: weights, gradients and optimizer states spread over the ranks; a layer is whole only while it computes.

torch's `fully_shard` with accelerate's settings. The losses call backbone and head by themselves, while FSDP gathers
weights in the forward of the module that owns them. So a `Root` that owns model and heads runs any function as its
forward: within it the head's weight is an ordinary tensor, and the gradients of all are summed over the ranks.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.models import precision
from rlhf_trainer.models.adapters import has_adapter

T = TypeVar("T")


class Root(nn.Module):
    """What FSDP takes for the outermost module. reshards: whether a layer is freed after its forward pass."""

    def __init__(self, *modules: nn.Module, reshards: bool) -> None:
        super().__init__()
        self.held, self.reshards = nn.ModuleList(modules), reshards

    def forward(self, function: Callable[[], T]) -> T:
        return function()


ROOT = "sharding_root"  # among a sharded model's attributes, but no submodule: the root holds the model


def _root_of(model: nn.Module) -> Root | None:
    return vars(model).get(ROOT)


def load_device(device: torch.device) -> torch.device:
    """Where a model is loaded to: the device, or the CPU if it goes to the devices in shards."""
    return torch.device("cpu") if distributed_context().sharded else device


def prepare_model(
    model: PreTrainedModel,
    device: torch.device,
    *heads: nn.Module,
    dtype: str = "float32",
    keep_fp32_copy: bool = False,
) -> PreTrainedModel:
    """Put the model on its device, in place; under FSDP 2 this rank's shard of it and of the `heads`.

    Every rank begins with rank 0's values of what is trained. Call it before an optimizer takes the parameters.
    Frozen weights are stored in `dtype`; with `keep_fp32_copy`, `precision.restore` gives back their float32 values
    (not under FSDP 2).
    """
    sharded = distributed_context().sharded
    # Without an adapter every weight is saved, and bf16 shards cannot be widened again.
    if not sharded or has_adapter(model):
        precision.to_bf16(model, dtype, keep_fp32_copy=keep_fp32_copy and not sharded)
    if not sharded:
        nn.Module.to(model, device)
    trained = (parameter for module in (model, *heads) for parameter in module.parameters() if parameter.requires_grad)
    distributed_context().broadcast(trained)
    if not sharded:
        return model
    options = _options(device)
    blocks = _block_names(model)
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, **options)
    for head in heads:
        fully_shard(head, **options)
    root = Root(model, *heads, reshards=options["reshard_after_forward"])
    fully_shard(root, **options)
    for unit in _units(root):
        unit.set_gradient_divide_factor(1.0)  # a sum: the losses divide by the units of the whole minibatch
        unit.set_force_sum_reduction_for_comms(True)
    vars(model)[ROOT] = root
    # FSDP warns of outputs that are views, which an operation in place would break; there is none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    with torch.no_grad():
        root(lambda: None)  # tells FSDP which module is the outermost, before another one runs by itself
    return model


def prepare_trained_model(
    model: PreTrainedModel, device: torch.device, *heads: nn.Module, dtype: str, restored: bool
) -> PreTrainedModel:
    """`prepare_model` of the model that a stage trains.

    restored: whether it ends with its float32 weights, to be merged or given back to who passed it.
    """
    precision.warn_where_slow(dtype, device)
    precision.widen(model, dtype)
    return prepare_model(model, device, *heads, dtype=dtype, keep_fp32_copy=restored)


def _options(device: torch.device) -> dict[str, Any]:
    from accelerate import FullyShardedDataParallelPlugin

    settings = FullyShardedDataParallelPlugin(fsdp_version=2)
    if type(settings.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise UserError("accelerate was told to offload FSDP's parameters to the CPU; that is not supported")
    mesh = init_device_mesh(device.type, (distributed_context().world,))
    return {"mesh": mesh, "reshard_after_forward": settings.reshard_after_forward}


def _block_names(model: PreTrainedModel) -> set[str]:
    """Class names of the layers that are gathered one at a time: accelerate's setting, or what transformers says."""
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    return {name.strip() for name in named.split(",") if name.strip()} or set(model._no_split_modules or ())


def _units(root: nn.Module) -> list[Any]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    return _root_of(model) is not None


def run_as_fsdp_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """`function()`, which computes with the model: under FSDP 2 on every rank, with the weights gathered as needed."""
    root = _root_of(model)
    return function() if root is None else root(function)


@contextmanager
def all_weights_gathered(model: nn.Module, gather: bool = True) -> Iterator[None]:
    """Within the block all weights are gathered on every rank, so that each computes alone, as a rollout does."""
    root = _root_of(model)
    if root is None or not gather:
        yield
        return
    units = _units(root)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(root.reshards and unit is not root, recurse=False)


class LockstepForward:
    """Forward passes layer by layer, on ranks that need unlike numbers of them, as rollouts do.

    A rank that has finished repeats `idle`, a small forward pass, until all have. Where the model is whole each rank
    goes alone.
    """

    def __init__(self, model: nn.Module, idle: Callable[[], Any], gathered: bool) -> None:
        self.model, self.idle = model, idle
        self.shared = is_sharded(model) and not gathered

    def run(self, function: Callable[[], T]) -> T:
        if not self.shared:
            return function()
        distributed_context().any(True)
        return run_as_fsdp_forward(self.model, function)

    def drain(self) -> None:
        while self.shared and distributed_context().any(False):
            run_as_fsdp_forward(self.model, self.idle)


F = TypeVar("F", bound=Callable[..., Any])


def fsdp_forward(function: F) -> F:
    """A function that computes with the model, its first argument, called `run_as_fsdp_forward` it."""

    @functools.wraps(function)
    def wrapper(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        return run_as_fsdp_forward(model, lambda: function(model, *arguments, **options))

    return wrapper  # type: ignore[return-value]


def is_dtensor(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def unsharded_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is spread over the ranks as a whole, on each of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, whole, in rank 0's CPU memory, one after the other; {} on the other ranks, which take part.

    One tensor under two names, a tied weight, is gathered once and is one tensor here too.
    """
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        earlier = first.setdefault(id(tensor), name)
        if earlier == name:
            on_device = unsharded_tensor(tensor.detach())
            if distributed_context().main:
                found[name] = on_device.cpu().contiguous()
            del on_device  # before the next one is gathered
        elif distributed_context().main:
            found[name] = found[earlier]
    return found


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, as `like` is spread; rank 0's values count."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
