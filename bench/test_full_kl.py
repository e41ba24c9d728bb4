"""full_kl and its peers under pytest-benchmark."""

from __future__ import annotations

import peers
import pytest
import torch

import rlhf_kernels as rk

ROUNDS = {"rounds": 7, "warmup_rounds": 2}
FORMULATIONS = {**peers.PLAIN_KL, **peers.compiled_kl(), "rlhf_kernels": rk.full_kl}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reverse(benchmark, dtype: str, name: str) -> None:
    benchmark.group = f"full_kl {dtype}"
    logits, ref = peers.kl_case(DTYPES[dtype])
    with torch.no_grad():
        kl = benchmark.pedantic(FORMULATIONS[name], (logits, ref), **ROUNDS)
    torch.testing.assert_close(kl, rk.full_kl(logits, ref), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_directions(benchmark, direction: str) -> None:
    benchmark.group = "full_kl, gradient too"
    logits, ref = peers.kl_case(torch.float32)
    leaf = logits.requires_grad_()

    def step() -> torch.Tensor:
        return torch.autograd.grad(rk.full_kl(leaf, ref, direction=direction).sum(), leaf)[0]

    grad = benchmark.pedantic(step, **ROUNDS)
    assert grad.sum(-1).abs().max() < 1e-4
