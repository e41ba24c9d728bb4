"""A head with a low-rank addition equals the head with the product merged into its weight, which is never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import Backend
from support.checks.linear import head
from support.checks.linear_lora import NORMAL, Adapters, D, N, V, adapters, check_errors_beside_peft
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch


def merged(weight: Tensor, lora: Adapters | None) -> Tensor:
    for a, b, scale in lora or []:
        weight = weight + scale * b @ a
    return weight


SEQUENCES = (2, N // 2)
MASK = torch.arange(N) % 3 != 1
LABELS = (torch.arange(N) * 7) % V


def policy(hidden: Tensor, weight: Tensor, ratio: str = "token", **options: Any) -> Tensor:
    rest = (x.view(SEQUENCES).to(hidden.device) for x in (LABELS, NORMAL[0] - 5, NORMAL[1], MASK))
    options |= {"clip_low": 9.0, "clip_high": 99.0, "entropy_coef": 0.1, "ratio": ratio}
    return rk.linear_policy_loss(hidden.view(*SEQUENCES, D), weight, *rest, **options)[0]


def dpo(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    sides = [x.view(2, N // 4, *x.shape[1:]).to(hidden.device) for x in (*hidden.split(N // 2), *LABELS.split(N // 2))]
    ref = torch.tensor([-9.0, -8.0], dtype=hidden.dtype, device=hidden.device)
    return rk.linear_dpo_loss(sides[0], sides[1], weight, sides[2], sides[3], ref, ref + 1, **options)[0]


def logprobs(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    mask, labels, g = (x.to(hidden.device) for x in (MASK, LABELS, NORMAL))
    values, entropy = rk.linear_logprobs(hidden, weight, labels, mask=mask, with_entropy=True, **options)
    return (values * g[0] + entropy * g[1]).sum()


def kl(hidden: Tensor, weight: Tensor, direction: str = "reverse", **options: Any) -> Tensor:
    """The reference has adapters of its own, which are constants."""
    other = head(N, 12, V, seed=1)
    merge = "lora" not in options
    low = adapters(width=12)
    ref_hidden, ref_weight = (
        x.to(hidden) for x in (other.hidden, merged(other.weight, low) if merge else other.weight)
    )
    if not merge:
        options["ref_lora"] = [(a.to(hidden), b.to(hidden), scale) for a, b, scale in low]
    mask, g = MASK.to(hidden.device), NORMAL[0].to(hidden.device)
    return (rk.linear_kl(hidden, weight, ref_hidden, ref_weight, mask=mask, direction=direction, **options) * g).sum()


def cross_entropy(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return rk.linear_cross_entropy(hidden, weight, LABELS.to(hidden.device), MASK.to(hidden.device), **options)


CALLS: dict[str, Callable[..., Tensor]] = {
    "logprobs": logprobs,
    "policy": policy,
    "policy, sequences": lambda *args, **options: policy(*args, ratio="sequence", **options),
    "cross entropy": cross_entropy,
    "dpo": dpo,
    "kl reverse": kl,
    "kl jsd": lambda *args, **options: kl(*args, direction="jsd", **options),
}


@pytest.mark.parametrize("op", CALLS)
def test_equals_the_merged_weight(backend: Backend, op: str) -> None:
    """Loss and gradients of hidden, weight, bias and of both adapters' A and B, in one chunk and in many."""
    case, low = head(N, D, V), adapters()
    tensors = [case.hidden, case.weight, case.bias, *(x for a, b, _ in low for x in (a, b))]
    scales = [scale for *_, scale in low]
    wide = [x.double().requires_grad_() for x in tensors]
    pairs = [(*wide[3 + 2 * i : 5 + 2 * i], scale) for i, scale in enumerate(scales)]
    with rk.use_backend("reference"):
        exact = CALLS[op](wide[0], merged(wide[1], pairs), bias=wide[2])
    expected = [exact.detach(), *torch.autograd.grad(exact, wide)]
    for workspace in (1500, 64 << 20):
        leaves = [x.to(backend.device).detach().requires_grad_() for x in tensors]
        pairs = [(*leaves[3 + 2 * i : 5 + 2 * i], scale) for i, scale in enumerate(scales)]
        loss = CALLS[op](*leaves[:2], bias=leaves[2], lora=pairs, workspace=workspace)
        for got, want in zip([loss.detach(), *torch.autograd.grad(loss, leaves)], expected, strict=True):
            scale = want.abs().max()
            torch.testing.assert_close(got.cpu().double() / scale, want / scale, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("dtype", "of_adapter"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_errors_beside_peft(kernel_backend: Backend, dtype: torch.dtype, of_adapter: torch.dtype) -> None:
    check_errors_beside_peft(kernel_backend, dtype, of_adapter)


@pytest.mark.parametrize("op", ["logprobs", "policy", "cross entropy"])
def test_a_frozen_weight_costs_no_product_of_its_size(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, low = head(N, D, V), adapters()[:1]
    hidden, *pair = (x.requires_grad_() for x in (case.hidden, *low[0][:2]))
    shapes = []
    module = dispatch.backend_module("cpu")
    plain = module.fp32_product

    def noted(a: Tensor, b: Tensor, **options: Any) -> None:
        shapes.append((a.shape[0], b.shape[1]))
        plain(a, b, **options)

    monkeypatch.setattr(module, "fp32_product", noted)
    with rk.use_backend("cpu"):
        loss = CALLS[op](hidden, case.weight, lora=(*pair, 0.5))
        grads = torch.autograd.grad(loss, (hidden, *pair))
    assert [x.shape for x in grads] == [(N, D), (3, D), (V, 3)]
    assert (V, 3) in shapes
    assert (V, D) not in shapes


def test_batch_invariant_with_an_adapter(kernel_backend: Backend) -> None:
    case, low = head(9, 100, V, bias=False), adapters(width=100)
    hidden, weight, labels = (x.to(kernel_backend.device) for x in (case.hidden, case.weight, case.labels))
    lora = [(a.to(weight), b.to(weight), scale) for a, b, scale in low]

    def some(part: slice) -> Tensor:
        return rk.linear_logprobs(hidden[part], weight, labels[part], lora=lora, batch_invariant=True)

    whole = some(slice(None))
    for part in (slice(0, 1), slice(3, 4), slice(2, 8)):
        assert torch.equal(some(part), whole[part])


def test_errors_name_the_argument() -> None:
    hidden, weight, labels = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
    a, b = torch.zeros(2, 3), torch.zeros(5, 2)
    for message, error, lora in (
        ("lora is a Tensor", TypeError, a),
        ("lora is a tuple", TypeError, (a, b)),
        ("lora A is a float", TypeError, [(1.0, b, 1.0)]),
        ("lora A has shape", ValueError, (b, b, 1.0)),
        ("lora A has shape", ValueError, (a[:0], b[:, :0], 1.0)),
        ("lora B has shape", ValueError, (a, a, 1.0)),
        ("lora B is torch.int64", TypeError, (a, b.long(), 1.0)),
        ("lora scale is inf", ValueError, (a, b, float("inf"))),
    ):
        with pytest.raises(error, match=f"linear_logprobs: {message}"):
            rk.linear_logprobs(hidden, weight, labels, lora=lora)
