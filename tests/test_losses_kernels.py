"""policy_loss and value_loss on every backend: values and gradients against float64, bits, torch's checks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import edge_cases, truth
from support.backends import Backend
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import dispatch
from rlhf_kernels.ops.losses import RATIOS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _share(mask: Tensor, mode: str, denominator: float | None) -> Tensor:
    """[B, T] float64: what one token's loss adds to the whole."""
    counted = mask.double()
    if mode == "seq-mean-token-mean":
        counted = counted / counted.sum(-1, keepdim=True).clamp(min=1)
    sizes = {"token-mean": mask.sum().clamp(min=1), "token-sum": 1}
    return counted / (denominator or sizes.get(mode, max(len(mask), 1)))


def _policy_truth(new: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor, options: dict) -> list:
    """loss, statistics in order, gradient; float64, by cases of the sign instead of minima."""
    new, old, a, w = (torch.where(mask, x.double(), 0.0) for x in (new, old, advantages, weights))
    low, high, dual = 1 - options["clip_low"], 1 + options["clip_high"], options["dual_clip"] or math.inf
    difference, length = new - old, mask.sum(-1, keepdim=True).clamp(min=1)
    if options["ratio"] != "token":
        difference = (difference.sum(-1, keepdim=True) / length).expand_as(new)
    u = difference.clamp(-20, 20)
    rho = u.exp()
    is_low, is_high, is_dual = (a < 0) & (rho < low), (a > 0) & (rho > high), (a < 0) & (rho > dual)
    used = torch.where(is_low, low, torch.where(is_high, high, torch.where(is_dual, dual, rho)))
    share = _share(mask, options["aggregate"], options["denominator"])
    moving = ~(is_low | is_high | is_dual) & (difference.abs() <= 20)
    slope = torch.where(moving, -rho * a, 0.0) * w * share
    if options["ratio"] == "sequence":
        slope = torch.where(mask, slope.sum(-1, keepdim=True) / length, 0.0)
    tokens = mask.sum().clamp(min=1)
    kept = [torch.where(mask, x, 0.0).sum() / tokens for x in (torch.expm1(u) - u, is_low, is_high, is_dual, rho)]
    return [(-used * a * w * share).sum(), *kept, torch.where(mask, rho, 0.0).max(), slope]


def _value_truth(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, options: dict) -> list:
    v, o, r = (torch.where(mask, x.double(), 0.0) for x in (values, old, returns))
    clip = math.inf if options["clip"] is None else options["clip"]
    moved = torch.minimum(torch.maximum(v, o - clip), o + clip)
    clipped = ((moved - r).abs() > (v - r).abs()) & mask
    error = torch.where(clipped, moved - r, v - r)
    share = _share(mask, options["aggregate"], options["denominator"])
    explained = torch.zeros((), dtype=torch.float64)
    if mask.any() and r[mask].var(correction=0) > 0:
        explained = 1 - (r - v)[mask].var(correction=0) / r[mask].var(correction=0)
    fraction = clipped.sum() / mask.sum().clamp(min=1).double()
    return [(error.square() / 2 * share).sum(), fraction, explained, torch.where(clipped, 0.0, v - r) * share]


def _outputs(result: tuple[Tensor, dict[str, Tensor]], leaf: Tensor) -> list[Tensor]:
    loss, stats = result
    return [loss.detach(), *stats.values(), *torch.autograd.grad(loss, leaf)]


def _run(name: str, op: str, tensors: list[Tensor], mask: Tensor | None, options: dict) -> list[Tensor]:
    leaf, *rest = (x.clone() for x in tensors)
    leaf.requires_grad_()
    with rk.use_backend(name):
        if op == "policy_loss":
            result = rk.policy_loss(leaf, *rest[:2], mask, importance_weights=rest[2], **options)
        else:
            result = rk.value_loss(leaf, *rest, mask, **options)
        return _outputs(result, leaf)


def _check(backend: Backend, op: str, tensors: list[Tensor], mask: Tensor | None, options: dict) -> None:
    """The reference's largest error over several draws, because one draw of rounding errors may be lucky."""
    truth_of = _policy_truth if op == "policy_loss" else _value_truth
    counted = torch.ones(tensors[0].shape, dtype=torch.bool) if mask is None else mask
    errors: list[float] = []
    for step in range(24):
        drawn = [(x * (1 - step / 64)).to(x.dtype) for x in tensors]
        pairs = zip(_run("reference", op, drawn, mask, options), truth_of(*drawn, counted, options), strict=True)
        found = [truth.max_error(*pair) for pair in pairs]
        errors = list(map(max, errors, found)) if errors else found
    moved = [x.to(backend.device) for x in edge_cases.hide(mask, *tensors)]
    actual = _run(backend.name, op, moved, None if mask is None else mask.to(backend.device), options)
    for ours, exact, error in zip(actual, truth_of(*tensors, counted, options), errors, strict=True):
        truth.assert_accurate(ours, exact, error, truncates=backend.interpreted and ours.dtype == torch.bfloat16)
    assert (actual[-1].cpu()[~counted] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss(backend: Backend, small_blocks: None, mode: str, ratio: str, dtype: torch.dtype) -> None:
    """DAPO's clip, GSPO's ratio, dual clip, weights; rows of several blocks, inputs of several dtypes."""
    for kind, dual_clip in (("holes", 1.5), ("none", None), ("nothing", 1.5)):
        old = -_normal(3, 37).abs()
        new = (old + 0.4 * _normal(3, 37, seed=1)).to(dtype)
        advantages, weights = _normal(3, 37, seed=2).to(torch.bfloat16), _normal(3, 37, seed=3).abs()
        mask = edge_cases.MASKS[kind](new.shape)
        options = {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": dual_clip, "ratio": ratio, "aggregate": mode}
        options["denominator"] = 11.0 if mode == "constant" else None
        _check(backend, "policy_loss", [new, old, advantages, weights], mask, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(backend: Backend, small_blocks: None, clip: float | None, mode: str, dtype: torch.dtype) -> None:
    for kind in ("holes", "none", "nothing"):
        values, old, returns = (_normal(3, 37, seed=s) for s in (1, 2, 3))
        values, mask = values.to(dtype), edge_cases.MASKS[kind](values.shape)
        options = {"clip": clip, "aggregate": mode, "denominator": 11.0 if mode == "constant" else None}
        _check(backend, "value_loss", [values, old, returns], mask, options)


def test_explained_variance_far_from_zero(backend: Backend, small_blocks: None) -> None:
    """Returns of 1e4 +- 1: a sum of squares minus a square of sums would keep no digit."""
    returns, values = 1e4 + _normal(4, 50), 1e4 + _normal(4, 50, seed=1)
    _, stats = rk.value_loss(values.to(backend.device), None, returns.to(backend.device), clip=None)
    exact = 1 - (returns.double() - values.double()).var() / returns.double().var()
    assert stats["explained_variance"].item() == pytest.approx(exact.item(), rel=1e-4)


def test_what_moves_less_than_the_clip_is_not_clipped(backend: Backend, small_blocks: None) -> None:
    values, old, returns = (_normal(8, 100, seed=s).to(backend.device) for s in (1, 2, 3))
    _, stats = rk.value_loss(values, old, returns, clip=1e3)
    assert stats["clip_fraction"].item() == 0


@pytest.mark.parametrize("log_ratio", [119.0, -119.0, 20.0, -20.0, 19.9])
def test_extreme_ratios(backend: Backend, log_ratio: float) -> None:
    for advantage, dual_clip, ratio in itertools.product(
        (0.0, 1.0, -1.0), (None, 3.0), ("token", "sequence", "sequence-token")
    ):
        new = torch.full((2, 3), log_ratio, device=backend.device, requires_grad=True)
        old, a = torch.zeros_like(new), torch.full_like(new, advantage)
        loss, stats = rk.policy_loss(new, old, a, dual_clip=dual_clip, ratio=ratio)
        (grad,) = torch.autograd.grad(loss, new)
        rho = math.exp(max(-20.0, min(20.0, log_ratio)))
        moving = (advantage < 0 and log_ratio > 0 and dual_clip is None) or (advantage > 0 and log_ratio < 0)
        slope = -rho * advantage / 6 if moving and abs(log_ratio) <= 20 else 0.0
        torch.testing.assert_close(grad, torch.full_like(grad, slope), rtol=1e-6, atol=0)
        assert loss.isfinite()
        assert stats["ratio_max"].item() == pytest.approx(rho, rel=1e-6)


def test_bits_do_not_depend_on_run_threads_or_batch(backend: Backend, small_blocks: None) -> None:
    rows = 5 if backend.interpreted else 257
    tensors = [_normal(rows, 45, seed=s).to(backend.device) for s in range(3)]
    mask = edge_cases.MASKS["holes"](tensors[0].shape).to(backend.device)

    def call(part: slice) -> list[Tensor]:
        found = []
        for loss_of, options in ((rk.policy_loss, {"ratio": "sequence"}), (rk.policy_loss, {}), (rk.value_loss, {})):
            leaf, *rest = (x[part].clone().requires_grad_() for x in tensors)
            found.append(_outputs(loss_of(leaf, *rest, mask[part], aggregate="token-sum", **options), leaf))
            assert all(x.grad is None for x in rest)
        return found

    whole = call(slice(None))
    for part in (slice(None), slice(0, 1), slice(rows - 1, rows), slice(1, 4)):
        for a, b in zip(whole, call(part), strict=True):
            assert torch.equal(a[-1][part], b[-1])
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        try:
            again = call(slice(None))
        finally:
            torch.set_num_threads(before)
        if backend.name != "reference":  # torch's own sums follow the number of threads
            for a, b in itertools.chain.from_iterable(
                zip(*pair, strict=True) for pair in zip(whole, again, strict=True)
            ):
                assert torch.equal(a, b)


def test_any_shape_and_layout(backend: Backend, small_blocks: None) -> None:
    new, old, advantages = (_normal(2, 3, 40, seed=s) for s in range(3))
    expected = None
    for shape in ((6, 40), (2, 3, 40), (240,)):
        x = [t.reshape(shape).to(backend.device) for t in (new, old, advantages)]
        layouts = [x]
        if len(shape) == 2:
            layouts += [[torch.cat([t, t], 1)[:, :40] for t in x], [t.T.contiguous().T for t in x]]
        for tensors in layouts:
            for loss_of in (rk.policy_loss, rk.value_loss):
                leaf = tensors[0].detach().requires_grad_()
                loss, _ = loss_of(leaf, *tensors[1:])
                (grad,) = torch.autograd.grad(loss, leaf)
                assert grad.shape == leaf.shape
                expected = expected or {}
                first = expected.setdefault(loss_of, (loss, grad.flatten()))
                torch.testing.assert_close(loss, first[0])
                torch.testing.assert_close(grad.flatten(), first[1])


def test_denominator_as_a_tensor(backend: Backend) -> None:
    x = [_normal(2, 5, seed=s).to(backend.device) for s in range(3)]
    for loss_of in (rk.policy_loss, rk.value_loss):
        results = []
        for denominator in (7.0, torch.tensor(7.0, device=backend.device), torch.tensor(7, device=backend.device)):
            leaf = x[0].clone().requires_grad_()
            results.append(_outputs(loss_of(leaf, *x[1:], aggregate="constant", denominator=denominator), leaf))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b)


def test_opcheck(kernel_backend: Backend) -> None:
    device, ops = kernel_backend.device, torch.ops.rlhf_kernels
    new, old, advantages, weights = (_normal(2, 5, seed=s).to(device) for s in range(4))
    mask = edge_cases.MASKS["holes"](new.shape).to(device)
    scalars = torch.tensor([0.8, 1.2, 3.0, math.nan], dtype=torch.float64)
    for sequence, (m, w), needs in itertools.product((False, True), ((mask, weights), (None, None)), (False, True)):
        leaf = new.clone().requires_grad_(needs)
        arguments = (leaf, old, advantages, m, w, scalars, None, sequence, sequence, needs)
        torch.library.opcheck(ops.policy_loss.default, arguments)
    given = torch.tensor(3.0, device=device)
    leaf = new.clone().requires_grad_()
    torch.library.opcheck(ops.value_loss.default, (leaf, old, advantages, mask, scalars[2:], given, True, True))


@pytest.mark.parametrize("side", ["behind", "before"])
def test_guard_pages(kernel_backend: Backend, small_blocks: None, side: str) -> None:
    """An access outside an input ends the process: with it, this test."""
    if kernel_backend.device != "cpu":
        pytest.skip("guard pages are CPU memory")
    from support import guarded_memory  # sets Triton to interpret

    module = dispatch.backend_module(kernel_backend.name)
    for T, dtype in itertools.product((1, 15, 16, 33, 257), DTYPES):
        x = [_normal(2, T, seed=s).to(dtype) for s in range(4)]
        mask = edge_cases.MASKS["holes"](x[0].shape)
        for sequence in (False, True):
            results = []
            for wrap in (lambda t: t, lambda t: guarded_memory.guarded(t, side)):
                new, old, a, w, m = map(wrap, (*x, mask))
                policy = module.policy_loss(new, old, a, m, w, 0.8, 1.2, 3.0, math.nan, sequence, sequence, True)
                results.append([*policy, *module.value_loss(new, old, a, m, 0.2, math.nan, sequence, True)])
                if kernel_backend.name == "cpu":
                    _, stats, grad = (wrap(t) for t in policy)
                    results[-1].append(module.loss_bwd(grad, stats, wrap(torch.ones(())), dtype))
            for first, second in zip(*results, strict=True):
                assert torch.equal(first, second)


def test_fp16_gradients_saturate(backend: Backend) -> None:
    """A slope of exp(20) or a return of 60,000 is more than fp16 holds: its largest number, not infinity."""
    device, mask = backend.device, torch.ones(1, 2, dtype=torch.bool).to(backend.device)
    new = torch.tensor([[15.0, 0.0]], dtype=torch.float16, device=device).requires_grad_()
    loss, _ = rk.policy_loss(new, torch.zeros_like(new), -torch.ones_like(new), mask, aggregate="token-sum")
    (grad,) = torch.autograd.grad(loss, new)
    assert grad[0, 0] == 65504
    value = torch.full((1, 2), -60000.0, dtype=torch.float16, device=device).requires_grad_()
    loss, _ = rk.value_loss(value, None, -value.detach(), mask, clip=None, aggregate="token-sum")
    (grad,) = torch.autograd.grad(loss, value)
    assert (grad == -65504).all()
    (grad,) = torch.autograd.grad(rk.value_loss(value, None, -value.detach(), mask, clip=None)[0] * float("inf"), value)
    assert not grad.isfinite().any()  # an overflow above is what a loss scaler looks for
