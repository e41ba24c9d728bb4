"""Peak memory of one call of the linear family beyond its inputs and gradients, in bytes on stdout.

Run as a program, one call a process: `linear_memory.py {policy|logprobs|lora} {float32|bfloat16} N V D`.
"""

from __future__ import annotations

import resource
import sys

import torch

import rlhf_kernels as rk


def call(op: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    if op == "lora":  # a frozen weight, its low-rank addition trained
        vocab, width = weight.shape
        low = [torch.zeros(shape, requires_grad=True) for shape in ((8, width), (vocab, 8))]
        logprobs = rk.linear_logprobs(hidden, weight.detach(), labels, lora=(*low, 2.0), workspace=16 << 20)
        return list(torch.autograd.grad(logprobs.sum(), (hidden, *low)))
    if op == "logprobs":
        logprobs = rk.linear_logprobs(hidden, weight, labels)
        return list(torch.autograd.grad(logprobs.sum(), (hidden, weight)))
    x = torch.zeros(labels.shape)
    loss, _ = rk.linear_policy_loss(hidden, weight, labels, x - 10, x + 1, clip_high=1e9)
    return list(torch.autograd.grad(loss, (hidden, weight)))


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


if __name__ == "__main__":
    op, dtype, *sizes = sys.argv[1:]
    N, V, D = map(int, sizes)
    torch.set_num_threads(1)
    tiny = [torch.zeros(2, D, dtype=getattr(torch, dtype)).requires_grad_() for _ in range(2)]
    call(op, *tiny, torch.zeros(2, dtype=torch.int64))  # libraries load their own
    hidden = torch.randn(N, D).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.zeros(V, D, dtype=getattr(torch, dtype)).normal_(std=0.05).requires_grad_()
    labels = torch.randint(0, V, (N,))
    before = resident()
    reset_peak()
    grads = call(op, hidden, weight, labels)
    print(peak() - before - sum(x.nbytes for x in grads))
