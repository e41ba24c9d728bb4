"""What the ops' backward passes share: the error of whoever differentiates a gradient once more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import dispatch


class _FirstDerivative(torch.autograd.Function):
    """Gradients as they are; their own derivative raises."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *inputs_and_grads: Tensor) -> tuple[Tensor, ...]:
        """inputs_and_grads: `count` inputs, which lead on in the graph, and the gradients."""
        ctx.op = op
        return tuple(grad.view_as(grad) for grad in inputs_and_grads[count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.op}: its kernels have no second derivative; under rlhf_kernels.use_backend('reference') it has one"
        )


def first_derivative(op: str, inputs: Iterable[Tensor | None], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a backward returns: `grads`, and under create_graph=True a graph in which their own derivative raises.

    inputs: the op's inputs, as saved for the backward. Those that require a gradient lead on, so that the error is on
    every way from a gradient to any of them, whether or not the upstream gradient requires one.
    """
    if not torch.is_grad_enabled():
        return grads
    sources = [x for x in inputs if x is not None and x.requires_grad]
    if not sources:
        return grads
    found = iter(_FirstDerivative.apply(op, len(sources), *sources, *(grad for grad in grads if grad is not None)))
    return tuple(None if grad is None else next(found) for grad in grads)


def under_the_forwards_backend(ctx: Any) -> AbstractContextManager[None]:
    """The backend that was forced in the forward, whatever is where the backward is called."""
    return nullcontext() if ctx.forced == dispatch.forced() else dispatch.use_backend(ctx.forced)


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """`op.register_autograd`, with the forward's choice of backend for the backward too."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forced = dispatch.forced()
        setup_context(ctx, inputs, output)

    def same_backend(ctx: Any, *grads: Any) -> Any:
        with under_the_forwards_backend(ctx):
            return backward(ctx, *grads)

    op.register_autograd(same_backend, setup_context=setup)
