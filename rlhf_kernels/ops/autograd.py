"""What the ops' backward passes share: the error of whoever differentiates a gradient once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FirstDerivative(torch.autograd.Function):
    """Gradients as they are; their own derivative raises."""

    @staticmethod
    def forward(ctx: Any, op: str, _output: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.op}: its kernels have no second derivative; under rlhf_kernels.use_backend('reference') it has one"
        )


def first_derivative(op: str, output: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a backward returns: `grads`, and under create_graph=True a graph in which their own derivative raises.

    output: one of the op's differentiable outputs, as saved for the backward. It leads to the inputs, so that the error
    is on every way from a gradient to them, whether or not the upstream gradient requires one; and it costs no memory.
    """
    if not torch.is_grad_enabled() or not output.requires_grad:
        return grads
    found = iter(_FirstDerivative.apply(op, output, *(grad for grad in grads if grad is not None)))
    return tuple(None if grad is None else next(found) for grad in grads)
