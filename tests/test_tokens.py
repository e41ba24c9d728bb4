"""per_token_kl, shaped_rewards and whiten against plain formulas, written token by token."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import edge_cases
import pytest
import torch
import truth
from torch import Tensor

import rlhf_kernels as rk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # float64: tests/test_contract_torch.py, by gradcheck
ESTIMATORS = ["k1", "k2", "k3", "abs"]
NAN, INF = float("nan"), float("inf")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _kl(d: float, estimator: str) -> float:
    clamped = min(max(-d, -20.0), 20.0)
    return {"k1": d, "k2": d * d / 2, "k3": math.expm1(clamped) + d, "abs": abs(d)}[estimator]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_values_and_gradients(estimator: str, dtype: torch.dtype) -> None:
    logprobs, ref = (3 * _normal(200)).to(dtype), (3 * _normal(200, seed=1)).to(dtype)
    logprobs.requires_grad_()
    ref.requires_grad_()
    kl = rk.per_token_kl(logprobs, ref, estimator=estimator)
    assert kl.dtype == torch.float32

    def value(d: Tensor) -> Tensor:
        return {"k1": d, "k2": d**2 / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}[estimator]

    def slope(d: Tensor) -> Tensor:
        return {"k1": torch.ones_like(d), "k2": d, "k3": -torch.expm1(-d), "abs": d.sign()}[estimator]

    exact = logprobs.detach().double() - ref.detach().double()
    d = logprobs.detach().float() - ref.detach().float()
    expected = torch.tensor([_kl(x, estimator) for x in exact.tolist()], dtype=torch.float64)
    truth.assert_accurate(kl, expected, truth.max_error(value(d), expected))
    grad, ref_grad = torch.autograd.grad(kl.sum(), [logprobs, ref])
    assert grad.dtype == ref_grad.dtype == dtype
    plain_error = truth.max_error(slope(d).to(dtype), slope(exact))
    truth.assert_accurate(grad, slope(exact), plain_error)
    truth.assert_accurate(ref_grad, -slope(exact), plain_error)


def test_k3_near_zero_and_far_away() -> None:
    for d in (3e-4, -3e-4, 1e-6, 0.3, 0.5, 0.51):
        x = torch.tensor([d], requires_grad=True)
        kl = rk.per_token_kl(x, torch.zeros(1), estimator="k3")
        (grad,) = torch.autograd.grad(kl.sum(), x)
        exact = float(x.detach())
        assert kl.item() == pytest.approx(_k3(exact), rel=3e-7)
        assert grad.item() == pytest.approx(-math.expm1(-exact), rel=3e-7)
    assert rk.per_token_kl(torch.tensor([3e-4]), torch.zeros(1), estimator="k3").item() == pytest.approx(
        4.5e-8, rel=1e-3
    )


def _k3(d: float) -> float:
    return math.fsum((-d) ** k / math.factorial(k) for k in range(2, 30))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_of_finite_inputs_is_finite(estimator: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    points = torch.tensor([0.0, 19.9, 20.1, 100.0, 1e4, largest / 2, largest], dtype=dtype)
    for sign in (1, -1):
        logprobs = (sign * points).requires_grad_()
        kl = rk.per_token_kl(logprobs, torch.zeros_like(points), estimator=estimator)
        (grad,) = torch.autograd.grad(kl.sum(), logprobs)
        assert kl.isfinite().all()
        assert not grad.isnan().any()
        # k3's slope reaches exp(20): finite, but more than float16 can say.
        wide = logprobs.detach().float().requires_grad_()
        (slope,) = torch.autograd.grad(rk.per_token_kl(wide, torch.zeros(7), estimator=estimator).sum(), wide)
        assert slope.isfinite().all()
        assert grad[slope.abs() <= largest].isfinite().all()


def test_k3_clamps_the_exponent_only() -> None:
    x = torch.tensor([-100.0, 100.0], requires_grad=True)
    kl = rk.per_token_kl(x, torch.zeros(2), estimator="k3")
    (grad,) = torch.autograd.grad(kl.sum(), x)
    torch.testing.assert_close(kl.double(), torch.tensor([math.exp(20) - 101, 99 + math.exp(-20)], dtype=torch.float64))
    assert grad.tolist() == [1.0, 1.0]  # the linear term's; exp is flat there


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", [kind for kind in edge_cases.MASKS if kind != "none"])
def test_shaped_rewards(kind: str, clip: float | None) -> None:
    kl, scores = _normal(4, 9), 2 * _normal(4, seed=1)
    mask = edge_cases.MASKS[kind](kl.shape)
    (hidden,) = edge_cases.hide(mask, kl)
    rewards = rk.shaped_rewards(scores, hidden, mask, kl_coef=0.3, clip=clip)
    for b in range(4):
        places = [t for t in range(9) if mask[b, t]]
        for t in range(9):
            expected = -0.3 * float(kl[b, t]) if t in places else 0.0
            if places and t == places[-1]:
                score = float(scores[b])
                expected += score if clip is None else min(max(score, -clip), clip)
            assert rewards[b, t].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
            if t not in places:
                assert rewards[b, t].item() == 0.0


def test_a_score_of_nan_counts_only_where_its_sequence_does() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    rewards = rk.shaped_rewards(torch.tensor([1.0, NAN]), torch.zeros(2, 2), mask, kl_coef=0.1)
    assert rewards.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_shaped_rewards_of_nothing() -> None:
    for shape in ((0, 4), (3, 0)):
        mask = torch.ones(shape, dtype=torch.bool)
        assert rk.shaped_rewards(torch.ones(shape[0]), torch.ones(shape), mask, kl_coef=0.1).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_whiten(kind: str, shift_mean: bool, dtype: torch.dtype) -> None:
    x = (3 * _normal(5, 11) + 7).to(dtype)
    mask = edge_cases.MASKS[kind](x.shape)
    (hidden,) = edge_cases.hide(mask, x)
    got = rk.whiten(hidden, mask, shift_mean=shift_mean)
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    assert (got[~counted] == 0).all()
    kept = x[counted].double()
    if kept.numel():
        scale = (kept.var(correction=0) + 1e-8).rsqrt()
        expected = (kept - kept.mean()) * scale + (0 if shift_mean else kept.mean())
        wide = kept.to(got.dtype)
        plain = (wide - wide.mean()) * (wide.var(correction=0) + 1e-8).rsqrt() + (0 if shift_mean else wide.mean())
        truth.assert_accurate(got[counted], expected, truth.max_error(plain, expected))


def test_whiten_of_one_value_or_of_equal_ones_is_finite() -> None:
    for x in (torch.tensor([5.0]), torch.full((3, 4), 1e4), torch.empty(0), torch.empty(0, 3)):
        assert (rk.whiten(x) == 0).all()
        assert torch.equal(rk.whiten(x, shift_mean=False), x)


def test_whiten_over_ranks_equals_one_process(tmp_path: Path) -> None:
    """Two processes with batches of different size, one of them with nothing counted, against the whole batch."""
    program = """
import sys, torch, rlhf_kernels as rk
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
x = torch.arange(30.0).view(10, 3).sin()
mask = torch.arange(30).view(10, 3) % 4 > 0
mask[7:] = False
part = [slice(0, 2), slice(2, 7), slice(7, 10)][rank]
for shift_mean in (True, False):
    got = rk.whiten(x[part], mask[part], shift_mean=shift_mean, process_group=torch.distributed.group.WORLD)
    torch.testing.assert_close(got, rk.whiten(x, mask, shift_mean=shift_mean)[part])
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", program]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in range(3)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    with pytest.raises(ValueError, match="x requires grad"):
        rk.whiten(torch.ones(2, requires_grad=True), process_group=object())
