"""Several processes that do one run: each computes its share of every batch, and all take the same decisions.

`accelerate launch` starts the processes; in one process everything here is the identity. Gradients are summed by
`ProcessGroupInfo.sum_gradients` after the last micro-batch, not by DistributedDataParallel: its hooks fire only for
what goes through its own forward, and the losses here call backbone and head by themselves.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.failures import propagate_errors
from rlhf_trainer.base.values import check_values

S = TypeVar("S", Tensor, Sequence)
T = TypeVar("T")
P = ParamSpec("P")


class StageOptions(Protocol):
    """What `on_all_ranks` reads of a stage's config."""

    device: str
    merge: bool
    load_in_4bit: bool


Options = TypeVar("Options", bound=StageOptions)
BUCKET = 1 << 24  # elements of a gradient all-reduce: 64 MiB, so that little memory is needed beside the gradients


@dataclass(frozen=True)
class ProcessGroupInfo:
    """This process and the group it belongs to.

    Every method but `main`, `shard_microbatches` and `contiguous_shard` is a collective: all ranks must call it.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # of what is exchanged
    sharded: bool = False  # FSDP2: each forward pass is a collective, so that all ranks make as many

    @property
    def main(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def shard_microbatches(self, rows: S, size: int | None) -> Iterator[tuple[S, float]]:
        """This rank's share of `rows` in micro-batches of at most `size`, each with its weight.

        The weight is 1. Under FSDP2 a rank with fewer micro-batches than another first repeats some with weight 0: all
        ranks make as many forward passes.
        """
        mine, most = rows[self.rank :: self.world], -(-len(rows) // self.world)  # rank 0 has most
        size = size or max(most, 1)
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        if self.sharded:
            for _ in range(-(-most // size) - len(parts)):
                yield (parts[-1] if parts else rows[:size]), 0.0
        yield from ((part, 1.0) for part in parts)

    def contiguous_shard(self, count: int, unit: int = 1) -> slice:
        """This rank's consecutive part of `count` rows, whole groups of `unit` rows."""
        groups = count // unit
        return slice(groups * self.rank // self.world * unit, groups * (self.rank + 1) // self.world * unit)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks: the same bits on every rank."""
        if self.world > 1:
            for tensor in tensors:
                moved = tensor.to(self.device)  # NCCL takes no CPU tensors
                dist.all_reduce(moved)
                if moved is not tensor:
                    tensor.copy_(moved)

    def all_gather_rows(self, shard: slice, values: Tensor, count: int) -> Tensor:
        """The `values` [b, ...] of all ranks as one tensor [count, ...]; `shard` says which rows are this rank's."""
        if self.world == 1:
            return values
        kind = torch.uint8 if values.dtype == torch.bool else values.dtype
        whole = torch.zeros(count, *values.shape[1:], dtype=kind, device=values.device)
        whole[shard] = values.to(kind)
        self.sum_(whole)
        return whole.to(values.dtype)

    def all_reduce_max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        return bool(self.all_reduce_max(int(flag)))

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value on every rank: all decide alike, even where rounding differs between their machines."""
        if self.world == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, 0, device=self.device)
        return holder[0]

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values in every rank's tensors."""
        if self.world > 1:
            for tensor in tensors:
                moved = tensor.detach().to(self.device)
                dist.broadcast(moved, 0)
                if moved.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(moved)

    def barrier(self) -> None:
        if self.world > 1:
            self.all_reduce_max(0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks, in float32; FSDP2 has summed those of its own parameters.

        The losses divide by the units of the whole minibatch, so the sum is the gradient of one process's loss. A
        parameter without gradient on this rank counts as 0 where another rank has one.
        """
        plain = [p for p in parameters if not hasattr(p, "full_tensor")]
        if self.world == 1 or not plain:
            return
        has = torch.tensor([p.grad is not None for p in plain], dtype=torch.int32, device=self.device)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        used = [p for p, wanted in zip(plain, has.tolist(), strict=True) if wanted]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket: list[Tensor] = []
        for index, parameter in enumerate(used):
            if parameter.grad is not None:
                bucket.append(parameter.grad)
            if sum(grad.numel() for grad in bucket) >= BUCKET or index == len(used) - 1:
                _sum_bucket(bucket)
                bucket = []


def _sum_bucket(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1).float() for grad in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))


_context = ProcessGroupInfo()


def distributed_context() -> ProcessGroupInfo:
    """The process group of the stage that is running."""
    return _context


def rank_and_world_size() -> tuple[int, int]:
    """(rank, world) as the launcher set them; (0, 1) without one."""
    world = _number_of_launcher("WORLD_SIZE", 1)
    return (_number_of_launcher("RANK", 0) if world > 1 else 0), world


def _number_of_launcher(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} is {value!r}, expected a number; unset it, or use a launcher")
    return int(value)


def join(device: torch.device) -> ProcessGroupInfo:
    """Join the process group of the launch, once in the life of a process; NCCL between GPUs, gloo between CPUs.

    Raises:
        UserError: a launch of a kind that is not supported.
    """
    global _context
    if rank_and_world_size()[1] == 1:
        _context = ProcessGroupInfo(device=device)
        return _context
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise UserError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']} but not {', '.join(missing)}: start several "
            "processes with `accelerate launch` or torchrun, or unset WORLD_SIZE"
        )
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate was told to use FSDP 1; --fsdp_version 2 is supported")
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(f"accelerate was told to use {name}; data parallelism and FSDP 2 are supported")
    # Every rank loads the weights itself; transformers would leave those of all but rank 0 empty.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    from accelerate import PartialState

    fresh = not dist.is_initialized()
    state = PartialState(cpu=device.type == "cpu")
    if fresh:
        atexit.register(_leave)
    _context = ProcessGroupInfo(state.process_index, state.num_processes, state.device, sharded)
    return _context


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def on_all_ranks(stage: Callable[Concatenate[Options, P], T]) -> Callable[Concatenate[Options, P], T]:
    """A stage `(cfg, ...)` made to run on every rank of the launch; an error on one rank stops all of them."""

    @functools.wraps(stage)
    def wrapper(cfg: Options, /, *arguments: P.args, **options: P.kwargs) -> T:
        check_values(cfg)
        ranks = join(resolve_device(cfg.device))
        if ranks.sharded and cfg.merge:
            raise UserError("--merge does not go with FSDP 2: save the adapter, and merge it in one process")
        if ranks.sharded and cfg.load_in_4bit:
            raise UserError("--load_in_4bit does not go with FSDP 2: 4-bit weights are not sharded")
        with propagate_errors(ranks.rank, ranks.world):
            return stage(cfg, *arguments, **options)

    return wrapper


def resolve_device(device: str) -> torch.device:
    """ "auto" is CUDA if there is a GPU, else the CPU; of several processes each has a GPU of its own."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda" and rank_and_world_size()[1] > 1 and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA GPU here; use --device cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {device}: not a device; use auto, cpu or cuda") from None
