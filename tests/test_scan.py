"""gae against what each mask semantics means (compacted, cut or zero-filled rows, summed in float64), every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import edge_cases, truth
from support.backends import Backend
from support.checks.scan import MASKED, check, run
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.reference import scan as reference


def _case(batch: int, time: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in ((batch, time), (batch, time), (batch,)))


@pytest.mark.parametrize("with_bootstrap", [False, True])
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("kind", edge_cases.MASKS)
def test_every_semantics_and_mask(
    backend: Backend, small_blocks: None, kind: str, masked: str, with_bootstrap: bool
) -> None:
    rewards, values, bootstrap = _case(4, 41)
    mask = edge_cases.MASKS[kind](rewards.shape)
    if mask is not None:  # what the mask hides is never read
        garbage = torch.tensor([float("nan"), float("inf")])[torch.arange(rewards.numel()) % 2].view(rewards.shape)
        rewards, values = torch.where(mask, rewards, garbage), torch.where(mask, values, garbage)
    check(backend, rewards, values, mask, bootstrap if with_bootstrap else None, masked)


@pytest.mark.parametrize("masked", MASKED)
def test_holes_of_a_dialogue(backend: Backend, masked: str) -> None:
    """A multi-turn mask: the model's turns count, the user's between them do not."""
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]]).bool()
    rewards, values, bootstrap = _case(2, 12)
    check(backend, rewards, values, mask, bootstrap, masked, gamma=1.0)


def test_the_semantics_differ(backend: Backend) -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0]]).bool()
    rewards, values, bootstrap = _case(1, 5)
    skip, stop, zero = (run(backend, rewards, values, mask, bootstrap=bootstrap, masked=masked)[0] for masked in MASKED)
    assert not torch.equal(skip, stop)
    assert not torch.equal(skip, zero)
    assert not torch.equal(stop, zero)
    # "stop": the last position is a hole, so nothing of the bootstrap arrives.
    assert torch.equal(stop, run(backend, rewards, values, mask, masked="stop")[0])


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 31, 32, 33, 100])
def test_lengths_around_the_chunk(backend: Backend, small_blocks: None, time: int) -> None:
    rewards, values, bootstrap = _case(3, time)
    for masked in MASKED:
        check(backend, rewards, values, edge_cases.MASKS["holes"](rewards.shape), bootstrap, masked)


@pytest.mark.parametrize("time", [511, 512, 513, 1100])
def test_lengths_around_the_real_chunk(backend: Backend, time: int) -> None:
    rewards, values, bootstrap = _case(1, time)
    check(backend, rewards, values, None, bootstrap)
    check(backend, rewards, values, edge_cases.MASKS["holes"](rewards.shape), bootstrap)


def _loop(rewards: Tensor, values: Tensor, end: float, gamma: float, lam: float, number: type) -> tuple[Tensor, ...]:
    """One row by the recurrence, step by step, in `number`'s precision."""
    r, v = rewards.double().tolist(), values.double().tolist()
    gamma, decay, following, running = number(gamma), number(gamma * lam), number(end), number(0)
    advantages = [0.0] * len(r)
    for t in reversed(range(len(r))):
        value = number(v[t])
        running = number(r[t]) + gamma * following - value + decay * running
        advantages[t], following = float(running), value
    advantage = torch.tensor(advantages, dtype=torch.float64)
    return advantage, advantage + values.double()


def test_long_sequences(backend: Backend) -> None:
    """131,072 steps; 8,192 for the interpreter, which needs 0.1 ms for each, and for the specification's loop."""
    time = 8_192 if backend.interpreted or backend.name == "reference" else 131_072
    rewards, values, bootstrap = _case(1, time)
    got = run(backend, rewards, values, None, gamma=0.999, lam=0.99, bootstrap=bootstrap)
    expected, plain = (
        _loop(rewards[0], values[0], bootstrap.item(), 0.999, 0.99, number) for number in (float, np.float32)
    )
    for actual, exact, by_loop in zip(got, expected, plain, strict=True):
        truth.assert_accurate(actual[0], exact, truth.max_error(by_loop, exact))


@pytest.mark.parametrize("gamma", [0, 0.5, 1])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_discounts(backend: Backend, small_blocks: None, gamma: float, lam: float) -> None:
    rewards, values, bootstrap = _case(2, 37)
    check(backend, rewards, values, None, bootstrap, gamma=gamma, lam=lam)
    check(backend, rewards, values, edge_cases.MASKS["holes"](rewards.shape), bootstrap, gamma=gamma, lam=lam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_and_layout(backend: Backend, small_blocks: None, dtype: torch.dtype) -> None:
    rewards, values, bootstrap = _case(3, 40)
    rewards, values = rewards.to(dtype), values.to(dtype)
    mask = edge_cases.MASKS["holes"](rewards.shape)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    expected = reference.gae(rewards, values, mask, bootstrap, 0.97, 0.95, "skip")
    for place in (
        lambda x: x,
        lambda x: torch.cat([x, x], 1)[:, :40],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.T.contiguous().T,
    ):
        got = run(backend, place(rewards), place(values), place(mask), bootstrap=bootstrap, gamma=0.97)
        for actual, exact in zip(got, expected, strict=True):
            assert actual.dtype == result
            torch.testing.assert_close(actual, exact, rtol=1e-5, atol=2e-6)
    row = run(backend, rewards[:1].expand(3, 40), values[:1].expand(3, 40), None)
    for tensor in row:
        assert torch.equal(tensor, tensor[:1].expand(3, 40))


def test_mixed_dtypes_and_leading_shapes(backend: Backend) -> None:
    rewards, values, bootstrap = _case(6, 9)
    flat = run(backend, rewards, values.half(), None, bootstrap=bootstrap)
    shaped = run(backend, rewards.view(2, 3, 9), values.half().view(2, 3, 9), None, bootstrap=bootstrap.view(2, 3))
    single = run(backend, rewards[0], values[0].half(), None, bootstrap=bootstrap[0])
    for a, b, c in zip(flat, shaped, single, strict=True):
        assert torch.equal(a.view(2, 3, 9), b)
        assert torch.equal(a[0], c)


def test_nothing_to_scan(backend: Backend) -> None:
    for shape in ((0, 5), (3, 0), (0, 0), (0,)):
        empty = torch.empty(shape)
        for tensor in run(backend, empty, empty, torch.ones(shape, dtype=torch.bool), bootstrap=torch.ones(shape[:-1])):
            assert tensor.shape == shape


def test_a_nan_stays_in_its_sequence(backend: Backend, small_blocks: None) -> None:
    """A counted NaN spoils its row from there to the left, no other row, and does not cross a "stop"."""
    rewards, values, _ = _case(3, 40)
    clean = run(backend, rewards, values, None)[0]
    rewards[1, 20] = float("nan")
    spoilt = run(backend, rewards, values, None)[0]
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
    assert spoilt[1, :21].isnan().all()
    assert torch.equal(spoilt[1, 21:], clean[1, 21:])
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[:, 10] = False
    assert run(backend, rewards, values, mask, masked="stop")[0][1, :10].isfinite().all()


def test_padding_on_the_right_changes_no_bit(backend: Backend, small_blocks: None) -> None:
    rewards, values, _ = _case(2, 37)
    mask = edge_cases.MASKS["holes"](rewards.shape)
    for masked in MASKED:
        short = run(backend, rewards, values, mask, masked=masked)
        pad = (torch.nn.functional.pad(x, (0, 30)) for x in (rewards, values, mask))
        for a, b in zip(short, run(backend, *pad, masked=masked), strict=True):
            assert torch.equal(a, b[:, :37])


def test_inputs_are_detached(backend: Backend) -> None:
    rewards, values, bootstrap = _case(2, 5)
    advantages, returns = rk.gae(
        rewards.to(backend.device).requires_grad_(),
        values.to(backend.device).requires_grad_(),
        bootstrap=bootstrap.to(backend.device).requires_grad_(),
    )
    assert not advantages.requires_grad
    assert not returns.requires_grad
