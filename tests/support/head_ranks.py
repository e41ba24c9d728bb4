"""head_of on models that two gloo processes share: DDP, accelerate, FSDP2, a DTensor head; beside one process.

Run as a program: `python -m support.head_ranks CASE...`; exits 0 when the loss and every gradient on both ranks
are equal to those of the unwrapped model's own logits.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels as rk
from support.head_models import V, made

WORLD = 2


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of their labels: another batch on each rank."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, V, (2, 6), generator=generator)
    return ids, torch.rand(2, 5, generator=generator) < 0.7


def own_loss(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    log_p = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0][mask].mean()


def head_loss(model: nn.Module, ids: Tensor, mask: Tensor, op: str, **options: object) -> Tensor:
    head = rk.head_of(model)
    hidden = head.hidden_states(input_ids=ids)[:, :-1]
    if op == "cross entropy":
        return rk.linear_cross_entropy(hidden, labels=ids[:, 1:], mask=mask, **head.options(**options))
    logprobs = rk.linear_logprobs(hidden, labels=ids[:, 1:], mask=mask, **head.options(**options))
    return -logprobs[mask].mean()


def expected_of(model: nn.Module, ranks: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Each rank's loss, and the gradients of their mean."""
    model = copy.deepcopy(model)
    losses = [own_loss(model, *batch(rank)) for rank in ranks]
    torch.stack(losses).mean().backward()
    return [x.detach() for x in losses], {name: p.grad for name, p in model.named_parameters()}


def check(rank: int, model: nn.Module, wrapped: nn.Module, data_parallel: bool = True, **options: object) -> None:
    losses, grads = expected_of(model, list(range(WORLD)) if data_parallel else [0])
    for op in ("cross entropy", "logprobs"):
        for _ in range(2):  # the second step meets what the first has left behind
            wrapped.zero_grad()
            loss = head_loss(wrapped, *batch(rank if data_parallel else 0), op, **options)
            loss.backward()
            torch.testing.assert_close(loss.detach(), losses[rank if data_parallel else 0], rtol=1e-5, atol=1e-5)
            seen = {name.removeprefix("module."): p.grad for name, p in wrapped.named_parameters()}
            assert seen.keys() == grads.keys()
            for name, want in grads.items():
                got = seen[name].full_tensor() if hasattr(seen[name], "full_tensor") else seen[name]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def ddp(rank: int) -> None:
    for name, unused in (("llama tied", False), ("llama", True)):
        model = made(name)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=unused)
        check(rank, model, wrapped)


def accelerate(rank: int) -> None:
    from accelerate import Accelerator

    model = made("llama")
    check(rank, model, Accelerator(cpu=True).prepare(copy.deepcopy(model)))


def _fsdp(rank: int, name: str, parts: Callable[[nn.Module], list[nn.Module]]) -> None:
    from torch.distributed.fsdp import fully_shard

    model = made(name)
    wrapped = copy.deepcopy(model)
    for part in parts(wrapped):
        fully_shard(part)
    check(rank, model, wrapped)


def fsdp(rank: int) -> None:
    """The layers and the root, which owns the head; the root alone; a tied head."""
    _fsdp(rank, "llama", lambda model: [*model.model.layers, model])
    _fsdp(rank, "llama", lambda model: [model])
    _fsdp(rank, "llama tied", lambda model: [*model.model.layers, model])


def fsdp_head(rank: int) -> None:
    """The head sharded by itself: its gradient is reduced to the shards.

    Three gathers a step: by `options`, and by FSDP2's own hooks around the head in the forward and in the backward.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    _fsdp(rank, "llama", lambda model: [*model.model.layers, model.lm_head, model])
    _fsdp(rank, "phi", lambda model: [model.lm_head, model])  # with a bias
    model = made("llama")
    for part in (model.lm_head, model):
        fully_shard(part)
    assert isinstance(model.lm_head.weight, DTensor)
    with _Gathers(-(-V // WORLD) * model.lm_head.weight.shape[1]) as gathers:
        loss = head_loss(model, *batch(rank), "cross entropy")
        assert gathers.count == 2
        loss.backward()
    assert gathers.count == 3


class _Gathers(TorchDispatchMode):
    """Counts the collectives that gather shards of so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "all_gather_into_tensor" in str(func) or "_allgather_base_" in str(func):
            self.count += any(isinstance(x, Tensor) and x.numel() == self.elements for x in args)
        return func(*args, **(kwargs or {}))


def dtensor(rank: int) -> None:
    """A head sharded by its rows, the same data on both ranks: gathered, and as the shard of the vocabulary.

    Also where the model has a bias of its own, and where the layer has another.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    for name in ("llama", "bart untied", "bart biased", "phi"):
        model = made(name)
        sharded = copy.deepcopy(model)
        for key, parameter in list(sharded.lm_head.named_parameters()):
            setattr(sharded.lm_head, key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        check(rank, model, sharded, data_parallel=False)
        check(rank, model, sharded, data_parallel=False, process_group=mesh.get_group())
    head, hidden = sharded.lm_head, torch.randn(3, sharded.lm_head.weight.shape[1])
    kl = rk.linear_kl(hidden, head.weight, hidden + 1, head.weight, process_group=mesh.get_group())
    whole = head.weight.full_tensor()
    torch.testing.assert_close(kl, rk.linear_kl(hidden, whole, hidden + 1, whole), rtol=1e-4, atol=1e-5)
    replicated = made("bart untied")
    try:
        head = rk.head_of(replicated)
        head.options(process_group=mesh.get_group())
    except TypeError as found:
        assert "it takes a DTensor" in str(found), found  # noqa: PT017
    else:
        raise AssertionError("a model's own bias without a placement")
    weight = sharded.lm_head.weight
    hidden, labels = torch.zeros(3, weight.shape[1]), torch.zeros(3, dtype=torch.int64)
    for message, error, options in (
        ("weight is a DTensor", TypeError, {}),
        ("weight lies on", ValueError, {"process_group": mesh.get_group()}),
    ):
        try:
            rk.linear_logprobs(
                hidden, distribute_tensor(weight.full_tensor().detach(), mesh, [Shard(1)]), labels, **options
            )
        except error as found:
            assert message in str(found), found  # noqa: PT017
        else:
            raise AssertionError(message)


CASES = {case.__name__: case for case in (ddp, accelerate, fsdp, fsdp_head, dtensor)}


def _rank(rank: int, cases: list[str], port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD)
    )
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for case in cases:
        CASES[case](rank)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(_rank, (sys.argv[1:], 31500 + os.getpid() % 2000), nprocs=WORLD, start_method="fork")
