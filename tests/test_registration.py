"""Calls past the dispatcher: taken by plain tensors, never by what the dispatcher would treat otherwise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels as rk
from rlhf_kernels import dispatch
from rlhf_kernels.ops import registration

pytestmark = pytest.mark.skipif(dispatch.automatic("policy_loss", "cpu") is None, reason="no native module")


class _Notes:
    """What a mode has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Watching(_Notes, TorchDispatchMode):
    __torch_dispatch__ = _Notes.note


class WatchingFunctions(_Notes, TorchFunctionMode):
    __torch_function__ = _Notes.note


class Subclass(Tensor):
    pass


def _normal(seed: int = 0) -> Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))


OLD, ADVANTAGES = _normal(1), _normal(2)


def _loss(x: Tensor) -> Tensor:
    return rk.policy_loss(x, OLD, ADVANTAGES, clip_low=0.1)[0]


@pytest.mark.parametrize("x", [_normal(), _normal().requires_grad_(), Parameter(_normal()), _normal().bfloat16()])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, lambda: torch.autocast("cpu")])
def test_plain_tensors_go_past_the_dispatcher(x: Tensor, mode: Callable[[], AbstractContextManager]) -> None:
    """If this fails, torch has other dispatch keys than registration knows, and each call pays for the dispatcher."""
    with mode():
        assert registration.can_skip_dispatcher((x, None, x > 0, (1.0,), True))


@pytest.mark.parametrize("watching", [Watching, WatchingFunctions])
def test_a_mode_sees_the_op(watching: type[Watching | WatchingFunctions]) -> None:
    with watching() as mode:
        _loss(_normal().requires_grad_()).backward()
    assert "rlhf_kernels.policy_loss.default" in mode.seen


def test_a_profiler_sees_the_op() -> None:
    with torch.profiler.profile() as profile:
        _loss(_normal())
    assert "rlhf_kernels::policy_loss" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and looks at shapes
def test_a_trace_holds_the_op() -> None:
    traced = torch.jit.trace(_loss, _normal(), check_trace=False)
    assert torch.equal(traced(_normal(5)), _loss(_normal(5)))


def test_tensors_that_are_not_what_lies_in_memory() -> None:
    """A view with a pending negation, a wrapper that a transform left behind, memory elsewhere."""
    z = torch.complex(_normal(), _normal(1))
    negated = z.conj().imag
    assert negated.is_neg()
    assert torch.equal(_loss(negated), _loss(-z.imag))
    left: list[Tensor] = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(_normal())
    assert torch.equal(_loss(left[0]), _loss(_normal()))
    assert type(_loss(_normal().as_subclass(Subclass))) is Subclass
    with rk.use_backend("cpu"):
        assert rk.policy_loss(*(x.to("meta") for x in (_normal(), OLD, ADVANTAGES)))[0].is_meta
    x, expected = _normal(), _loss(_normal())
    with torch.device("meta"):  # where new tensors go unless asked otherwise
        assert torch.equal(_loss(x), expected)


def test_transforms() -> None:
    x = torch.stack([_normal(), _normal(5)])
    torch.testing.assert_close(torch.func.vmap(_loss)(x), torch.stack([*map(_loss, x)]))
    with torch.inference_mode():
        assert torch.equal(_loss(x[0]), _loss(_normal()))
