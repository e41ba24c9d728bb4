"""One call of every op, with all of its options, for tests of what all ops have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk
from support import edge_cases

V, D = 12, 6


class Op(NamedTuple):
    call: Callable[..., object]  # (mask [n, t], labels [n, t], scalar, *tensors)
    leaves: tuple[str, ...]  # shapes of the differentiable tensors, in n, t, v and d
    constants: tuple[str, ...] = ()  # and of the others, which come after them


OPS = {
    "selected_logprobs": Op(
        lambda mask, labels, s, x: rk.selected_logprobs(x, labels, mask=mask, temperature=0.7 + s, with_entropy=True),
        ("ntv",),
    ),
    "linear_logprobs": Op(
        lambda mask, labels, s, hidden, weight, bias: rk.linear_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            mask=mask,
            temperature=0.7 + s,
            softcap=3 + s,
            logit_scale=1 + s,
            with_entropy=True,
        ),
        ("ntd", "vd", "v"),
    ),
    "linear_logprobs_frozen": Op(
        lambda mask, labels, s, hidden, weight, bias: rk.linear_logprobs(
            hidden, weight, labels, bias=bias, mask=mask, temperature=0.7 + s, softcap=3 + s, with_entropy="detached"
        ),
        ("ntd",),
        ("vd", "v"),
    ),
    "linear_policy_loss": Op(
        lambda mask, labels, s, hidden, weight, bias, old, a: rk.linear_policy_loss(
            hidden,
            weight,
            labels,
            old,
            a,
            mask,
            clip_low=0.1 + s,
            dual_clip=2 + s,
            entropy_coef=0.1 + s,
            ref_logprobs=old,
            kl_coef=0.2 + s,
            bias=bias,
            temperature=0.7 + s,
            softcap=3 + s,
        )[0],
        ("ntd", "vd", "v"),
        ("nt", "nt"),
    ),
    "linear_cross_entropy": Op(
        lambda mask, labels, s, hidden, weight: rk.linear_cross_entropy(
            hidden, weight, labels, mask, logit_scale=1 + s, aggregate="seq-mean-token-mean", denominator=2 + s
        ),
        ("ntd", "vd"),
    ),
    "linear_kl": Op(
        lambda mask, labels, s, hidden, weight, bias, other, other_weight: rk.linear_kl(
            hidden,
            weight,
            other,
            other_weight,
            bias=bias,
            mask=mask,
            temperature=0.7 + s,
            softcap=3 + s,
            logit_scale=1 + s,
        ),
        ("ntd", "vd", "v"),
        ("ntd", "vd"),
    ),
    "linear_dpo_loss": Op(
        lambda mask, labels, s, chosen, rejected, weight, a, b: rk.linear_dpo_loss(
            chosen, rejected, weight, labels, labels, a, b, mask, None, beta=0.1 + s, temperature=0.7 + s
        )[0],
        ("ntd", "ntd", "vd"),
        ("n", "n"),
    ),
    "full_kl": Op(
        lambda mask, labels, s, x, y: tuple(
            rk.full_kl(x, y, direction=direction, mask=mask, temperature=0.7 + s)
            for direction in ("reverse", "forward", "jsd")
        ),
        ("ntv",),
        ("ntv",),
    ),
    "sample_tokens": Op(
        lambda mask, labels, s, x: rk.sample_tokens(
            x, mask=mask, temperature=0.7 + s, top_k=x.shape[1] - 1, top_p=0.6 + s, seed=70 + x.shape[0]
        ),
        (),
        ("ntv",),
    ),
    "gae": Op(lambda mask, labels, s, r, v: rk.gae(r, v, mask, gamma=0.9 - s, lam=0.8 + 0.1 * s), (), ("nt", "nt")),
    "gae_packed": Op(
        lambda mask, labels, s, r, v: rk.gae(
            *(x.reshape(-1) for x in (r, v, mask)),
            gamma=0.9 - s,
            cu_seqlens=torch.arange(0, r.numel() + 1, r.shape[1], device=r.device),
        ),
        (),
        ("nt", "nt"),
    ),
    "ppo_advantages": Op(
        lambda mask, labels, s, lp, ref, r, v: rk.ppo_advantages(
            lp, ref, r, v, mask, kl_coef=s, gamma=1 - s, lam=0.5 + s
        ),
        (),
        ("nt", "nt", "n", "nt"),
    ),
    "per_token_kl": Op(lambda mask, labels, s, a, b: rk.per_token_kl(a + s, b, estimator="k3"), ("nt", "nt")),
    "shaped_rewards": Op(
        lambda mask, labels, s, a, b: rk.shaped_rewards(a, b, mask, kl_coef=0.1 + s, clip=1 + s), (), ("n", "nt")
    ),
    "whiten": Op(lambda mask, labels, s, x: rk.whiten(x, mask, eps=1e-3 + s), ("nt",)),
    "policy_loss": Op(
        lambda mask, labels, s, x, old, a: rk.policy_loss(
            x, old, a, mask, clip_low=0.1 + s, clip_high=0.2 + s, dual_clip=2 + s
        )[0],
        ("nt",),
        ("nt", "nt"),
    ),
    "value_loss": Op(
        lambda mask, labels, s, v, old, r: rk.value_loss(v, old, r, mask, clip=0.1 + s)[0], ("nt",), ("nt", "nt")
    ),
    "dpo_loss": Op(
        lambda mask, labels, s, a, b, c, d: rk.dpo_loss(
            a, b, c, d, beta=0.1 + s, label_smoothing=s, label=0.8, reduction="none"
        ),
        ("n", "n"),
        ("n", "n"),
    ),
    "group_advantages": Op(
        lambda mask, labels, s, x: rk.group_advantages(x, labels.select(1, 0), eps=0.1 + s), (), ("n",)
    ),
    "pairwise_loss": Op(lambda mask, labels, s, a, b: rk.pairwise_loss(a, b, margin=0.1 + s, label=0.8), ("n", "n")),
}
READS_LABELS = (
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_logprobs",
    "linear_logprobs_frozen",
    "linear_policy_loss",
    "selected_logprobs",
)  # under RLHF_KERNELS_CHECK=1
WITH_KERNEL = (
    "full_kl",
    "gae",
    "gae_packed",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_kl",
    "linear_logprobs",
    "linear_logprobs_frozen",
    "linear_policy_loss",
    "per_token_kl",
    "policy_loss",
    "ppo_advantages",
    "sample_tokens",
    "selected_logprobs",
    "shaped_rewards",
    "value_loss",
    "whiten",
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_of(op: str, n: int, t: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """mask, labels, and the op's tensors, the differentiable ones as leaves."""
    sizes = {"n": n, "t": t, "v": V, "d": D}
    tensors = []
    for seed, (shape, is_leaf) in enumerate(
        [(shape, True) for shape in OPS[op].leaves] + [(shape, False) for shape in OPS[op].constants]
    ):
        x = normal(*(sizes[letter] for letter in shape), seed=seed, dtype=dtype).to(device)
        tensors.append(x.requires_grad_(is_leaf))
    mask = edge_cases.MASKS["holes"](torch.Size((n, t))).to(device)
    return mask, edge_cases.labels_for((n, t), V).to(device), tensors


def outputs_of(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def with_gradients(call: Callable, s: float, mask: Tensor, labels: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    outputs = outputs_of(call(mask, labels, s, *tensors))
    leaves = [x for x in tensors if x.requires_grad]
    if leaves:
        outputs += torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
    return [y.detach() for y in outputs]
