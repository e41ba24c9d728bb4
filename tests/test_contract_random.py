"""Random calls of every op: the same checks as the hand-picked ones, where nobody thought of looking."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import soaked, soaked_sampling, strategies
from support.backends import Backend
from support.checks import full_kl, linear, logits, ppo_advantages, scan, scan_packed, tokens
from support.linear_truth import Case

import rlhf_kernels as rk

pytestmark = pytest.mark.random
# `make test-all` sets it: random tests take all of their cases, not a quarter.
ALL_CASES = os.environ.get("RLHF_KERNELS_ALL_CASES") == "1"


def cases(most: int) -> int:
    """How many cases a random test takes."""
    return most if ALL_CASES else max(5, most // 4)


# Derandomised: CI runs the same cases each time, and a failure is a fact rather than weather.
SLICE = settings(
    max_examples=cases(200),
    derandomize=True,
    deadline=None,
    database=None,
    # The fixtures choose the backend; nothing in them depends on the example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors],
)


@SLICE
@given(call=strategies.logits_calls())
def test_selected_logprobs(backend: Backend, small_blocks: None, call: strategies.LogitsCall) -> None:
    logits.check(backend, call.logits, call.labels, call.mask, call.temperature)


@settings(SLICE, max_examples=cases(60))
@given(call=strategies.kl_calls())
def test_full_kl(backend: Backend, small_blocks: None, call: strategies.KlCall) -> None:
    full_kl.check(backend, call.logits, call.ref, call.mask, call.temperature, [call.direction])


@settings(SLICE, max_examples=cases(40))
@given(call=strategies.head_calls())
def test_linear_logprobs(backend: Backend, small_blocks: None, call: strategies.HeadCall) -> None:
    case = Case(call.hidden, call.weight, call.labels, call.bias, **call.scalars)
    linear.check(backend, case, call.mask, workspace=call.workspace)


@SLICE
@given(call=strategies.gae_calls())
def test_gae(backend: Backend, small_blocks: None, call: strategies.GaeCall) -> None:
    scan.check(backend, *call)


@settings(SLICE, max_examples=cases(50))
@given(call=strategies.packed_calls())
def test_gae_packed(backend: Backend, small_blocks: None, call: strategies.PackedCall) -> None:
    scan_packed.check(backend, *call)


@settings(SLICE, max_examples=cases(50))
@given(call=strategies.rollout_calls())
def test_ppo_advantages(backend: Backend, small_blocks: None, call: strategies.RolloutCall) -> None:
    ppo_advantages.check(backend, call.tensors, *call[1:])


@settings(SLICE, max_examples=cases(15))
@given(call=strategies.sampling_calls())
def test_sample_tokens(kernel_backend: Backend, small_blocks: None, call: strategies.SamplingCall) -> None:
    soaked_sampling.SOAKED["sample_tokens"].check(call, kernel_backend.name, kernel_backend.device)


@pytest.mark.parametrize("op", ["pairwise_loss", "dpo_loss", "group_advantages"])
@settings(SLICE, max_examples=cases(100))
@given(data=st.data())
def test_preference(op: str, data: st.DataObject) -> None:
    """No kernel serves these; what plain PyTorch makes of every dtype against float64."""
    soaked.SOAKED[op].check(data.draw(soaked.SOAKED[op].calls), "reference", "cpu")


@pytest.mark.parametrize(("op", "most"), [("policy_loss", 30), ("value_loss", 10)])
def test_losses_against_truth(kernel_backend: Backend, small_blocks: None, op: str, most: int) -> None:
    @settings(SLICE, max_examples=cases(most))
    @given(call=soaked.SOAKED[op].calls)
    def check(call: object) -> None:
        soaked.SOAKED[op].check(call, kernel_backend.name, kernel_backend.device)

    check()


def _assert_finite_and_masked(outputs: list[torch.Tensor], mask: torch.Tensor | None, *per_token: torch.Tensor) -> None:
    for tensor in (*outputs, *per_token):
        assert tensor.isfinite().all()
    if mask is not None:
        for tensor in per_token:
            assert (tensor[~mask] == 0).all()


@SLICE
@given(call=strategies.token_calls())
def test_losses(call: strategies.TokenCall) -> None:
    """No finite counted input, however extreme, and nothing hidden gives inf or NaN, forward or backward."""
    (x, old, third), mask, aggregate = call
    for loss_of in (
        lambda leaf: rk.policy_loss(leaf, old, third, mask, aggregate=aggregate),
        lambda leaf: rk.policy_loss(leaf, old, third, mask, aggregate=aggregate, ratio="sequence", dual_clip=3.0),
        lambda leaf: rk.value_loss(leaf, old, third, mask, aggregate=aggregate),
    ):
        leaf = x.clone().requires_grad_()
        loss, stats = loss_of(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        _assert_finite_and_masked([loss, *stats.values()], mask, grad)


@settings(SLICE, max_examples=cases(60))
@given(call=strategies.token_calls())
def test_token_ops(backend: Backend, small_blocks: None, call: strategies.TokenCall) -> None:
    x, kl, _ = (tensor.to(backend.device) for tensor in call.tensors)
    mask = None if call.mask is None else call.mask.to(backend.device)
    counted = torch.ones(x.shape, dtype=torch.bool, device=x.device) if mask is None else mask
    for shift_mean in (True, False):
        leaf = x.clone().requires_grad_()
        white = rk.whiten(leaf, mask, shift_mean=shift_mean)
        (grad,) = torch.autograd.grad(white.sum(), leaf)
        _assert_finite_and_masked([], mask, white, grad)
        with rk.use_backend("reference"):
            expected = rk.whiten(x, mask, shift_mean=shift_mean)
        # A mean that is kept comes from float32 sums per chunk: a few ulp of the largest number in it.
        mean_error = 0.0 if shift_mean or not x.numel() else 3e-7 * float(torch.where(counted, x, 0.0).abs().max())
        torch.testing.assert_close(white, expected, rtol=1e-6, atol=1e-6 + mean_error)
    tokens.check_rewards(backend, torch.linspace(-2, 2, len(x)), call.tensors[1], counted.cpu(), 1.0)
    for estimator in ("k1", "k2", "k3", "abs"):
        leaf = torch.where(counted, x, 0.0).requires_grad_()
        value = rk.per_token_kl(leaf, torch.where(counted, kl, 0.0), estimator=estimator)
        _assert_finite_and_masked([value, *torch.autograd.grad(value.sum(), leaf)], None)
        if estimator != "k1":
            assert (value >= 0).all()
