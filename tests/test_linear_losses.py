"""Losses from hidden states equal the logits path: values, gradients, statistics, skipped rows, upstream factors."""

from __future__ import annotations

import pytest
import torch
from support import edge_cases
from support.backends import Backend
from support.checks.linear import head
from support.checks.linear_losses import B, D, T, V, aggregated, call, check, exact, leaves_of, rollout
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_masks(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    if kind == "nothing":
        leaves = leaves_of(backend, rollout(dtype, kind))
        loss, stats = call(backend, rollout(dtype, kind), leaves)
        assert loss == 0
        assert all(x == 0 for x in stats.values())
        assert all((x == 0).all() for x in torch.autograd.grad(loss, leaves))
        return
    check(backend, rollout(dtype, kind))
    check(backend, rollout(dtype, kind), workspace=1500)


AGGREGATES = [
    {"aggregate": "token-mean"},
    {"aggregate": "token-mean", "denominator": 17.0},
    {"aggregate": "token-sum"},
    {"aggregate": "seq-mean-token-mean"},
    {"aggregate": "seq-mean-token-sum", "denominator": 5.0},
    {"aggregate": "constant", "denominator": 9.0},
]


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=str)
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence-token"])
def test_aggregates(backend: Backend, aggregate: dict, ratio: str) -> None:
    data = rollout()
    terms = {"entropy_coef": 0.05, "ref_logprobs": data.ref, "kl_coef": 0.1}
    check(backend, data, terms, ratio=ratio, **aggregate)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_estimators(backend: Backend, estimator: str) -> None:
    data = rollout()
    check(backend, data, {"ref_logprobs": data.ref, "kl_coef": 0.3, "kl_estimator": estimator}, workspace=1500)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_low": 0.05, "clip_high": 0.3},
        {"dual_clip": 1.05},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"temperature": 0.8},
    ],
    ids=str,
)
def test_clips_and_temperature(backend: Backend, options: dict) -> None:
    check(backend, rollout(), {"entropy_coef": 0.02}, workspace=1500, **options)
    check(backend, rollout(), **options)


def test_softcap_and_scale(backend: Backend) -> None:
    for workspace in (3000, 64 << 20):
        check(backend, rollout(softcap=5.0, logit_scale=0.8), {"entropy_coef": 0.1}, workspace=workspace)


def test_importance_weights(backend: Backend) -> None:
    data = rollout()
    leaves = leaves_of(backend, data)
    loss, _ = call(backend, data, leaves, importance_weights=data.importance, entropy_coef=0.1)
    expected, _, grads = exact(data, {"entropy_coef": 0.1}, importance_weights=data.importance.double())
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=2e-5, atol=2e-5)
    for got, want in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=2e-5)


def test_log_ratio_of_119(backend: Backend) -> None:
    """Beyond the clamp the loss is finite and the gradient 0, whatever the advantage."""
    for shift in (119.0, -119.0):
        for advantage in (1.0, 0.0, -1.0):
            data = rollout(kind="none")
            data.old = data.old + shift
            data.advantages = torch.full((B, T), advantage)
            leaves = leaves_of(backend, data)
            loss, stats = call(backend, data, leaves)
            grads = torch.autograd.grad(loss, leaves)
            assert all(x.isfinite().all() for x in (loss, *stats.values()))
            assert all((x == 0).all() for x in grads)


def test_rows_without_gradient_skip_the_backward_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantage 0 in all but two rows: the products that form gradients see two rows."""
    data = rollout(kind="none")
    data.advantages = torch.zeros(B, T)
    data.advantages[0, 1], data.advantages[2, 3] = 1.0, -1.0
    shapes = []
    module = dispatch.backend_module("cpu")
    plain = module.fp32_product
    monkeypatch.setattr(
        module, "fp32_product", lambda a, b, **options: shapes.append((a.shape, b.shape)) or plain(a, b, **options)
    )
    backend = Backend("cpu", "cpu")
    leaves = leaves_of(backend, data)
    with rk.use_backend("cpu"):
        loss, _ = call(backend, data, leaves, clip_low=5.0, clip_high=5.0)
    monkeypatch.undo()
    assert sorted(tuple(map(tuple, pair)) for pair in shapes) == [
        ((2, V), (V, D)),
        ((B * T, D), (D, V)),
        ((V, 2), (2, D)),
    ]
    _, _, expected = exact(data, {}, clip_low=5.0, clip_high=5.0)
    for got, want in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
def test_upstream_gradient_and_backward_twice(backend: Backend, factor: float) -> None:
    data = rollout()
    leaves = leaves_of(backend, data)
    expected = torch.autograd.grad(call(backend, data, leaves)[0], leaves)
    loss, _ = call(backend, data, leaves)
    first = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
    second = torch.autograd.grad(loss * factor, leaves)
    for a, b, c in zip(first, second, expected, strict=True):
        torch.testing.assert_close(a, factor * c)
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_gradients_accumulate_over_micro_batches(backend: Backend) -> None:
    """Halves with the whole batch's denominator add up to the batch; .grad is not shared with anything saved."""
    data = rollout(kind="none")
    leaves = leaves_of(backend, data)
    call(backend, data, leaves, denominator=18.0)[0].backward(retain_graph=False)
    whole = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    for part in (slice(0, 1), slice(1, None)):
        piece = rollout(kind="none")
        for name in ("hidden", "labels", "old", "advantages"):
            setattr(piece, name, getattr(data, name)[part])
        half = leaves[0][part]
        call(backend, piece, [half, *leaves[1:]], denominator=18.0)[0].backward()
    for x, want in zip(leaves, whole, strict=True):
        torch.testing.assert_close(x.grad, want)


def test_nothing_is_formed_without_grad(kernel_backend: Backend) -> None:
    data = rollout()
    leaves = leaves_of(kernel_backend, data)
    with torch.no_grad():
        loss, _ = call(kernel_backend, data, leaves)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, call(kernel_backend, data, leaves)[0].detach())


def test_frozen_parts(kernel_backend: Backend) -> None:
    data = rollout()
    expected = torch.autograd.grad(call(kernel_backend, data, (full := leaves_of(kernel_backend, data)))[0], full)
    for i in range(3):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(full)]
        (grad,) = torch.autograd.grad(call(kernel_backend, data, leaves)[0], leaves[i])
        torch.testing.assert_close(grad, expected[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aggregate", AGGREGATES, ids=str)
def test_cross_entropy(backend: Backend, aggregate: dict, dtype: torch.dtype) -> None:
    data = rollout(dtype)
    leaves = leaves_of(backend, data)
    mask = data.mask.to(backend.device)
    for workspace in (0, 64 << 20):
        loss = rk.linear_cross_entropy(
            *leaves[:2], data.labels.to(backend.device), mask, bias=leaves[2], workspace=workspace, **aggregate
        )
        grads = torch.autograd.grad(loss, leaves)
        wide = leaves_of(Backend("reference", "cpu"), data, torch.float64)
        z = torch.where(data.mask.unsqueeze(-1), wide[0], 0.0) @ wide[1].T + wide[2]
        per_token = torch.nn.functional.cross_entropy(
            z.flatten(0, 1), torch.where(data.mask, data.labels, 0).flatten(), reduction="none"
        )
        expected = aggregated(per_token.view(B, T), data.mask, **aggregate)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(loss.cpu().double(), expected, rtol=tolerance, atol=tolerance)
        for got, want in zip(grads, torch.autograd.grad(expected, wide), strict=True):
            largest = want.abs().max()
            torch.testing.assert_close(got.cpu().double() / largest, want / largest, rtol=0, atol=tolerance)


def test_cross_entropy_of_an_empty_batch(backend: Backend) -> None:
    leaves = [torch.empty(0, 4, D, device=backend.device), torch.ones(V, D, device=backend.device)]
    leaves = [x.requires_grad_() for x in leaves]
    loss = rk.linear_cross_entropy(*leaves, torch.empty(0, 4, dtype=torch.int64, device=backend.device))
    assert loss == 0
    assert all((x == 0).all() for x in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("asked", [{}, {"label": 0.7, "reduction": "none"}], ids=["mean", "labels"])
def test_dpo(backend: Backend, kind: str, length_normalised: bool, asked: dict[str, object]) -> None:
    chosen, rejected = head(6, D, V), head(8, D, V, seed=1)
    masks = torch.tensor([[1, 1, 1], [0, 1, 1]]), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    leaves = [chosen.hidden.view(2, 3, D), rejected.hidden.view(2, 4, D), chosen.weight, chosen.bias]
    ref = torch.tensor([-5.0, -9.0]), torch.tensor([-8.0, -4.0])

    def loss_of(dtype: torch.dtype, device: str, direct: bool) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        c, r, w, b = (x.to(device, dtype).detach().requires_grad_() for x in leaves)
        labels = chosen.labels.view(2, 3).to(device), rejected.labels.view(2, 4).to(device)
        moved = [x.to(device) for x in masks]
        refs = [x.to(device, torch.float32 if direct else dtype) for x in ref]
        if direct:
            out = rk.linear_dpo_loss(
                c,
                r,
                w,
                *labels,
                *refs,
                *moved,
                kind=kind,
                length_normalised=length_normalised,
                bias=b,
                beta=0.2,
                **asked,
            )
        else:
            sums = []
            for h, label, mask in zip((c, r), labels, moved, strict=True):
                log_p = (h @ w.T + b).log_softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)
                total = (log_p * mask).sum(-1)
                sums.append(total / mask.sum(-1) if length_normalised else total)
            with rk.use_backend("reference"):
                out = rk.dpo_loss(*sums, *refs, kind=kind, beta=0.2, **asked)
        return out, list(torch.autograd.grad(out[0].sum(), (c, r, w, b)))

    got, grads = loss_of(torch.float32, backend.device, True)
    expected, expected_grads = loss_of(torch.float64, "cpu", False)
    for a, b in zip([*got, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument() -> None:
    hidden, weight, labels = torch.zeros(2, 4, 3), torch.zeros(5, 3), torch.zeros(2, 4, dtype=torch.int64)
    x = torch.zeros(2, 4)
    for message, error, arguments, options in (
        ("old_logprobs has shape", ValueError, (x[:1], x), {}),
        ("old_logprobs is a NoneType", TypeError, (None, x), {}),
        ("ref_logprobs has shape", ValueError, (x, x), {"ref_logprobs": x[:1]}),
        ("clip_low is -1", ValueError, (x, x), {"clip_low": -1}),
        ("dual_clip is 1", ValueError, (x, x), {"dual_clip": 1}),
        ("ratio is 'word'", ValueError, (x, x), {"ratio": "word"}),
        ("kl_estimator is 'k4'", ValueError, (x, x), {"kl_estimator": "k4"}),
        ("aggregate is 'sum'", ValueError, (x, x), {"aggregate": "sum"}),
        ("entropy_coef is inf", ValueError, (x, x), {"entropy_coef": float("inf")}),
    ):
        with pytest.raises(error, match=f"linear_policy_loss: {message}"):
            rk.linear_policy_loss(hidden, weight, labels, *arguments, **options)
    with pytest.raises(IndexError, match="linear_cross_entropy: label 5 at row 0"):
        rk.linear_cross_entropy(hidden, weight, labels + 5)
