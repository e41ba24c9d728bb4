"""Peak memory of calls of the linear family beyond their inputs and gradients: one line for each, two numbers of bytes.

The first is the call's. The second is the library's share: the most that torch takes beyond a product's operands and
result for any one matrix product of that call, run by itself. oneDNN repacks matrices, by how much depends on the CPU.

Run as a program: `python -m support.linear_memory CASE...`, a CASE being OP:DTYPE:PRODUCTS:N:V:D:WORKSPACE with OP of
CALLS, PRODUCTS the dtype that matrices are multiplied in, workspace in KiB.
Each number comes from a process of its own, forked with the libraries loaded and nothing allocated yet, which counts
its own pages and no other process's.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch


def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, workspace: int) -> list[Tensor]:
    found = rk.linear_logprobs(hidden, weight, labels, workspace=workspace)
    return list(torch.autograd.grad(found.sum(), (hidden, weight)))


def frozen(hidden: Tensor, weight: Tensor, labels: Tensor, workspace: int) -> list[Tensor]:
    """A frozen head."""
    found = rk.linear_logprobs(hidden, weight.detach(), labels, workspace=workspace)
    return list(torch.autograd.grad(found.sum(), hidden))


def policy(hidden: Tensor, weight: Tensor, labels: Tensor, workspace: int) -> list[Tensor]:
    x = torch.zeros(labels.shape)
    loss, _ = rk.linear_policy_loss(hidden, weight, labels, x - 10, x + 1, clip_high=1e9, workspace=workspace)
    return list(torch.autograd.grad(loss, (hidden, weight)))


def lora(hidden: Tensor, weight: Tensor, labels: Tensor, workspace: int) -> list[Tensor]:
    """A frozen weight, its low-rank addition trained."""
    low = [torch.zeros(shape, requires_grad=True) for shape in ((8, weight.shape[1]), (weight.shape[0], 8))]
    found = rk.linear_logprobs(hidden, weight.detach(), labels, lora=(*low, 2.0), workspace=workspace)
    return list(torch.autograd.grad(found.sum(), (hidden, *low)))


def kl(hidden: Tensor, weight: Tensor, _labels: Tensor, workspace: int) -> list[Tensor]:
    found = rk.linear_kl(hidden, weight, hidden.detach(), weight.detach(), workspace=workspace)
    return list(torch.autograd.grad(found.sum(), (hidden, weight)))


def sharded_jsd(hidden: Tensor, weight: Tensor, _labels: Tensor, workspace: int) -> list[Tensor]:
    """The weight as the only shard of a vocabulary."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    options = {"direction": "jsd", "workspace": workspace, "process_group": dist.group.WORLD}
    found = rk.linear_kl(hidden, weight, hidden.detach(), weight.detach(), **options)
    return list(torch.autograd.grad(found.sum(), (hidden, weight)))


M_MMAP_THRESHOLD = -3  # of malloc.h
CALLS = {call.__name__: call for call in (logprobs, frozen, policy, lora, kl, sharded_jsd)}


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def prepare() -> None:
    torch.set_num_threads(1)
    # What is freed goes back to the system at once: else the C library's free lists, up to 32 MiB a piece, count too.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def growth(function: Callable[[], Any]) -> tuple[int, Any]:
    """By how many bytes this process grew at most while the function ran, and what it returned."""
    before = resident()
    reset_peak()
    result = function()
    return peak() - before, result


def layout(x: Tensor) -> tuple[list[int], bool]:
    """The shape of a matrix, and whether it lies in memory column by column."""
    return list(x.shape), x.dim() == 2 and x.stride(0) < x.stride(1)


def measured(op: str, dtype: str, products: str, *sizes: str) -> list[Any]:
    """[bytes, the layouts and dtype of every product that was made]."""
    N, V, D, workspace = map(int, sizes)
    dispatch.backend_module("cpu").logits_dtype = lambda *_: getattr(torch, products)
    prepare()

    def matrix(rows: int) -> Tensor:
        return torch.full((rows, D), 1 / 8, dtype=getattr(torch, dtype)).requires_grad_()

    CALLS[op](matrix(2), matrix(2), torch.zeros(2, dtype=torch.int64), 1 << 20)  # libraries load their own
    inputs = matrix(N), matrix(V), torch.arange(N) % V
    made: list[list[Any]] = []

    def noting(right: Callable[..., Tensor], factors: slice, *operands: Any, **options: Any) -> Tensor:
        a, b = operands[factors]
        product = [*layout(a), *layout(b), str(a.dtype).removeprefix("torch.")]
        if product not in made:
            made.append(product)
        return right(*operands, **options)

    torch.mm, torch.addmm = partial(noting, torch.mm, slice(0, 2)), partial(noting, torch.addmm, slice(1, 3))
    grown, grads = growth(lambda: CALLS[op](*inputs, workspace << 10))
    return [grown - sum(x.nbytes for x in grads), made]


def library_share(made: list[list[Any]]) -> int:
    """The most bytes that torch takes for one of these products beyond its operands and result."""
    prepare()
    for dtype in {product[-1] for product in made}:
        torch.mm(*(torch.ones(2, 2, dtype=getattr(torch, dtype)) for _ in range(2)))  # libraries load their own
    most = 0
    for a_shape, a_by_columns, b_shape, b_by_columns, dtype in made:
        a, b = (
            torch.full(shape[::-1] if by_columns else shape, 1 / 8, dtype=getattr(torch, dtype))
            for shape, by_columns in ((a_shape, a_by_columns), (b_shape, b_by_columns))
        )
        a, b = a.T if a_by_columns else a, b.T if b_by_columns else b
        out = torch.ones(a.shape[0], b.shape[1], dtype=a.dtype)
        grown, _ = growth(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        most = max(most, grown)
        del a, b, out
    return most


def in_a_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process forked for it, by way of JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writer, "w") as file:
                json.dump(function(*arguments), file)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{arguments} failed")
    return json.loads(text)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        bytes_used, products_made = in_a_child(measured, *case.split(":"))
        print(bytes_used, in_a_child(library_share, products_made), flush=True)
