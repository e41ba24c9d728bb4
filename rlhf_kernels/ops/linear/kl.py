"""linear_kl: the exact KL between two heads' policies, from hidden states; neither's logits are in memory whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.ops.autograd import first_derivative, register_autograd
from rlhf_kernels.ops.full_kl import DIRECTIONS, Direction
from rlhf_kernels.ops.linear.call import GRADIENTS, SCHEMA, LinearCall, Lora, Wanted, prepare, split
from rlhf_kernels.ops.linear.chunks import DEFAULT_WORKSPACE, TILE_BYTES, RowChunk
from rlhf_kernels.ops.linear.gradients import Gradients
from rlhf_kernels.ops.linear.shards import gathered, merged_kl, summed
from rlhf_kernels.reference import full_kl as reference
from rlhf_kernels.reference.linear import head_logits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_kl"


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    lora: Lora | Sequence[Lora] | None = None,
    ref_lora: Lora | Sequence[Lora] | None = None,
    direction: Direction = "reverse",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    logits_dtype: torch.dtype | None = torch.float32,
    workspace: int = DEFAULT_WORKSPACE,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """`full_kl` between the policies of two heads, from their hidden states.

    Equals `full_kl(logits, ref_logits, ...)` with logits as `linear_logprobs` defines them. Rows are compacted by the
    mask; two GEMMs forward, four backward (both logits again, dH, dW), none for a gradient that nobody asked for.
    The reference policy is a constant. The widths of the two models may differ, their vocabularies may not.

    Args:
        hidden, weight, bias, lora: the policy's head, as in `linear_logprobs`; differentiable.
        ref_hidden, ref_weight, ref_bias, ref_lora: [..., D'], [V, D'], [V] and (A, B, scale), dtype of hidden: the
            reference's head.
        direction: as in `full_kl`.
        temperature, softcap, logit_scale: of both policies, as in `linear_logprobs`.
        mask: [...] bool or 0/1, true where the row counts; other rows cost nothing and are exactly 0.
        logits_dtype: as in `linear_logprobs`.
        workspace: bytes of extra memory, at least three rows of logits; see `linear_logprobs`.
        process_group: both heads are this rank's rows of a vocabulary sharded alike over the group's ranks; see
            `linear_logprobs`. One all-gather of five numbers a row of a chunk, for jsd also an all-reduce of two.

    Returns:
        [...] float32 (float64 for float64), nats.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    validate.choice(OP, "direction", direction, DIRECTIONS)
    shared: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    shared |= {"mask": mask, "logits_dtype": logits_dtype, "workspace": workspace}
    shared["process_group"] = process_group
    call = prepare(OP, hidden, weight, None, bias=bias, lora=lora, **shared)
    reference_op = f"{OP} (reference)"
    ref = prepare(reference_op, ref_hidden, ref_weight, None, bias=ref_bias, lora=ref_lora, **shared, sharded_like=call)
    if ref.labels.shape != call.labels.shape or ref.hidden.device != hidden.device:
        raise ValueError(
            f"{OP}: ref_hidden is {list(ref_hidden.shape)} on {ref.hidden.device}; with this hidden it takes "
            f"{[*call.labels.shape, 'D']} on {hidden.device}"
        )
    if ref.weight.shape[0] != call.weight.shape[0] or ref.hidden.dtype != call.hidden.dtype:
        raise ValueError(
            f"{OP}: ref_weight is {list(ref_weight.shape)} {ref.hidden.dtype}; with this weight it takes "
            f"[{call.weight.shape[0]}, D'] {call.hidden.dtype}"
        )
    if dispatch.select_backend(OP, call.hidden) is None:
        if call.group:
            raise NotImplementedError(f"{OP}: process_group needs a kernel; there is none for this dtype and backend")
        logits, ref_logits = (head_logits(**x.reference_arguments()) for x in (call, ref))
        return reference.full_kl(logits, ref_logits.detach(), call.mask, call.divisor, direction)
    kl, _ = _forward(*call.by_rows(), *ref.detached().by_rows().head_inputs, DIRECTIONS.index(direction))
    return kl.view(call.labels.shape)


class _Pair:
    """Both heads' sweeps in step, chunk by chunk, with the divergence of the backend's full_kl."""

    def __init__(self, call: LinearCall, ref: LinearCall, direction: int) -> None:
        # Logits of both, and the gradient beside them.
        per_row = 3 * call.largest_shard_rows + call.hidden.shape[-1] + ref.hidden.shape[-1]
        backend = dispatch.backend_module(dispatch.require_backend(OP, call.hidden))
        size = backend.logits_dtype(call.hidden.dtype, call.fp32_logits).itemsize
        rows = max(1, call.workspace // (per_row * size))
        self.own, self.other = (x.sweep(OP, keep=True, rows=rows) for x in (call, ref))
        self._group, self._direction = call.group, direction

    def __iter__(self) -> Iterator[tuple[RowChunk, Tensor, Tensor]]:
        for rows, other in zip(self.own, self.other, strict=True):
            yield rows, self.own.logits(rows).unsqueeze(0), self.other.logits(other).unsqueeze(0)

    def divergence(self, chunk: RowChunk, logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of a chunk: KL [R] and what the gradient needs [R, 5]."""
        jsd = DIRECTIONS[self._direction] == "jsd"
        forward, scalars = self.own.backend.full_kl_fwd, (None, self.own.head_temperature, chunk.temperature)
        if not self._group:
            return forward(logits, ref_logits, *scalars, self._direction)
        # The mixture needs both sums over all shards first: those of the reverse divergence.
        _, stats = forward(logits, ref_logits, *scalars, 0 if jsd else self._direction)
        temperature = self.own.temperature(chunk)
        kl, whole = merged_kl(gathered(stats.double(), self._group), temperature, self._direction == 1)
        if jsd:
            spoilt = (whole[:, 1] + whole[:, 3]).isnan()
            halves = summed(self._halves(chunk, logits, ref_logits, whole), self._group)
            kl = torch.where(spoilt, float("nan"), halves.sum(1) / 2)
            whole[:, 4] = halves[:, 0]
        return kl.float(), whole.float()

    def _halves(self, chunk: RowChunk, logits: Tensor, ref_logits: Tensor, whole: Tensor) -> Tensor:
        """This shard's part of KL(p || m) and KL(q || m) [R, 2] float64.

        From jsd's gradient with 0 for their totals, (g / 2T) p log(p / m): terms of both signs that nearly cancel where
        p is near q, so none is rounded to 16 bits. A few rows at a time: there is room for a third matrix of logits.
        """
        (_, count, vocab), size = logits.shape, logits.element_size()
        whole = torch.where(torch.arange(5, device=whole.device) == 4, 0.0, whole).float()
        g = (torch.zeros_like(whole[:, 0]) + 2 * self.own.temperature(chunk)).float()
        halves = whole.new_empty((count, 2), dtype=torch.float64)
        wide = 12 + (8 if size < 4 else 0)  # bytes: the terms, their float64 copy, and what logits are in 16 bits
        step = max(1, min(count * size, TILE_BYTES // vocab) // wide)
        for some in (slice(start, start + step) for start in range(0, count, step)):
            x, y = (side[:, some].float() for side in (logits, ref_logits))
            own = whole[some]
            temperature = None if chunk.temperature is None else chunk.temperature[some]
            scalars = (None, self.own.head_temperature, temperature, DIRECTIONS.index("jsd"))
            for half, (a, b, stats) in enumerate(((x, y, own), (y, x, own[:, [2, 3, 0, 1, 4]]))):
                terms = self.own.backend.full_kl_bwd(g[some], a, b, *scalars, stats.contiguous())
                halves[some, half] = terms.view(-1, vocab).sum(-1, dtype=torch.float64)
        return halves

    def gradient(self, chunk: RowChunk, logits: Tensor, ref_logits: Tensor, grad: Tensor, stats: Tensor) -> Tensor:
        """grad [R] -> gradient of the chunk's products [R, V]; its logits are used up."""
        scalars = (None, self.own.head_temperature, chunk.temperature)
        by_logits = self.own.backend.full_kl_bwd(grad, logits, ref_logits, *scalars, self._direction, stats)
        return self.slope(chunk, by_logits.view(logits.shape[1:]))

    def slope(self, chunk: RowChunk, grad: Tensor) -> Tensor:
        """grad by the logits -> grad by the products; the logits in rows are used up."""
        own = self.own
        if own.softcap is not None and chunk.logits_before_bias is not None:  # d softcap * tanh(x * scale / softcap)
            slope = chunk.logits_before_bias.div_(own.softcap).square_().neg_().add_(1).mul_(own.logit_scale)
            grad.mul_(slope)
        return grad


_SCHEMA = (
    f"{SCHEMA}, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, Tensor? ref_lora_a, Tensor? ref_lora_b, "
    f"int direction"
)


def _pair(arguments: Sequence[Any]) -> tuple[LinearCall, _Pair, Sequence[Any]]:
    """The policy's call, both sweeps, and what is left of a registered op's arguments."""
    call, rest = split(arguments)
    count = len(Wanted._fields)
    ref = call.with_head_inputs(rest[:count])
    return call, _Pair(call, ref, rest[count]), rest[count + 1 :]


@torch.library.custom_op("rlhf_kernels::linear_kl", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """KL [N] and what the backend's gradient needs [N, 5]."""
    call, pair, _ = _pair(arguments)
    count = call.labels.shape[0]
    kl, stats = (call.hidden.new_zeros(shape, dtype=torch.float32) for shape in ((count,), (count, 5)))
    for rows, logits, ref_logits in pair:
        kl[rows.row_indices], stats[rows.row_indices] = pair.divergence(rows, logits, ref_logits)
    return kl, stats


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, _ = split(arguments)
    count, new = call.labels.shape[0], call.hidden.new_empty
    return new(count, dtype=torch.float32), new((count, 5), dtype=torch.float32)


@torch.library.custom_op(
    "rlhf_kernels::linear_kl_backward",
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor grad, Tensor stats, bool[] wanted) -> ({GRADIENTS})",
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the policy's head inputs; zero elements for one that is not wanted."""
    _, pair, (grad, stats, wanted) = _pair(arguments)
    gradients = Gradients(pair.own, Wanted(*wanted))
    for rows, logits, ref_logits in pair:
        products = pair.gradient(rows, logits, ref_logits, grad[rows.row_indices], stats[rows.row_indices])
        gradients.add(
            rows._replace(logits_before_bias=products),
            ((columns, products[:, columns]) for columns in pair.own.column_tiles()),
        )
    return gradients.finish()


@_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, (*_, wanted) = split(arguments)
    return call.empty_gradients(Wanted(*wanted))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, (*ref_inputs, direction) = split(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*ref_inputs, output[1], *call.tensors())
    ctx.call, ctx.direction = call.without_tensors(), direction


def _autograd(ctx: Any, grad: Tensor | None, _grad_stats: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad is None:
        return tuple(grads)
    count = len(Wanted._fields)
    saved = ctx.saved_tensors  # read once: checkpointing unpacks each tensor a single time
    *ref_inputs, stats = (None if x is None else x.detach() for x in saved[: count + 1])
    call = ctx.call.with_tensors(saved[count + 1 :])
    wanted = Wanted(*ctx.needs_input_grad[:count])
    found = _backward(*call.detached(), *ref_inputs, ctx.direction, grad.detach(), stats, wanted)
    grads[:count] = [x if want else None for x, want in zip(found, wanted, strict=True)]
    return first_derivative(OP, call.head_inputs, *grads)


register_autograd(_forward, _autograd, _setup_context)
