"""linear_kl: the exact KL between two heads' policies, from hidden states; neither's logits are in memory whole."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import linear, validate
from rlhf_kernels.ops.full_kl import DIRECTIONS
from rlhf_kernels.ops.linear_sweep import DEFAULT_WORKSPACE, Gradients, Head, Rows, Sweep
from rlhf_kernels.reference import full_kl as reference
from rlhf_kernels.reference.linear import head_logits

OP = "linear_kl"


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: Literal["reverse", "forward", "jsd"] = "reverse",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    workspace: int = DEFAULT_WORKSPACE,
) -> Tensor:
    """`full_kl` between the policies of two heads, from their hidden states.

    Equals `full_kl(logits, ref_logits, ...)` with logits as `linear_logprobs` defines them. Rows are compacted by the
    mask; two GEMMs forward, four backward (both logits again, dH, dW), none for a gradient that nobody asked for.
    The reference policy is a constant. The widths of the two models may differ, their vocabularies may not.

    Args:
        hidden, weight, bias: the policy's head, as in `linear_logprobs`; differentiable.
        ref_hidden, ref_weight, ref_bias: [..., D'], [V, D'] and [V], dtype of hidden: the reference's head.
        direction: as in `full_kl`.
        temperature, softcap, logit_scale: of both policies, as in `linear_logprobs`.
        mask: [...] bool or 0/1, true where the row counts; other rows cost nothing and are exactly 0.
        workspace: bytes of extra memory, at least three rows of logits; see `linear_logprobs`.

    Returns:
        [...] float32 (float64 for float64), nats.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    validate.choice(OP, "direction", direction, DIRECTIONS)
    scalars = (temperature, softcap, logit_scale, mask, workspace)
    call = linear.prepare(OP, hidden, weight, None, bias, *scalars)
    ref = linear.prepare(f"{OP} (reference)", ref_hidden, ref_weight, None, ref_bias, *scalars)
    if ref.labels.shape != call.labels.shape or ref.hidden.device != hidden.device:
        raise ValueError(
            f"{OP}: ref_hidden is {list(ref_hidden.shape)} on {ref.hidden.device}; with this hidden it takes "
            f"{[*call.labels.shape, 'D']} on {hidden.device}"
        )
    if ref.weight.shape[0] != weight.shape[0] or ref.hidden.dtype != call.hidden.dtype:
        raise ValueError(
            f"{OP}: ref_weight is {list(ref_weight.shape)} {ref.hidden.dtype}; with this weight it takes "
            f"[{weight.shape[0]}, D'] {call.hidden.dtype}"
        )
    if dispatch.kernel(OP, call.hidden) is None:
        logits, ref_logits = (
            head_logits(x.hidden, x.weight, x.bias, x.mask, softcap, logit_scale) for x in (call, ref)
        )
        return reference.full_kl(logits, ref_logits.detach(), call.mask, call.divisor, direction)
    other_hidden, other_weight, _, other_bias, *_ = ref.flat()
    constants = (other_hidden.detach(), other_weight.detach(), None if other_bias is None else other_bias.detach())
    flat = list(call.flat())
    del flat[9:], flat[2]
    kl, _ = _forward(*flat, *constants, DIRECTIONS.index(direction), workspace)
    return kl.view(call.labels.shape)


class _Pair:
    """Both heads' sweeps in step, chunk by chunk, with the temperature of the backend's full_kl."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        ref_hidden: Tensor,
        ref_head: Head,
        mask: Tensor | None,
        workspace: int,
    ) -> None:
        labels = torch.zeros(hidden.shape[:2].numel(), dtype=torch.int64, device=hidden.device)
        # Logits of both, and the gradient beside them.
        per_row = 3 * head.weight.shape[0] + hidden.shape[-1] + ref_hidden.shape[-1]
        rows = max(1, workspace // (per_row * hidden.element_size()))
        self.own, self.other = (
            Sweep(OP, x, y, labels, mask, workspace, keep=True, rows=rows)
            for x, y in ((hidden, head), (ref_hidden, ref_head))
        )

    def __iter__(self) -> Any:
        for rows, other in zip(self.own, self.other, strict=True):
            logits, ref_logits = self.own.logits(rows), self.other.logits(other)
            yield (
                rows,
                (logits.unsqueeze(0), ref_logits.unsqueeze(0), None, self.own.head.temperature, rows.temperature),
            )

    def slope(self, rows: Rows, grad: Tensor) -> Tensor:
        """grad by the logits -> grad by the products; the logits in rows are used up."""
        head = self.own.head
        if head.softcap is not None and rows.products is not None:  # d softcap * tanh(x * scale / softcap)
            slope = rows.products.div_(head.softcap).square_().neg_().add_(1).mul_(head.logit_scale)
            grad.mul_(slope)
        return grad


@torch.library.custom_op("rlhf_kernels::linear_kl", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    softcap: Tensor | None,
    logit_scale: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    direction: int,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """hidden [O, I, D], ref_hidden [O, I, D'] -> KL [N = O*I] and what the backend's gradient needs [N, 5]."""
    scalars = (temperature, row_temperature, softcap, logit_scale, 0, "", False)
    head, ref_head = linear.head_of_call(weight, bias, *scalars), linear.head_of_call(ref_weight, ref_bias, *scalars)
    count = hidden.shape[:2].numel()
    kl, stats = (hidden.new_zeros(shape, dtype=torch.float32) for shape in ((count,), (count, 5)))
    pair = _Pair(hidden, head, ref_hidden, ref_head, mask, workspace)
    for rows, arguments in pair:
        kl[rows.places], stats[rows.places] = pair.own.backend.full_kl_fwd(*arguments, direction)
    return kl, stats


@_forward.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    count = hidden.shape[0] * hidden.shape[1]
    return hidden.new_empty(count, dtype=torch.float32), hidden.new_empty((count, 5), dtype=torch.float32)


@torch.library.custom_op("rlhf_kernels::linear_kl_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    softcap: Tensor | None,
    logit_scale: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    stats: Tensor,
    direction: int,
    workspace: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [O, I, D], weight and bias; zero elements for one that is not wanted."""
    scalars = (temperature, row_temperature, softcap, logit_scale, 0, "", False)
    head, ref_head = linear.head_of_call(weight, bias, *scalars), linear.head_of_call(ref_weight, ref_bias, *scalars)
    pair = _Pair(hidden, head, ref_hidden, ref_head, mask, workspace)
    gradients = Gradients(pair.own, hidden, (want_hidden, want_weight, want_bias))
    for rows, arguments in pair:
        by_logits = pair.own.backend.full_kl_bwd(grad[rows.places], *arguments, direction, stats[rows.places])
        products = pair.slope(rows, by_logits.view(arguments[0].shape[1:]))
        tiles = ((part, products[:, part]) for part in pair.own.parts())
        gradients.add(rows._replace(products=products), tiles)
    return gradients.finish()


@_backward.register_fake
def _(grad: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return linear.empty_gradients(hidden, weight, bias, *rest[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, direction, workspace = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = direction, workspace


def _autograd(ctx: Any, grad: Tensor | None, _grad_stats: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad is not None:
        found = _backward(grad, *ctx.saved_tensors, *ctx.options, *wanted)
        grads = tuple(x if want else None for x, want in zip(found, wanted, strict=True))
    return *grads, *(None,) * 10


_forward.register_autograd(_autograd, setup_context=_setup_context)
