"""Run the linear family on a vocabulary sharded over gloo processes and compare with the whole one.

Run as a program: `linear_ranks.py WORLD`; exits 0 when every rank found equality.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import rlhf_kernels as rk

N, D, V = 11, 8, 53


def _case(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.arange(N) % 4 != 1
    labels = torch.randint(0, V, (N,), generator=generator)
    return {
        "hidden": normal(N, D).to(dtype),
        "weight": normal(V, D).to(dtype),
        "bias": normal(V).to(dtype),
        "labels": torch.where(mask, labels, -100),
        "mask": mask,
        "old": -normal(N).abs() - 3,
        "advantages": normal(N),
    }


def _both(case: dict[str, Tensor], part: slice, group: dist.ProcessGroup | None, workspace: int) -> list[Tensor]:
    """logprobs, entropy, policy loss, cross entropy, and the gradients of each by hidden, weight and bias."""
    leaves = [x.detach().clone().requires_grad_() for x in (case["hidden"], case["weight"][part], case["bias"][part])]
    hidden, weight, bias = leaves
    head = {"bias": bias, "softcap": 9.0, "logit_scale": 0.8, "workspace": workspace, "process_group": group}
    outputs = list(
        rk.linear_logprobs(
            *(hidden, weight, case["labels"]), mask=case["mask"], temperature=0.7, with_entropy=True, **head
        )
    )
    policy, _ = rk.linear_policy_loss(
        *(hidden, weight, case["labels"], case["old"], case["advantages"], case["mask"]), entropy_coef=0.1, **head
    )
    outputs += [policy, rk.linear_cross_entropy(hidden, weight, case["labels"], case["mask"], **head)]
    grads = []
    for i, y in enumerate(outputs):
        upstream = torch.linspace(-1, 2, N) if y.dim() else None
        grads += torch.autograd.grad(y, leaves, upstream, retain_graph=i < 1)
    return [x.detach() for x in (*outputs, *grads)]


def _rank(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    cuts = [0, *(V * (i + 1) // world + (i % 2) for i in range(world - 1)), V]  # shards of unequal size
    mine = slice(cuts[rank], cuts[rank + 1])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        case = _case(dtype)
        for workspace in (0, 64 << 20):
            expected = _both(case, slice(None), None, workspace)
            got = _both(case, mine, dist.group.WORLD, workspace)
            for a, b in zip(got, expected, strict=True):
                whole = b[mine] if b.shape[:1] == (V,) else b
                scale = b.double().abs().max().clamp(min=1e-3)
                torch.testing.assert_close(a.double() / scale, whole.double() / scale, rtol=0, atol=tolerance)
        try:
            rk.linear_logprobs(
                case["hidden"], case["weight"][mine], torch.full((N,), V), process_group=dist.group.WORLD
            )
        except IndexError as error:
            assert f"[0, {V})" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a label outside every shard was taken")
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    mp.start_processes(_rank, (size, 29500 + os.getpid() % 2000), nprocs=size, start_method="fork")
