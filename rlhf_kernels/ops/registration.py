"""Registers ops with torch.library by its lower-level calls: half the time per call of torch.library.custom_op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("rlhf_kernels", "FRAGMENT")


def register(
    implementation: Callable[..., Any], fake: Callable[..., Any], function: type[torch.autograd.Function]
) -> torch._ops.OpOverload:
    """The op `rlhf_kernels::NAME`, NAME that of `implementation` without its leading underscore, differentiable in its
    first argument.

    implementation: typed, so that its signature is the op's schema; mutates nothing, returns fresh tensors.
    fake: the same signature, the outputs' shapes and dtypes alone.
    function: `forward(ctx, op, first, rest)` returns `op(first, *rest)` and saves what backward needs;
        `backward` returns None, the gradient of `first`, None.
    """
    name = implementation.__name__.removeprefix("_")
    schema = torch.library.infer_schema(implementation, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlhf_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.rlhf_kernels, name).default

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def autograd(first: Tensor, *rest: Any) -> Any:
        if first.requires_grad and torch.is_grad_enabled():
            return function.apply(below_autograd, first, rest)  # one tuple: apply looks at each argument
        return below_autograd(first, *rest)

    _library.impl(name, autograd, "Autograd")
    return op
