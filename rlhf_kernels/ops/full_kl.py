"""The exact KL between two policies' logits, over the whole vocabulary."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import rows, validate
from rlhf_kernels.ops.autograd import first_derivative, register_autograd
from rlhf_kernels.reference import full_kl as reference

OP = "full_kl"
Direction = Literal["reverse", "forward", "jsd"]
DIRECTIONS = ("reverse", "forward", "jsd")


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: Direction = "reverse",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """KL divergence of each row's two distributions, summed over the whole vocabulary: no sampling, no estimator.

    Equals, with `log_p = (logits.float() / temperature).log_softmax(-1)`, `log_q` the same of ref_logits and
    `log_m = torch.logaddexp(log_p, log_q) - math.log(2)`:

    - "reverse", KL(pi || ref): `(log_p.exp() * (log_p - log_q)).sum(-1)`
    - "forward", KL(ref || pi): `(log_q.exp() * (log_q - log_p)).sum(-1)`
    - "jsd", Jensen-Shannon: half of `(log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)`

    and is exactly 0 at masked rows and where the two rows are equal. Reverse and forward read both tensors once, jsd
    twice (a CPU finds the row in its cache the second time).

    Args:
        logits: [..., V] float32, float16, bfloat16 (kernels) or float64 (reference): the policy pi. Differentiable.
        ref_logits: [..., V], the reference policy, a constant. Strided on its own. Where the two dtypes differ, both
            are promoted to their common one, which copies the narrower once. Rows may be strided; if the last
            dimension of either is not contiguous, that one is copied once. -inf is a legal logit in both.
        direction: see above.
        temperature: > 0, of both policies; a float, or a tensor that broadcasts to [...] for one temperature per row.
            Not differentiable.
        mask: [...] bool or 0/1, true where the row counts; masked rows are never read, their gradient is 0.

    Returns:
        [...] float32 (float64 for float64 logits), nats, >= 0 but for rounding; jsd is at most log 2.
        A token at -inf on both sides adds nothing. At -inf in ref_logits alone it makes reverse +inf, and then that
        row's gradient NaN; at -inf in logits alone it makes forward +inf, whose gradient (p - q) / T stays finite.
        A row of only -inf, or with NaN or +inf, in either tensor gives NaN for that row.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    shape, _ = rows.check_logits(OP, "logits", logits)
    validate.float_like(OP, "ref_logits", ref_logits, "logits", logits)
    validate.choice(OP, "direction", direction, DIRECTIONS)
    given, mask = mask, validate.bool_mask(OP, mask, "logits", shape, logits.device)
    dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
    logits, ref_logits = logits.to(dtype), ref_logits.detach().to(dtype)
    row_temperature = rows.row_temperature(OP, temperature, logits, shape, mask, given)
    if rows.reading_is_free(logits):
        rows.positive(OP, row_temperature)

    if dispatch.select_backend(OP, logits) is None:
        return reference.full_kl(
            logits, ref_logits, mask, temperature if row_temperature is None else row_temperature, direction
        )
    kl, _ = _forward(
        rows.as_rows(logits),
        rows.as_rows(ref_logits),
        rows.flat(mask),
        rows.scalar(temperature),
        rows.flat(row_temperature),
        DIRECTIONS.index(direction),
    )
    return kl.view(shape)


@torch.library.custom_op("rlhf_kernels::full_kl", mutates_args=())
def _forward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    direction: int,
) -> tuple[Tensor, Tensor]:
    """logits, ref_logits [O, I, V], temperature [], mask, row_temperature [N = O*I] -> KL [N] and, for the gradient,
    (max, log s) of both rows and a mean over pi [N, 5]."""
    backend = dispatch.backend_module(dispatch.require_backend(OP, logits))
    return backend.full_kl_fwd(logits, ref_logits, mask, temperature.item(), row_temperature, direction)


@_forward.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    count = logits.shape[0] * logits.shape[1]
    return logits.new_empty(count, dtype=torch.float32), logits.new_empty((count, 5), dtype=torch.float32)


@torch.library.custom_op("rlhf_kernels::full_kl_backward", mutates_args=())
def _backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    direction: int,
    stats: Tensor,
) -> Tensor:
    backend = dispatch.backend_module(dispatch.require_backend(OP, logits))
    return backend.full_kl_bwd(grad, logits, ref_logits, mask, temperature.item(), row_temperature, direction, stats)


@_backward.register_fake
def _(grad: Any, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, direction = inputs
    stats = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(*tensors, stats)
    ctx.direction = direction


def _autograd(ctx: Any, grad: Tensor | None, _grad_stats: None) -> tuple[Tensor | None, ...]:
    *tensors, stats = ctx.saved_tensors
    grad_logits = None
    if grad is not None:
        inputs = (None if x is None else x.detach() for x in tensors)
        grad_logits = _backward(grad.detach(), *inputs, ctx.direction, stats)
    return *first_derivative(OP, tensors[:1], grad_logits), None, None, None, None, None


register_autograd(_forward, _autograd, _setup_context)
