"""Forms that arguments may take: numbers as 0-d tensors, infinite clips, one value a sequence, options of peers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import linear_truth, truth
from support.backends import Backend
from support.checks.linear import head
from support.op_calls import normal
from torch import Tensor
from torch.nn.functional import cross_entropy

import rlhf_kernels as rk

X, Y, Z = (normal(3, 5, seed=seed) for seed in range(3))
MASK = torch.ones(3, 5, dtype=torch.bool)
# Every option that is a number, with a legal value.
SCALARS: dict[str, tuple[Callable[..., object], float]] = {
    "policy_loss clip_low": (lambda v: rk.policy_loss(X, Y, Z, clip_low=v)[0], 0.1),
    "policy_loss clip_high": (lambda v: rk.policy_loss(X, Y, Z, clip_high=v)[0], 0.3),
    "policy_loss dual_clip": (lambda v: rk.policy_loss(X, Y, Z, dual_clip=v)[0], 1.5),
    "value_loss clip": (lambda v: rk.value_loss(X, Y, Z, clip=v)[0], 0.3),
    "gae gamma": (lambda v: rk.gae(X, Y, gamma=v)[0], 0.9),
    "gae lam": (lambda v: rk.gae(X, Y, lam=v)[0], 0.8),
    "ppo_advantages kl_coef": (lambda v: rk.ppo_advantages(X, Y, X[:, 0], Z, MASK, kl_coef=v)[0], 0.1),
    "ppo_advantages gamma": (lambda v: rk.ppo_advantages(X, Y, X[:, 0], Z, MASK, kl_coef=0.1, gamma=v)[0], 0.9),
    "ppo_advantages lam": (lambda v: rk.ppo_advantages(X, Y, X[:, 0], Z, MASK, kl_coef=0.1, lam=v)[0], 0.9),
    "shaped_rewards kl_coef": (lambda v: rk.shaped_rewards(X[:, 0], Y, MASK, kl_coef=v), 0.1),
    "shaped_rewards clip": (lambda v: rk.shaped_rewards(X[:, 0], Y, MASK, kl_coef=0.1, clip=v), 0.5),
    "whiten eps": (lambda v: rk.whiten(X, eps=v), 1e-3),
    "per_token_kl cap": (lambda v: rk.per_token_kl(X, Y, cap=v), 0.4),
    "dpo_loss beta": (lambda v: rk.dpo_loss(X[0], Y[0], Z[0], X[1], beta=v)[0], 0.3),
    "dpo_loss label_smoothing": (lambda v: rk.dpo_loss(X[0], Y[0], Z[0], X[1], label_smoothing=v)[0], 0.2),
    "group_advantages eps": (lambda v: rk.group_advantages(X[:, 0], 3, eps=v), 0.1),
    "selected_logprobs temperature": (lambda v: rk.selected_logprobs(X, MASK[:, 0].long(), temperature=v), 0.7),
    "full_kl temperature": (lambda v: rk.full_kl(X, Y, temperature=v), 0.7),
    "linear_logprobs softcap": (lambda v: rk.linear_logprobs(X, Y, MASK[:, 0].long(), softcap=v), 2.0),
    "linear_logprobs logit_scale": (lambda v: rk.linear_logprobs(X, Y, MASK[:, 0].long(), logit_scale=v), 0.5),
    "linear_cross_entropy z_loss": (lambda v: rk.linear_cross_entropy(X, Y, MASK[:, 0].long(), z_loss=v), 0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SCALARS)
def test_numbers_may_be_0d_tensors(name: str, dtype: torch.dtype) -> None:
    call, value = SCALARS[name]
    tensor = torch.tensor(value, dtype=dtype)
    found, expected = call(tensor), call(tensor.item())
    if "temperature" in name:  # a temperature that is a tensor is one of each row, in float32
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)  # type: ignore[arg-type]
    assert not torch.equal(found, call(1.25 * value if value < 0.8 else 0.5 + value / 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in SCALARS if "temperature" not in name])
def test_tensors_that_are_no_number_are_refused(name: str) -> None:
    call, value = SCALARS[name]
    op, argument = name.split()
    for tensor, message in (
        (torch.full((3,), value), rf"{op}: {argument} is a tensor \[3\]"),
        (torch.tensor(value, requires_grad=True), f"{op}: {argument} requires grad"),
        (torch.tensor(True), f"{op}: {argument} is a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            call(tensor)


def test_infinite_clips_are_none(backend: Backend) -> None:
    new, old, advantages = (x.to(backend.device) for x in (3 * X, Y, Z))
    rho = (new - old).double().exp()
    loss, stats = rk.policy_loss(new, old, advantages, clip_low=math.inf, clip_high=math.inf, dual_clip=math.inf)
    assert loss.item() == pytest.approx(-(rho * advantages.double()).mean().item(), rel=1e-5)
    assert stats["clip_fraction_low"] == stats["clip_fraction_high"] == 0
    found, expected = (rk.value_loss(new, old, advantages, clip=clip)[0] for clip in (math.inf, None))
    assert torch.equal(found, expected)
    half, _ = rk.policy_loss(new, old, advantages, clip_high=math.inf)
    term = torch.minimum(rho * advantages, rho.clamp(min=0.8) * advantages)
    assert half.item() == pytest.approx(-term.mean().item(), rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_capped_kl(backend: Backend, estimator: str) -> None:
    """Bounded in value and in gradient, as verl and OpenRLHF do."""
    logprobs = (4 * X).to(backend.device).requires_grad_()
    plain = rk.per_token_kl(logprobs, Y.to(backend.device), estimator=estimator)
    capped = rk.per_token_kl(logprobs, Y.to(backend.device), estimator=estimator, cap=1.5)
    assert torch.equal(capped, plain.clamp(-1.5, 1.5))
    (slope,), (whole,) = (torch.autograd.grad(x.sum(), logprobs) for x in (capped, plain))
    beyond = plain.detach().abs() > 1.5
    assert beyond.any()
    assert not beyond.all()
    assert torch.equal(slope, torch.where(beyond, 0.0, whole))


@pytest.mark.parametrize("dim", [None, -1, 0, (0, 1)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_whiten_over_dimensions(backend: Backend, dim: int | tuple[int, ...] | None, unbiased: bool) -> None:
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    found = rk.whiten(X.to(backend.device), mask.to(backend.device), dim=dim, unbiased=unbiased, eps=1e-6).cpu()
    dims = (0, 1) if dim is None else dim
    x, count = X.double(), mask.double().sum(dims, keepdim=True)
    mean = (x * mask).sum(dims, keepdim=True) / count
    squares = ((x - mean).square() * mask).sum(dims, keepdim=True)
    variance = squares / (count - 1 if unbiased else count).clamp(min=1)
    expected = torch.where(mask, (x - mean) / (variance + 1e-6).sqrt(), 0.0)
    torch.testing.assert_close(found, expected.float())


def test_whiten_refuses_dimensions_that_are_none() -> None:
    for dim in (2, (0, 0), (0, -2)):
        with pytest.raises(ValueError, match="whiten: dim is"):
            rk.whiten(X, dim=dim)


@pytest.mark.parametrize("op", ["selected_logprobs", "linear_logprobs"])
def test_detached_entropy(backend: Backend, op: str) -> None:
    x, weight = (t.to(backend.device) for t in (X.clone(), Y))
    x.requires_grad_()
    labels = torch.tensor([0, 1, 2], device=backend.device)
    call = rk.selected_logprobs if op == "selected_logprobs" else rk.linear_logprobs
    arguments = (x, labels) if op == "selected_logprobs" else (x, weight, labels)
    plain, entropy = call(*arguments, with_entropy=True)
    logprobs, detached = call(*arguments, with_entropy="detached")
    assert torch.equal(detached, entropy.detach())
    assert not detached.requires_grad
    (found,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (logprobs, plain))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=f"{op}: with_entropy is 'yes'"):
        call(*arguments, with_entropy="yes")


def test_nested_tensors_are_refused_with_the_way_out() -> None:
    nested = torch.nested.nested_tensor([X[0], Y[0, :3]], layout=torch.jagged)
    for call in (
        lambda: rk.whiten(nested),
        lambda: rk.gae(nested, nested),
        lambda: rk.policy_loss(nested, nested, nested),
        lambda: rk.per_token_kl(nested, nested),
    ):
        with pytest.raises(TypeError, match=r"is a nested tensor; it takes .*to_padded_tensor.*cu_seqlens"):
            call()


def _cross_entropy_truth(case: linear_truth.Case, z_loss: float, **options: object) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    z = (leaves[0] @ leaves[1].T + leaves[2]) * case.logit_scale / case.temperature
    loss = cross_entropy(z, case.labels.long(), **options)
    kept = case.labels != options.get("ignore_index", -100)
    loss = loss + z_loss * z.logsumexp(-1)[kept].square().sum() / kept.sum()
    return [loss, *torch.autograd.grad(loss, leaves)]


CROSS_ENTROPY = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.3, "z_loss": 0.1}]


@pytest.mark.parametrize("options", CROSS_ENTROPY, ids=str)
def test_cross_entropy_as_users_of_torch_expect(backend: Backend, options: dict[str, float]) -> None:
    case = head(9, 16, 60)._replace(logit_scale=0.5, temperature=0.7)
    labels = case.labels.clone()
    labels[2], labels[7] = -100, -100
    case = case._replace(labels=labels)
    leaves = [x.to(backend.device).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = rk.linear_cross_entropy(
        leaves[0], leaves[1], labels.to(backend.device), bias=leaves[2], logit_scale=0.5, temperature=0.7, **options
    )
    smoothing = options.get("label_smoothing", 0.0)
    expected = _cross_entropy_truth(case, options.get("z_loss", 0.0), label_smoothing=smoothing)
    found = [loss, *torch.autograd.grad(loss, leaves)]
    for got, want in zip(found, expected, strict=True):
        truth.assert_accurate(got.detach().cpu(), want.detach(), 2e-6 * max(1.0, want.abs().max().item()))
    assert (found[1][[2, 7]] == 0).all()


def test_other_ignored_labels_and_all_ignored(backend: Backend) -> None:
    case = head(4, 8, 20)
    hidden, weight = case.hidden.to(backend.device).requires_grad_(), case.weight.to(backend.device)
    labels = torch.tensor([3, 19, 3, 5], device=backend.device)
    kept = labels != 3
    found = rk.linear_cross_entropy(hidden, weight, labels, ignore_index=3)
    expected = rk.linear_cross_entropy(hidden, weight, labels, kept)
    assert torch.equal(found, expected)
    mask = torch.tensor([1, 0, 1, 1], device=backend.device)
    assert torch.equal(
        rk.linear_cross_entropy(hidden, weight, labels, mask, ignore_index=3),
        rk.linear_cross_entropy(hidden, weight, labels, kept & mask.bool()),
    )
    nothing = rk.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), label_smoothing=0.1)
    assert nothing == 0
    assert (torch.autograd.grad(nothing, hidden)[0] == 0).all()


def test_elsewhere_an_ignored_label_says_what_to_do() -> None:
    labels = torch.tensor([1, -100, 2])
    for call in (lambda: rk.linear_logprobs(X, Y, labels), lambda: rk.selected_logprobs(X, labels)):
        with pytest.raises(IndexError, match=r"label -100 at row 1 .*mask=labels != -100"):
            call()
    for options, message in (
        ({"softcap": 3.0, "label_smoothing": 0.1}, "softcap is given; with label_smoothing"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
    ):
        with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
            rk.linear_cross_entropy(X, Y, labels, **options)
