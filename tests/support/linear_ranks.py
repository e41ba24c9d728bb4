"""Run the linear family on a vocabulary sharded over gloo processes and compare with the whole one.

Run as a program: `python -m support.linear_ranks WORLD`; exits 0 when every rank found equality.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels as rk
from rlhf_kernels.ops.linear.shards import shard

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
        "lora_a": normal(3, D),
        "lora_b": normal(V, 3),
        "other": normal(N, D).to(dtype),
        "other_weight": normal(V, D).to(dtype),
    }


def _gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of each by every leaf."""
    grads = []
    for y in outputs:
        upstream = torch.linspace(-1, 2, N) if y.dim() else None
        found = torch.autograd.grad(y, leaves, upstream, retain_graph=True, allow_unused=True)
        grads += [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    return [x.detach() for x in (*outputs, *grads)]


def _leaves(case: dict[str, Tensor], part: slice) -> list[Tensor]:
    tensors = (case["hidden"], case["weight"][part], case["bias"][part], case["lora_a"], case["lora_b"][part])
    return [x.detach().clone().requires_grad_() for x in tensors]


def _labelled(case: dict[str, Tensor], part: slice, group: dist.ProcessGroup | None, workspace: int) -> list[Tensor]:
    """logprobs, entropy, losses, and logprobs of a frozen head, with a low-rank addition to it in the first three."""
    leaves = _leaves(case, part)
    hidden, weight, bias, lora_a, lora_b = leaves
    head = {"bias": bias, "softcap": 9.0, "logit_scale": 0.8, "workspace": workspace, "process_group": group}
    low = {**head, "lora": (lora_a, lora_b, 0.5)}
    outputs = list(
        rk.linear_logprobs(hidden, weight, case["labels"], mask=case["mask"], temperature=0.7, with_entropy=True, **low)
    )
    policy, _ = rk.linear_policy_loss(
        hidden, weight, case["labels"], case["old"], case["advantages"], case["mask"], entropy_coef=0.1, **low
    )
    plain, _ = rk.linear_policy_loss(
        hidden, weight, case["labels"], case["old"], case["advantages"], case["mask"], entropy_coef=0.1, **head
    )
    frozen = rk.linear_logprobs(
        hidden,
        weight.detach(),
        case["labels"],
        mask=case["mask"],
        temperature=torch.linspace(0.5, 2, N),
        **{**head, "bias": bias.detach()},
    )
    outputs += [policy, plain, frozen, rk.linear_cross_entropy(hidden, weight, case["labels"], case["mask"], **head)]
    return _gradients(outputs, leaves)


def _divergences(case: dict[str, Tensor], part: slice, group: dist.ProcessGroup | None, workspace: int) -> list[Tensor]:
    """linear_kl in every direction; then with the first tokens closed to the policy, a whole shard of them."""
    leaves = _leaves(case, part)
    hidden, weight, bias, lora_a, lora_b = leaves
    other = case["other"], case["other_weight"][part]
    closed = torch.where(torch.arange(V) < V // 2 + 2, float("-inf"), 0.0).to(bias.dtype)[part]
    options = {"mask": case["mask"], "workspace": workspace, "process_group": group}
    outputs = []
    for direction in ("reverse", "forward", "jsd"):
        for shift, more in ((0, {"softcap": 9.0}), (closed, {"temperature": torch.linspace(0.5, 2, N)})):
            low = {"bias": bias + shift, "lora": (lora_a, lora_b, 0.5), "direction": direction}
            outputs.append(rk.linear_kl(hidden, weight, *other, **low, **more, **options))
    return _gradients(outputs, leaves)


def _jsd_of_near_policies(part: slice, group: dist.ProcessGroup | None, dtype: torch.dtype) -> Tensor:
    """The terms of both signs cancel to a thousandth of their size; logits are exact in 16 bits."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randint(-3, 4, shape, generator=generator) / 2.0 for shape in ((N, D), (V, D)))
    weight[:, 0] = weight[:, 0].sign()
    other = hidden.clone()
    hidden[:, 0], other[:, 0] = 1 / 16, 2 / 16
    head = weight[part].to(dtype)
    options = {"direction": "jsd", "temperature": 2.0, "process_group": group}
    return rk.linear_kl(hidden.to(dtype), head, other.to(dtype), head, **options)


def _check_gathers(case: dict[str, Tensor], part: slice) -> None:
    """One collective for the sizes of the shards, one for the only chunk; the sizes in one transfer to the host."""
    gathers = []
    plain = dist.all_gather
    dist.all_gather = lambda *args, **options: gathers.append(args) or plain(*args, **options)
    hidden, weight, options = case["hidden"], case["weight"][part], {"process_group": dist.group.WORLD}
    rk.linear_logprobs(hidden, weight, case["labels"], mask=case["mask"], **options)
    assert len(gathers) == 2, len(gathers)
    for direction in ("reverse", "jsd"):
        gathers.clear()
        rk.linear_kl(hidden, weight, case["other"], case["other_weight"][part], direction=direction, **options)
        assert len(gathers) == 2, len(gathers)
    dist.all_gather = plain
    with _Scalars() as scalars:
        shard(dist.group.WORLD, len(weight), hidden.device)
    assert scalars.read == 0, scalars.read


class _Scalars(TorchDispatchMode):
    """Counts the single elements that are read, on a GPU a host sync each."""

    read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.read += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _rank(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    cuts = [0, *(V * (i + 1) // world + (i % 2) for i in range(world - 1)), V]  # shards of unequal size
    mine = slice(cuts[rank], cuts[rank + 1])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        case = _case(dtype)
        # 1500 bytes: shards of unequal size must nevertheless cut chunks alike.
        for workspace, call in itertools.product((0, 1500, 64 << 20), (_labelled, _divergences)):
            expected = call(case, slice(None), None, workspace)
            got = call(case, mine, dist.group.WORLD, workspace)
            for a, b in zip(got, expected, strict=True):
                whole = b[mine] if b.shape[:1] == (V,) else b
                scale = b.double().abs().nan_to_num(posinf=0.0).max().clamp(min=1e-3)
                torch.testing.assert_close(a.double() / scale, whole.double() / scale, rtol=0, atol=tolerance)
        _check_gathers(case, mine)
        near = [_jsd_of_near_policies(*shard, dtype) for shard in ((mine, dist.group.WORLD), (slice(None), None))]
        torch.testing.assert_close(*near, rtol=1e-3, atol=0)
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
