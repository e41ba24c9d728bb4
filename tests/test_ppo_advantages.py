"""ppo_advantages against float64, and against the single ops that it stands for, every backend."""

from __future__ import annotations

import pytest
import torch
from support import edge_cases
from support.backends import Backend
from support.checks.ppo_advantages import EPS, check, mask_of, rollout, run

import rlhf_kernels as rk
from rlhf_kernels.reference import scan as reference


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in edge_cases.MASKS if kind != "none"])
def test_every_mask(backend: Backend, small_blocks: None, kind: str, whiten: bool) -> None:
    mask = mask_of(kind, 5, 41)
    mask[2] = False  # a sequence without a token: its score, NaN here, goes nowhere
    logprobs, ref_logprobs, scores, values = rollout(5, 41)
    scores[2] = float("nan")
    case = (*edge_cases.hide(mask, logprobs, ref_logprobs), scores, *edge_cases.hide(mask, values))
    check(backend, case, mask, whiten=whiten)


@pytest.mark.parametrize("time", [1, 7, 8, 9, 15, 16, 17, 33])
def test_lengths_around_the_chunk(backend: Backend, small_blocks: None, time: int) -> None:
    check(backend, rollout(9, time), mask_of("holes", 9, time))


def test_length_of_the_real_chunk(backend: Backend) -> None:
    check(backend, rollout(2, 1100), mask_of("holes", 2, 1100))


@pytest.mark.parametrize("gamma", [0, 0.5, 1])
@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("kl_coef", [0, 0.2])
def test_coefficients(backend: Backend, small_blocks: None, gamma: float, lam: float, kl_coef: float) -> None:
    check(backend, rollout(3, 20), mask_of("holes", 3, 20), kl_coef, gamma, lam)


def test_equals_the_single_ops(backend: Backend, small_blocks: None) -> None:
    """The public ops one after the other, by the reference: the same numbers but for rounding."""
    case, mask = rollout(6, 50), mask_of("holes", 6, 50)
    got = run(backend, case, mask, kl_coef=0.2, gamma=0.99, lam=0.9)
    with rk.use_backend("reference"):
        logprobs, ref_logprobs, scores, values = case
        kl = torch.where(mask, rk.per_token_kl(logprobs, ref_logprobs), 0.0)
        rewards = rk.shaped_rewards(scores, kl, mask, kl_coef=0.2)
        advantages, returns = rk.gae(rewards, values, mask, gamma=0.99, lam=0.9)
        expected = [rk.whiten(advantages, mask), returns, kl]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    if backend.name == "reference":
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_score_arrives_at_the_last_counted_token(backend: Backend, small_blocks: None) -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()
    zeros = torch.zeros(2, 5)
    advantages, returns, _ = run(
        backend, (zeros, zeros, torch.tensor([8.0, 2.0]), zeros), mask, gamma=0.5, lam=1.0, whiten=False
    )
    assert returns.tolist() == [[2.0, 4.0, 0.0, 8.0, 0.0], [0.0, 2.0, 0.0, 0.0, 0.0]]
    assert torch.equal(advantages, returns)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_and_layout(backend: Backend, small_blocks: None, dtype: torch.dtype) -> None:
    case, mask = rollout(4, 40, dtype=dtype), mask_of("holes", 4, 40)
    expected = run(backend, case, mask)
    assert all(x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for x in expected)
    exact = reference.ppo_advantages(*case, mask, 0.1, 1.0, 0.95, EPS)
    for a, b in zip(expected, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, check_dtype=False)
    for place in (
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x if x.dim() == 1 else x.T.contiguous().T,
    ):
        for a, b in zip(expected, run(backend, tuple(map(place, case)), place(mask)), strict=True):
            if dtype != torch.float64 and backend.name != "reference":
                assert torch.equal(a, b)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    mixed = (case[0].float(), case[1], case[2].half(), case[3])
    expected = reference.ppo_advantages(
        *(x.to(torch.promote_types(dtype, torch.float32)) for x in mixed), mask, 0.1, 1.0, 0.95, EPS
    )
    for a, b in zip(run(backend, mixed, mask.int()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_nothing_to_scan(backend: Backend) -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        empty = torch.empty(shape)
        for x in run(backend, (empty, empty, torch.ones(shape[0]), empty), torch.ones(shape, dtype=torch.bool)):
            assert x.shape == shape


def test_whitening_of_advantages_that_are_equal_or_far_from_0(backend: Backend, small_blocks: None) -> None:
    """Variance 0 gives 0, not NaN; a mean 1000 times the deviation costs no more digits than in two plain passes."""
    zeros, mask = torch.zeros(9, 20), torch.ones(9, 20, dtype=torch.bool)
    for level in (0.0, 0.1, 1e4):
        advantages, _, _ = run(backend, (zeros, zeros, torch.zeros(9), zeros - level), mask, gamma=0.0)
        assert (advantages == 0).all(), level
    logprobs, ref_logprobs, scores, values = rollout(9, 20)
    check(backend, (logprobs, ref_logprobs, scores, values + 1000), mask, gamma=0.0)


def test_huge_logprobs_give_a_finite_kl(backend: Backend) -> None:
    huge, mask = torch.full((1, 3), 3e38), torch.ones(1, 3, dtype=torch.bool)
    for sign in (1, -1):
        kl = run(backend, (sign * huge, -sign * huge, torch.zeros(1), torch.zeros(1, 3)), mask, kl_coef=0)[2]
        assert torch.equal(kl, torch.full((1, 3), sign * torch.finfo(torch.float32).max))


def test_a_nan_stays_in_its_sequence(backend: Backend, small_blocks: None) -> None:
    case, mask = rollout(3, 40), torch.ones(3, 40, dtype=torch.bool)
    clean = run(backend, case, mask, whiten=False)
    case[0][1, 20] = float("nan")
    spoilt = run(backend, case, mask, whiten=False)
    for a, b in zip(spoilt, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert torch.equal(a[1, 21:], b[1, 21:])
    assert spoilt[0][1, :21].isnan().all()
    assert spoilt[2].isnan().sum() == 1
    assert run(backend, case, mask)[0].isnan().all()  # the mean is NaN, as whiten's


def test_inputs_are_detached(backend: Backend) -> None:
    case = tuple(x.requires_grad_() for x in rollout(2, 5))
    assert not any(x.requires_grad for x in run(backend, case, torch.ones(2, 5)))


def test_wrong_arguments() -> None:
    logprobs, ref_logprobs, scores, values = rollout(2, 5)
    mask = torch.ones(2, 5)

    def call(**changed: object) -> None:
        good = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "scores": scores, "values": values, "mask": mask}
        rk.ppo_advantages(**{**good, "kl_coef": 0.1, **changed})

    call()
    for error, message, changed in (
        (ValueError, r"ref_logprobs has shape \[5\]", {"ref_logprobs": values[0]}),
        (ValueError, r"values has shape \[5, 2\]", {"values": values.T}),
        (ValueError, r"scores has shape \[1\]; .* takes \[2\]", {"scores": scores[:1]}),
        (ValueError, r"logprobs has shape \[5\]; it takes \[B, T\]", {"logprobs": logprobs[0]}),
        (TypeError, r"values is torch.int64", {"values": values.long()}),
        (TypeError, r"mask is None", {"mask": None}),
        (ValueError, r"kl_coef is -1", {"kl_coef": -1}),
        (ValueError, r"gamma is 1.5", {"gamma": 1.5}),
        (ValueError, r"lam is -0.1", {"lam": -0.1}),
    ):
        with pytest.raises(error, match=message):
            call(**changed)
