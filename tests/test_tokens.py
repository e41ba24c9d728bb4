"""per_token_kl, shaped_rewards and whiten against plain formulas, written token by token."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import edge_cases, truth
from support.backends import Backend
from support.checks.tokens import check_rewards
from torch import Tensor

import rlhf_kernels as rk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # float64: tests/test_contract_torch.py, by gradcheck
ESTIMATORS = ["k1", "k2", "k3", "abs"]
NAN, INF = float("nan"), float("inf")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """The same [B, T] numbers, B even, elsewhere in memory, NaN between them."""
    wide = torch.full((2 * x.shape[0], x.shape[1] + 3), NAN, device=x.device).to(x.dtype)
    wide[::2, 1:-2] = x
    shifted = torch.cat([torch.zeros(1, dtype=x.dtype, device=x.device), x.flatten()])[1:]
    return {
        "rows": wide[::2, 1:-2],
        "offset": shifted.view(x.shape),
        "columns": x.T.contiguous().T,
        "3-D": x.view(2, -1, x.shape[1]),
        "scattered": torch.stack([x, x], -1)[..., 0],
    }


def _truncates(backend: Backend, dtype: torch.dtype) -> bool:
    return backend.interpreted and dtype == torch.bfloat16


def _k3(d: float) -> float:
    return math.fsum((-d) ** k / math.factorial(k) for k in range(2, 30)) if abs(d) < 1 else math.expm1(-d) + d


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_values_and_gradients(backend: Backend, estimator: str, dtype: torch.dtype) -> None:
    logprobs, ref = ((3 * _normal(200, seed=seed)).to(dtype).to(backend.device).requires_grad_() for seed in (0, 1))
    kl = rk.per_token_kl(logprobs, ref, estimator=estimator)
    assert kl.dtype == torch.float32

    def value(d: Tensor) -> Tensor:
        return {"k1": d, "k2": d**2 / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}[estimator]

    def slope(d: Tensor) -> Tensor:
        return {"k1": torch.ones_like(d), "k2": d, "k3": -torch.expm1(-d), "abs": d.sign()}[estimator]

    exact = logprobs.detach().double() - ref.detach().double()
    d = logprobs.detach().float() - ref.detach().float()
    truth.assert_accurate(kl, value(exact), truth.max_error(value(d), value(exact)))
    grad, ref_grad = torch.autograd.grad(kl.sum(), [logprobs, ref])
    assert grad.dtype == ref_grad.dtype == dtype
    plain_error = truth.max_error(slope(d).to(dtype), slope(exact))
    truth.assert_accurate(grad, slope(exact), plain_error, truncates=_truncates(backend, dtype))
    truth.assert_accurate(ref_grad, -slope(exact), plain_error, truncates=_truncates(backend, dtype))


def test_k3_near_zero_and_far_away(backend: Backend) -> None:
    points = [0.0, 1e-30, 1e-6, 3e-4, 0.3, 0.4999, 0.5001, 0.51, 0.7, 1.0, 5.0, 19.99]
    x = torch.tensor([sign * d for d in points for sign in (1, -1)], device=backend.device, requires_grad=True)
    kl = rk.per_token_kl(x, torch.zeros_like(x), estimator="k3")
    (grad,) = torch.autograd.grad(kl.sum(), x)
    for d, value, slope in zip(x.tolist(), kl.tolist(), grad.tolist(), strict=True):
        assert value == pytest.approx(_k3(d), rel=3e-7, abs=1e-37)
        assert slope == pytest.approx(-math.expm1(-d), rel=3e-7)
    assert kl[2 * points.index(3e-4)].item() == pytest.approx(4.5e-8, rel=1e-3)


def test_k3_clamps_the_exponent_only(backend: Backend) -> None:
    x = torch.tensor([-100.0, 100.0], device=backend.device, requires_grad=True)
    kl = rk.per_token_kl(x, torch.zeros_like(x), estimator="k3")
    (grad,) = torch.autograd.grad(kl.sum(), x)
    expected = torch.tensor([math.exp(20) - 101, 99 + math.exp(-20)], dtype=torch.float64)
    torch.testing.assert_close(kl.double().cpu(), expected)
    assert grad.tolist() == [1.0, 1.0]  # the linear term's; exp is flat there


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_of_finite_inputs_is_finite(backend: Backend, estimator: str, dtype: torch.dtype) -> None:
    """Also where the slope, up to exp(20), is more than the dtype can say: it saturates."""
    largest = torch.finfo(dtype).max
    points = torch.tensor([0.0, 12.0, 19.9, 20.1, 100.0, 1e4, largest / 2, largest], dtype=dtype, device=backend.device)
    for sign, ref in itertools.product((1, -1), (0.0, -largest)):
        leaves = [(sign * points).requires_grad_(), torch.full_like(points, ref).requires_grad_()]
        kl = rk.per_token_kl(*leaves, estimator=estimator)
        assert kl.isfinite().all()
        wide = [x.detach().float().requires_grad_() for x in leaves]
        slopes = torch.autograd.grad(rk.per_token_kl(*wide, estimator=estimator).sum(), wide)
        for grad, slope in zip(torch.autograd.grad(kl.sum(), leaves), slopes, strict=True):
            assert grad.isfinite().all()
            expected = slope.clamp(-largest, largest).to(dtype)
            truth.assert_accurate(grad, expected, 0.0, truncates=_truncates(backend, dtype))


def test_a_gradient_that_came_in_infinite_is_not_made_finite(backend: Backend) -> None:
    """A loss scaler looks for it; a finite product saturates."""
    x = torch.tensor([-12.0, 1.0, 1.0], dtype=torch.float16, device=backend.device, requires_grad=True)
    kl = rk.per_token_kl(x, torch.zeros_like(x), estimator="k3")
    (grad,) = torch.autograd.grad(kl, x, torch.tensor([1.0, INF, NAN], device=backend.device))
    assert grad[0].item() == -65504.0
    assert not grad[1:].isfinite().any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_of_nan_and_infinity_stays_with_its_token(backend: Backend, estimator: str) -> None:
    x = torch.tensor([1.0, NAN, -INF, 2.0], device=backend.device, requires_grad=True)
    kl = rk.per_token_kl(x, torch.zeros_like(x), estimator=estimator)
    (grad,) = torch.autograd.grad(kl.sum(), x)
    with rk.use_backend("reference"):
        expected = rk.per_token_kl(x, torch.zeros_like(x), estimator=estimator)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(kl, expected, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, equal_nan=True)
    assert kl.isnan().tolist() == [False, True, False, False]
    assert kl[2].isfinite()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_kl_of_any_two_layouts_and_dtypes(
    backend: Backend, small_blocks: None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Neither changes a bit; each gradient comes back in its input's dtype, and only where one is wanted."""
    logprobs, ref = (_normal(6, 37, seed=seed).to(dtype).to(backend.device) for seed, dtype in enumerate(dtypes))
    expected = rk.per_token_kl(logprobs.float(), ref.float(), estimator="k3")
    wanted = itertools.cycle(((True, True), (True, False), (False, True)))
    for name, a in _layouts(logprobs).items():
        for b in (ref.view(a.shape), *(b for b in _layouts(ref).values() if b.shape == a.shape)):
            leaves = [x.detach().requires_grad_(needed) for x, needed in zip((a, b), next(wanted), strict=True)]
            kl = rk.per_token_kl(*leaves, estimator="k3")
            assert torch.equal(kl.detach(), expected.view(a.shape)), name
            kl.sum().backward()  # of an expanded gradient
            for leaf, dtype in zip(leaves, dtypes, strict=True):
                assert (leaf.grad is not None) == leaf.requires_grad
                assert not leaf.requires_grad or (leaf.grad.dtype == dtype and leaf.grad.shape == a.shape)


def test_kl_of_nothing(backend: Backend) -> None:
    for shape in ((0,), (3, 0), (0, 4), ()):
        x = torch.ones(shape, device=backend.device, requires_grad=True)
        kl = rk.per_token_kl(x, torch.zeros_like(x), estimator="k2")
        assert kl.shape == shape
        assert torch.autograd.grad(kl.sum(), x)[0].shape == shape


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", [kind for kind in edge_cases.MASKS if kind != "none"])
def test_shaped_rewards(backend: Backend, small_blocks: None, kind: str, clip: float | None) -> None:
    for dtype, time in ((torch.float32, 9), (torch.bfloat16, 16), (torch.float16, 33)):
        kl = _normal(4, time).to(dtype)
        mask = edge_cases.MASKS[kind](kl.shape)
        (hidden,) = edge_cases.hide(mask, kl)
        check_rewards(backend, 2 * _normal(4, seed=1), hidden, mask, clip)


def test_shaped_rewards_of_long_rows(kernel_backend: Backend) -> None:
    """Chunks of 1024: sequences that end inside the first, at its edge, in a later one, or nowhere."""
    kl, mask = _normal(6, 2500), torch.zeros(6, 2500, dtype=torch.bool)
    for row, end in enumerate((1, 1023, 1024, 1025, 2500)):
        mask[row, :end] = torch.arange(end) % 3 != 1
        mask[row, end - 1] = True
    (hidden,) = edge_cases.hide(mask, kl)
    check_rewards(kernel_backend, _normal(6, seed=1), hidden, mask, None)


def test_shaped_rewards_of_any_layout(backend: Backend, small_blocks: None) -> None:
    kl, scores = _normal(6, 37), _normal(6, seed=1).to(torch.bfloat16)
    mask = edge_cases.MASKS["holes"](kl.shape)
    expected = rk.shaped_rewards(scores.to(backend.device), kl.to(backend.device), mask.to(backend.device), kl_coef=0.1)
    for name, x in _layouts(kl.to(backend.device)).items():
        if x.dim() == 2:
            masks = [m for m in _layouts(mask.float().to(backend.device)).values() if m.shape == x.shape]
            strided = scores.repeat_interleave(2)[::2].to(backend.device)
            for other in masks:
                assert torch.equal(rk.shaped_rewards(strided, x, other == 1, kl_coef=0.1), expected), name


def test_a_score_of_nan_counts_only_where_its_sequence_does(backend: Backend) -> None:
    mask = torch.tensor([[True, False], [False, False], [True, True]], device=backend.device)
    scores, kl = torch.tensor([1.0, NAN, NAN], device=backend.device), torch.zeros(3, 2, device=backend.device)
    for clip in (None, 2.0):
        rewards = rk.shaped_rewards(scores, kl, mask, kl_coef=0.1, clip=clip)
        assert rewards[:2].tolist() == [[1.0, 0.0], [0.0, 0.0]]
        assert rewards[2].isnan().tolist() == [False, True]


def test_shaped_rewards_of_nothing(backend: Backend) -> None:
    for shape in ((0, 4), (3, 0)):
        x = torch.ones(shape, device=backend.device)
        scores = torch.ones(shape[0], device=backend.device)
        assert rk.shaped_rewards(scores, x, x.bool(), kl_coef=0.1).shape == shape


def check_whiten(backend: Backend, x: Tensor, mask: Tensor | None, shift_mean: bool, upstream: Tensor) -> None:
    """Values and gradient against float64; x and upstream may hold anything where the mask is false."""
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask

    def formula(kept: Tensor) -> Tensor:
        white = (kept - kept.mean()) * (kept.var(correction=0) + 1e-8).rsqrt()
        return white if shift_mean else white + kept.mean()

    def values_and_gradient(dtype: torch.dtype) -> list[Tensor]:
        leaf = x[counted].detach().requires_grad_()
        wide = formula(leaf.to(dtype))
        return [wide, *torch.autograd.grad(wide, leaf, upstream[counted].to(dtype))]

    leaf = x.detach().to(backend.device).requires_grad_()
    white = rk.whiten(leaf, None if mask is None else mask.to(backend.device), shift_mean=shift_mean)
    (grad,) = torch.autograd.grad(white, leaf, upstream.to(backend.device))
    assert white.dtype == torch.float32
    assert grad.dtype == x.dtype
    if not counted.all():
        assert (white.cpu()[~counted] == 0).all()
        assert (grad.cpu()[~counted] == 0).all()
    if counted.any():
        exact, plain = values_and_gradient(torch.float64), values_and_gradient(torch.float32)
        # The gradient of float64 arithmetic, but of 16-bit leaves it would be rounded: taken to a leaf of its own.
        wide = x[counted].double().requires_grad_()
        exact[1] = torch.autograd.grad(formula(wide), wide, upstream[counted].double())[0]
        for ours, expected, usual in zip((white, grad), exact, plain, strict=True):
            tolerance = truth.max_error(usual, expected)
            truth.assert_accurate(ours.cpu()[counted], expected, tolerance, truncates=_truncates(backend, ours.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_whiten(backend: Backend, small_blocks: None, kind: str, shift_mean: bool, dtype: torch.dtype) -> None:
    x, upstream = (3 * _normal(5, 21) + 7).to(dtype), _normal(5, 21, seed=1)
    mask = edge_cases.MASKS[kind](x.shape)
    check_whiten(backend, *edge_cases.hide(mask, x), mask, shift_mean, *edge_cases.hide(mask, upstream))


@pytest.mark.parametrize("shape", [(1, 1024), (3, 1025), (2, 2, 700), (5000,)])
def test_whiten_of_many_chunks(kernel_backend: Backend, shape: tuple[int, ...]) -> None:
    x, upstream = 3 * _normal(*shape) + 7, _normal(*shape, seed=1)
    mask = edge_cases.MASKS["holes"](x.shape)
    for some in (None, mask):
        check_whiten(kernel_backend, x, some, True, upstream)


@pytest.mark.parametrize("mean", [1e4, -1e4, 3e6])
def test_whiten_where_the_mean_is_far_larger_than_the_spread(backend: Backend, mean: float) -> None:
    """Sums of squares, and a mean rounded to float32, would lose every digit."""
    x = mean + 1e-6 * abs(mean) * _normal(3, 700)
    kept = x.double()
    expected = (kept - kept.mean()) * (kept.var(correction=0) + 1e-8).rsqrt()
    white = rk.whiten(x.to(backend.device))
    truth.assert_accurate(white, expected, 0.0)
    assert abs(white.double().mean().item()) < 1e-6


def test_whiten_of_any_layout(backend: Backend, small_blocks: None) -> None:
    """The layout of x, of the mask and of the gradient changes no bit."""
    x, upstream = _normal(6, 37).to(backend.device), _normal(6, 37, seed=1).to(backend.device)
    mask = edge_cases.MASKS["holes"](x.shape).to(backend.device)

    def both(x: Tensor, mask: Tensor, upstream: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        white = rk.whiten(leaf, mask)
        return [white.detach().reshape(-1), torch.autograd.grad(white, leaf, upstream)[0].reshape(-1)]

    expected = both(x, mask, upstream)
    for name, other in _layouts(x).items():
        for others in (mask, _layouts(mask.float())[name] == 1):
            same = both(other, others.view(other.shape), _layouts(upstream)[name])
            for a, b in zip(expected, same, strict=True):
                if backend.name == "reference":  # sums in torch's order, which knows the layout
                    torch.testing.assert_close(a, b)
                else:
                    assert torch.equal(a, b), name


def test_whiten_of_one_value_or_of_equal_ones_is_finite(backend: Backend) -> None:
    for x in (torch.tensor([5.0]), torch.full((3, 4), 1e4), torch.empty(0), torch.empty(0, 3), torch.tensor(2.0)):
        leaf = x.to(backend.device).requires_grad_()
        white = rk.whiten(leaf)
        (grad,) = torch.autograd.grad(white.sum(), leaf)
        assert (white == 0).all()
        assert grad.isfinite().all()
        assert torch.equal(rk.whiten(leaf, shift_mean=False).detach().cpu(), x)


RANK = """
import os, sys
rank, folder = int(sys.argv[1]), sys.argv[2]
os.environ["TRITON_INTERPRET"] = "1"
import torch, rlhf_kernels as rk
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x = 1e4 + torch.arange(30.0).view(10, 3).sin()
part = [slice(0, 3), slice(3, 10)][rank]
group = torch.distributed.group.WORLD
collectives = []
gather = torch.distributed.all_gather
torch.distributed.all_gather = lambda *a, **k: (collectives.append(a), gather(*a, **k))
for backend in ("reference", "cpu", "triton"):
    if rk.dispatch.available().get(backend):
        continue
    collectives.clear()
    mask = torch.arange(30).view(10, 3) % 4 > 0
    with rk.use_backend(backend):
        for shift_mean in (True, False):
            options = {"shift_mean": shift_mean, "process_group": group}
            got = rk.whiten(x[part], mask[part], **options)
            torch.testing.assert_close(got, rk.whiten(x, mask, shift_mean=shift_mean)[part], rtol=3e-7, atol=3e-7)
            assert torch.equal(got, rk.whiten(x[part], mask[part], **options))
        for uncounted in (slice(3, 10), slice(0, 10)):  # one rank's part, and all
            mask[uncounted] = False
            got = rk.whiten(x[part], mask[part], process_group=group)
            torch.testing.assert_close(got, rk.whiten(x, mask)[part], rtol=3e-7, atol=3e-7)
        assert (got == 0).all()
    assert len(collectives) == 6  # one a call
torch.distributed.destroy_process_group()
"""


def test_whiten_over_ranks_equals_one_process(tmp_path: Path) -> None:
    """Two processes with batches of different size, also one with nothing counted, against the whole batch."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    with pytest.raises(ValueError, match="x requires grad"):
        rk.whiten(torch.ones(2, requires_grad=True), process_group=object())
