"""The token family and its plain formulations under pytest-benchmark."""

from __future__ import annotations

import pytest
import token_cases
import torch
from torch import Tensor

ROUNDS = {"rounds": 15, "warmup_rounds": 2}


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", ["eager", "compiled", "rlhf_kernels"])
@pytest.mark.parametrize("shape", token_cases.SHAPES, ids=str)
@pytest.mark.parametrize("op", token_cases.OPS)
def test_tokens(benchmark, op: str, shape: tuple[int, int], name: str) -> None:
    benchmark.group = f"{op} {list(shape)}"
    calls = token_cases.contenders(op, shape)
    result = benchmark.pedantic(calls[name], **ROUNDS)
    for a, b in zip(_tensors(result), _tensors(calls["eager"]()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
