"""gae and its peers under pytest-benchmark."""

from __future__ import annotations

import peers
import pytest
import torch

import rlhf_kernels as rk

ROUNDS = {"rounds": 15, "warmup_rounds": 2}


@pytest.mark.parametrize("name", ["per-step loop", "rlhf_kernels"])
def test_masked(benchmark, name: str) -> None:
    benchmark.group = "gae with mask"
    rewards, values, mask = peers.gae_case()

    def ours(*arguments):
        return rk.gae(*arguments, gamma=peers.GAMMA, lam=peers.LAM)

    call = peers.gae_loop if name == "per-step loop" else ours
    result = benchmark.pedantic(call, (rewards, values, mask), **ROUNDS)
    for a, b in zip(result, ours(rewards, values, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["torchrl, vectorised", "rlhf_kernels"])
def test_unmasked(benchmark, name: str) -> None:
    benchmark.group = "gae without mask"
    rewards, values, _ = peers.gae_case()

    def ours(*arguments):
        return rk.gae(*arguments, gamma=peers.GAMMA, lam=peers.LAM)

    if name != "rlhf_kernels":
        pytest.importorskip("torchrl")
    call = peers.torchrl_gae if name != "rlhf_kernels" else ours
    result = benchmark.pedantic(call, (rewards, values), **ROUNDS)
    for a, b in zip(result, ours(rewards, values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["eager, as TRL writes it", "rlhf_kernels"])
def test_ppo_advantages(benchmark, name: str) -> None:
    benchmark.group = "ppo_advantages"
    case = peers.rollout_case(peers.BATCH)

    def ours(*arguments):
        return rk.ppo_advantages(*arguments, kl_coef=peers.KL_COEF, gamma=peers.GAMMA, lam=peers.LAM)

    call = peers.trl_advantages if name != "rlhf_kernels" else ours
    result = benchmark.pedantic(call, case, **ROUNDS)
    for a, b in zip(result, ours(*case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
