"""Peak memory of calls of the linear family beyond their inputs and gradients: one line of bytes for each.

Run as a program: `linear_memory.py CASE...`, a CASE being OP:DTYPE:PRODUCTS:N:V:D:WORKSPACE with OP of CALLS, PRODUCTS
the dtype that matrices are multiplied in, workspace in KiB.
Each runs in a process of its own, forked with the libraries loaded and nothing allocated yet.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import traceback

import torch
import torch.distributed as dist
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.backends import cpu


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


def measured(op: str, dtype: str, products: str, *sizes: str) -> int:
    N, V, D, workspace = map(int, sizes)
    cpu.product_dtype = lambda _: getattr(torch, products)
    torch.set_num_threads(1)
    # What is freed goes back to the system at once: else the C library's free lists, up to 32 MiB a piece, count too.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)

    def matrix(rows: int) -> Tensor:
        return torch.full((rows, D), 1 / 8, dtype=getattr(torch, dtype)).requires_grad_()

    CALLS[op](matrix(2), matrix(2), torch.zeros(2, dtype=torch.int64), 1 << 20)  # libraries load their own
    inputs = matrix(N), matrix(V), torch.arange(N) % V
    before = resident()
    reset_peak()
    grads = CALLS[op](*inputs, workspace << 10)
    return peak() - before - sum(x.nbytes for x in grads)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            try:
                print(measured(*case.split(":")), flush=True)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{case} failed")
