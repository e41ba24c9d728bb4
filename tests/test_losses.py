"""policy_loss and value_loss against their formulas, written token by token."""

from __future__ import annotations

import math

import pytest
import torch
from support import edge_cases
from support.backends import Backend
from torch import Tensor

import rlhf_kernels as rk

NAN = float("nan")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _policy_terms(new: float, old: float, advantage: float, options: dict) -> float:
    """The loss of one token, from the formula."""
    rho = math.exp(min(max(new - old, -20.0), 20.0))
    bounded = min(max(rho, 1 - options.get("clip_low", 0.2)), 1 + options.get("clip_high", 0.2))
    loss = -min(rho * advantage, bounded * advantage)
    if options.get("dual_clip") is not None and advantage < 0:
        loss = min(loss, -options["dual_clip"] * advantage)
    return loss


def _aggregate(losses: list[list[float]], mode: str, denominator: float | None) -> float:
    """losses: those of the counted tokens, sequence by sequence."""
    total, tokens = sum(map(math.fsum, losses)), sum(map(len, losses))
    if mode == "token-mean":
        return total / (denominator or max(tokens, 1))
    if mode == "token-sum":
        return total
    if mode == "constant":
        return total / denominator
    if mode == "seq-mean-token-mean":
        total = sum(math.fsum(sequence) / max(len(sequence), 1) for sequence in losses)
    return total / (denominator or max(len(losses), 1))


def _policy_case(mask: Tensor | None, B: int = 4, T: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    old = -_normal(B, T).abs()
    return (old + 0.5 * _normal(B, T, seed=1), old, _normal(B, T, seed=2))


def _counted(x: Tensor, mask: Tensor | None) -> list[list[float]]:
    rows = x.double().tolist()
    keep = [[True] * x.shape[1]] * x.shape[0] if mask is None else mask.tolist()
    return [[v for v, k in zip(row, kept, strict=True) if k] for row, kept in zip(rows, keep, strict=True)]


MODES = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
@pytest.mark.parametrize("options", [{}, {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.5}], ids=["ppo", "dual"])
def test_policy_loss_is_the_formula(kind: str, mode: str, options: dict) -> None:
    new, old, advantages = _policy_case(None)
    mask = edge_cases.MASKS[kind](new.shape)
    denominator = 11.0 if mode == "constant" else None
    hidden = edge_cases.hide(mask, new, old, advantages)
    new_leaf = hidden[0].requires_grad_()
    loss, _ = rk.policy_loss(new_leaf, *hidden[1:], mask, aggregate=mode, denominator=denominator, **options)
    rows = [_counted(x, mask) for x in (new, old, advantages)]
    terms = [[_policy_terms(*token, options) for token in zip(*row, strict=True)] for row in zip(*rows, strict=True)]
    assert loss.item() == pytest.approx(_aggregate(terms, mode, denominator), rel=1e-5, abs=1e-7)

    (grad,) = torch.autograd.grad(loss, new_leaf)
    assert grad.isfinite().all()
    if mask is not None:
        assert (grad[~mask] == 0).all()
    exact = new.double().requires_grad_()
    clean = [x.double() for x in (old, advantages)]
    again, _ = rk.policy_loss(exact, *clean, mask, aggregate=mode, denominator=denominator, **options)
    (expected,) = torch.autograd.grad(again, exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-8)


def test_policy_loss_sequence_ratio() -> None:
    new, old, advantages = _policy_case(None)
    mask = edge_cases.MASKS["holes"](new.shape)
    hidden = edge_cases.hide(mask, new, old, advantages)
    loss, stats = rk.policy_loss(*hidden, mask, ratio="sequence", aggregate="seq-mean-token-mean", clip_low=0.05)
    sequences = list(zip(*(_counted(x, mask) for x in (new, old, advantages)), strict=True))
    terms, ratios = [], []
    for n, o, a in sequences:
        mean = (math.fsum(n) - math.fsum(o)) / max(len(n), 1)
        ratios += [math.exp(mean)] * len(n)
        terms.append([_policy_terms(mean, 0.0, advantage, {"clip_low": 0.05}) for advantage in a])
    assert loss.item() == pytest.approx(_aggregate(terms, "seq-mean-token-mean", None), rel=1e-5)
    assert stats["ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)


def test_policy_loss_gspo_token(backend: Backend) -> None:
    """Values of the sequence's ratio; a token's gradient is its own advantage's, not its sequence's mean."""
    new, old, advantages = (x.to(backend.device) for x in _policy_case(None))
    found = {}
    for ratio in ("sequence", "sequence-token"):
        leaf = new.clone().requires_grad_()
        loss, stats = rk.policy_loss(leaf, old, advantages, ratio=ratio, aggregate="seq-mean-token-mean", clip_low=0.05)
        found[ratio] = loss, stats, *torch.autograd.grad(loss, leaf)
    assert torch.equal(found["sequence"][0], found["sequence-token"][0])
    assert found["sequence"][1] == found["sequence-token"][1]
    # The paper's objective, by autograd: s_i as a constant times pi / sg[pi].
    leaf = new.double().requires_grad_()
    s = (leaf - old.double()).mean(-1, keepdim=True).exp().detach() * (leaf - leaf.detach()).exp()
    a = advantages.double()
    loss = -torch.minimum(s * a, s.clamp(0.95, 1.2) * a).mean(-1).mean()
    (expected,) = torch.autograd.grad(loss, leaf)
    assert found["sequence-token"][0].item() == pytest.approx(loss.item(), rel=1e-5)
    largest = expected.abs().max()
    torch.testing.assert_close(found["sequence-token"][2].double() / largest, expected / largest)
    assert (found["sequence"][2].double() - expected).abs().max() > 0.1 * largest


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_policy_loss_of_one_advantage_a_sequence(backend: Backend, shape: tuple[int, ...]) -> None:
    new, old, _ = (x.to(backend.device) for x in _policy_case(None))
    new.requires_grad_()
    advantages, weights = (_normal(*shape, seed=seed).to(backend.device) for seed in (8, 9))
    found, expected = (
        rk.policy_loss(new, old, advantages.view(view), importance_weights=weights.view(view).expand(size))
        for view, size in ((shape, shape), ((4, 1), new.shape))
    )
    whole = rk.policy_loss(
        new, old, advantages.view(4, 1).expand(new.shape), importance_weights=weights.view(4, 1).expand(new.shape)
    )
    for loss, stats in (found, expected):
        assert torch.equal(loss, whole[0])
        assert stats == whole[1]
        assert torch.equal(*(torch.autograd.grad(x, new, retain_graph=True)[0] for x in (loss, whole[0])))
    with pytest.raises(ValueError, match="advantages has shape"):
        rk.policy_loss(new, old, advantages.view(-1)[:3])


def test_policy_loss_importance_weights_and_detached_inputs() -> None:
    new, old, advantages = (x.requires_grad_() for x in _policy_case(None))
    weights = _normal(4, 7, seed=5).abs().requires_grad_()
    loss, _ = rk.policy_loss(new, old, advantages, importance_weights=weights, aggregate="token-sum")
    terms = [
        _policy_terms(*token, {}) * w
        for *token, w in zip(
            *(x.detach().double().flatten().tolist() for x in (new, old, advantages, weights)), strict=True
        )
    ]
    assert loss.item() == pytest.approx(math.fsum(terms), rel=1e-5)
    loss.backward()
    assert new.grad is not None
    assert old.grad is advantages.grad is weights.grad is None


def test_policy_loss_statistics() -> None:
    old = torch.zeros(1, 6)
    new = torch.tensor([0.5, 1.5, 0.9, 3.0, 1.0, 9.0]).log().unsqueeze(0)
    advantages = torch.tensor([[-1.0, 1.0, -1.0, -1.0, 0.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    _, stats = rk.policy_loss(new, old, advantages, mask, dual_clip=2.0)
    ratios = [0.5, 1.5, 0.9, 3.0, 1.0]
    expected = {
        "approx_kl": sum(r - 1 - math.log(r) for r in ratios) / 5,
        "clip_fraction_low": 1 / 5,
        "clip_fraction_high": 1 / 5,
        "clip_fraction_dual": 1 / 5,
        "ratio_mean": sum(ratios) / 5,
        "ratio_max": 3.0,
    }
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        assert stats[name].dtype == torch.float32
        assert not stats[name].requires_grad
        assert stats[name].item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("log_ratio", [119.0, -119.0, 1e4, -1e4])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss_of_extreme_ratios_is_finite(log_ratio: float, advantage: float, dual_clip: float | None) -> None:
    new = torch.full((2, 3), log_ratio, requires_grad=True)
    loss, stats = rk.policy_loss(new, torch.zeros(2, 3), torch.full((2, 3), advantage), dual_clip=dual_clip)
    (grad,) = torch.autograd.grad(loss, new)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert all(value.isfinite() for value in stats.values())
    if advantage == 0:
        assert loss.item() == 0
        assert (grad == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0)])
def test_losses_of_nothing_are_zero(mode: str, shape: tuple[int, int]) -> None:
    denominator = 2.0 if mode == "constant" else None
    nan = torch.full(shape, NAN)
    mask = torch.zeros(shape, dtype=torch.bool)
    for make in (
        lambda x: rk.policy_loss(x, nan, nan, mask, aggregate=mode, denominator=denominator),
        lambda x: rk.policy_loss(x, nan, nan, mask, aggregate=mode, denominator=denominator, ratio="sequence"),
        lambda x: rk.value_loss(x, nan, nan, mask, aggregate=mode, denominator=denominator),
    ):
        x = nan.clone().requires_grad_()
        loss, stats = make(x)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0
        assert grad.shape == shape
        assert (grad == 0).all()
        assert all(value.item() == 0 for value in stats.values())


@pytest.mark.parametrize(
    ("mode", "whole"),
    [
        ("token-mean", "tokens"),
        ("seq-mean-token-mean", "sequences"),
        ("seq-mean-token-sum", "sequences"),
        ("constant", 40.0),
    ],
)
def test_micro_batches_add_up_to_the_batch(mode: str, whole: str | float) -> None:
    """Rows of very different lengths: means of micro-batch means would weight their tokens differently."""
    new, old, advantages = _policy_case(None, B=6, T=10)
    values, old_values, returns = (_normal(6, 10, seed=s) for s in (11, 12, 13))
    mask = torch.arange(10) < torch.tensor([1, 10, 3, 7, 0, 10]).unsqueeze(1)
    denominator = {"tokens": float(mask.sum()), "sequences": 6.0}.get(whole, whole)
    for loss_of in (
        lambda rows: rk.policy_loss(
            new[rows], old[rows], advantages[rows], mask[rows], aggregate=mode, denominator=denominator
        )[0],
        lambda rows: rk.value_loss(
            values[rows],
            old_values[rows],
            returns[rows],
            mask[rows],
            aggregate=mode,
            denominator=torch.tensor(denominator),
        )[0],
    ):
        parts = sum(loss_of(rows) for rows in (slice(0, 1), slice(1, 4), slice(4, 6)))
        torch.testing.assert_close(parts, loss_of(slice(None)), rtol=1e-6, atol=0)
    full, _ = rk.policy_loss(
        new, old, advantages, mask, aggregate=mode, denominator=40.0 if mode == "constant" else None
    )
    torch.testing.assert_close(
        full, rk.policy_loss(new, old, advantages, mask, aggregate=mode, denominator=denominator)[0]
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_is_the_formula(kind: str, mode: str, clip: float | None) -> None:
    values, old, returns = (_normal(4, 7, seed=s) for s in (1, 2, 3))
    mask = edge_cases.MASKS[kind](values.shape)
    denominator = 11.0 if mode == "constant" else None
    hidden = edge_cases.hide(mask, values, old, returns)
    leaf = hidden[0].requires_grad_()
    loss, stats = rk.value_loss(leaf, *hidden[1:], mask, clip=clip, aggregate=mode, denominator=denominator)

    def term(v: float, o: float, r: float) -> tuple[float, bool]:
        moved = o + min(max(v - o, -(clip or 0)), clip or 0)
        plain, clipped = (v - r) ** 2, (moved - r) ** 2
        return (0.5 * plain, False) if clip is None else (0.5 * max(plain, clipped), clipped > plain)

    rows = [_counted(x, mask) for x in (values, old, returns)]
    terms = [[term(*token) for token in zip(*row, strict=True)] for row in zip(*rows, strict=True)]
    expected = _aggregate([[t[0] for t in row] for row in terms], mode, denominator)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    flags = [t[1] for row in terms for t in row]
    assert stats["clip_fraction"].item() == pytest.approx(sum(flags) / max(len(flags), 1), rel=1e-6)

    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.isfinite().all()
    if mask is not None:
        assert (grad[~mask] == 0).all()


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    for values, expected in ((returns, 1.0), (returns + 5, 1.0), (torch.zeros(1, 4), 0.0), (-returns, -3.0)):
        _, stats = rk.value_loss(values, None, returns, clip=None)
        assert stats["explained_variance"].item() == pytest.approx(expected, abs=1e-6)
    _, stats = rk.value_loss(torch.ones(1, 4), None, torch.ones(1, 4), clip=None)
    assert stats["explained_variance"].item() == 0
