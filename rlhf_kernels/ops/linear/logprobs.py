"""linear_logprobs: logprob and entropy of each row's label, straight from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.ops.autograd import first_derivative
from rlhf_kernels.ops.linear.call import GRADIENTS, LEAVES, SCHEMA, TENSORS, Call, Inputs, Lora, prepare, split
from rlhf_kernels.ops.linear.chunks import DEFAULT_WORKSPACE
from rlhf_kernels.ops.linear.gradients import Gradients
from rlhf_kernels.ops.linear.logprob_gradient import LogprobGradient, scale_rows_
from rlhf_kernels.reference import linear as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_logprobs"


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    lora: Lora | Sequence[Lora] | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[False] = ...,
    workspace: int = ...,
    process_group: ProcessGroup | None = ...,
    batch_invariant: bool = ...,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    lora: Lora | Sequence[Lora] | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True, "detached"],
    workspace: int = ...,
    process_group: ProcessGroup | None = ...,
    batch_invariant: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | Sequence[Lora] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool | Literal["detached"] = False,
    workspace: int = DEFAULT_WORKSPACE,
    process_group: ProcessGroup | None = None,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's label, and on request its entropy, from hidden states; logits are never in memory.

    Equals `selected_logprobs(logits, labels, temperature=..., mask=..., with_entropy=...)` with
    `logits = (hidden @ weight.T + bias) * logit_scale`, and `softcap * tanh(logits / softcap)` if a softcap is given.
    Rows are compacted by the mask first, so a masked row costs nothing; one GEMM forward, three backward (the logits
    again, dH, dW), none for a gradient that nobody asked for. Where weight wants a gradient and at most D rows count
    (of several chunks, in the first), memory of the weight's size is taken in the forward already: it keeps their
    logits, which are then not made again, and becomes the gradient. Each such call holds [V, D] until its backward.
    Where hidden alone wants one (a frozen head) and no entropy's, d logprob / d hidden is formed in the forward, two
    GEMMs in all, and kept in hidden's dtype in the memory of dH; the backward multiplies it by the upstream gradient.
    Under autocast hidden, weight and bias are cast as for torch.nn.functional.linear. On a CPU without arithmetic for
    16 bits products are float32, of the weight widened tile by tile.

    Args:
        hidden: [..., D] float32, float16, bfloat16 (kernels) or float64 (reference). Not read at masked rows.
        weight: [V, D], dtype and device of hidden; may be tied to an embedding.
        labels: [...] int64 or int32 in [0, V); anything at masked rows.
        bias: [V], dtype of weight, or None. -inf there masks a token out of the vocabulary.
        lora: (A, B, scale), A [r, D] and B [V, r] float: the head is weight + scale * B @ A, which is never formed. A
            list of such sums them. A and B may be wider than weight (PEFT's are float32); each gradient is in its
            tensor's dtype. With a frozen weight there is no GEMM of its size for it.
        temperature: > 0; a float, or a tensor that broadcasts to [...] for one temperature per row. Not differentiable.
        softcap: > 0, bound of |logit| (Gemma 2, arXiv:2408.00118), or None.
        logit_scale: > 0, factor of the logits before the softcap (Cohere; 1 / logits_scaling of Granite).
        mask: [...] bool or 0/1, true where the row counts. On a GPU a mask costs one host sync: how many rows count.
        with_entropy: also return the entropy, differentiable as logprobs are; "detached": as a statistic, without a
            gradient, which saves a frozen head a GEMM.
        workspace: bytes of extra memory, at least one row's logits whatever it says. A 16-bit weight that needs a
            gradient adds one fp32 accumulator of its size where the rows do not fit one chunk.
        process_group: weight, bias and B are this rank's rows of a vocabulary sharded over the group's ranks, in their
            order; hidden, A, labels and mask are the same on all. One all-gather of a few numbers a row in the forward,
            one all-reduce of dH in the backward; kernels only (not float64).
        batch_invariant: a row's logprob has the same bits alone and in any batch, at a given number of threads: the
            GEMM is cut into pieces of one shape, 64 rows by 4096 tokens. Gradients are not included.

    Returns:
        logprobs [...] float32 (float64 for float64), nats; with `with_entropy`, (logprobs, entropy). Exactly 0, and
        gradient 0, at masked rows.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
        IndexError: on CPU, an unmasked label outside [0, V). On a GPU that row is NaN instead (no sync);
            RLHF_KERNELS_CHECK=1 makes it raise there too.
    """
    call = prepare(
        *(OP, hidden, weight, labels, bias, lora, temperature, softcap, logit_scale, mask, workspace, process_group)
    )
    validate.choice(OP, "with_entropy", with_entropy, (False, True, "detached"))
    logprobs, entropy = logprobs_of(call._replace(invariant=batch_invariant), with_entropy)
    return logprobs if entropy is None else (logprobs, entropy)


def logprobs_of(call: Call, with_entropy: bool | Literal["detached"]) -> tuple[Tensor, Tensor | None]:
    """linear_logprobs of a checked call."""
    shape = call.labels.shape
    if dispatch.select_backend(OP, call.hidden) is None:
        if call.group:
            raise NotImplementedError(f"{OP}: process_group needs a kernel; there is none for this dtype and backend")
        scalars = (call.divisor, call.softcap, call.logit_scale)
        logprobs, entropy = reference.linear_logprobs(
            *call.leaves, call.labels, call.mask, *scalars, bool(with_entropy)
        )
    else:
        kept = _kept(call, bool(with_entropy) and with_entropy != "detached")
        logprobs, entropy, *_ = _forward(*call.flat(), bool(with_entropy), kept)
        logprobs, entropy = logprobs.view(shape), entropy.view(shape) if with_entropy else None
    return logprobs, entropy.detach() if with_entropy == "detached" and entropy is not None else entropy


Kept = Literal["nothing", "products", "unit"]


def _kept(call: Call, entropy_has_gradient: bool) -> Kept:
    """What the forward leaves for the backward: either saves a GEMM in memory that a gradient will take anyhow."""
    if not torch.is_grad_enabled():
        return "nothing"
    hidden, *others = (x is not None and x.requires_grad for x in call.leaves)
    if call.weight.requires_grad:  # the logits, in the memory of dW; a compiled graph would copy it
        return "nothing" if torch.compiler.is_compiling() else "products"
    alone = hidden and not any(others) and call.lora_a is None and not entropy_has_gradient
    return "unit" if alone else "nothing"


@torch.library.custom_op(
    "rlhf_kernels::linear_logprobs",
    mutates_args=(),
    schema=f"({SCHEMA}, bool with_entropy, str keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """logprobs [N], entropy [N] or [0], (max, log s) [N, 2], and what is kept.

    keep: "products": the first chunk's, in memory for dW, or [0]: how many rows count is not known before. "unit":
    d logprob / d hidden, of hidden's shape. "nothing": [0].
    """
    call, (with_entropy, keep) = split(arguments)
    count = call.labels.shape[0]
    new = call.hidden.new_zeros
    logprobs, stats = new(count, dtype=torch.float32), new((count, 2), dtype=torch.float64)
    entropy = new(count if with_entropy else 0, dtype=torch.float32)
    sweep, weight = call.sweep(OP), call.weight
    if keep == "products" and sweep.fits_weight_gradient():
        sweep.logits_buffer = sweep.backend.allocate(tuple(weight.shape), weight.dtype, weight.device)
    kept = weight.new_empty(0) if sweep.logits_buffer is None else sweep.logits_buffer
    if keep == "unit":
        kept = torch.zeros(call.hidden.shape, dtype=call.hidden.dtype, device=call.hidden.device)
    for chunk in sweep:
        unit = LogprobGradient(sweep, chunk) if keep == "unit" else None
        chunk_logprobs, chunk_entropy, chunk_stats = sweep.softmax(
            chunk, with_entropy, None if unit is None else unit.add
        )
        logprobs[chunk.row_indices], stats[chunk.row_indices] = chunk_logprobs, chunk_stats
        if with_entropy:
            entropy[chunk.row_indices] = chunk_entropy
        if unit is not None:
            unit.store(kept.flatten(0, 1), chunk_logprobs, chunk_stats)
    return logprobs, entropy, stats, kept


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, (with_entropy, keep) = split(arguments)
    count, new = call.labels.shape[0], call.hidden.new_empty
    shape = {"nothing": (0,), "products": call.weight.shape, "unit": call.hidden.shape}[keep]
    return (
        new(count, dtype=torch.float32),
        new(count if with_entropy else 0, dtype=torch.float32),
        new((count, 2), dtype=torch.float64),
        new(shape),
    )


_BACKWARD = "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor entropy, Tensor stats, bool[] wanted"


def _gradients(arguments: Sequence[Any], weight_gradient: Tensor | None) -> tuple[Tensor, ...]:
    """weight_gradient: memory for it."""
    call, (grad_logprobs, grad_entropy, entropy, stats, wanted, kept) = split(arguments)
    sweep = call.sweep(OP, wanted=wanted, logits_buffer=kept if kept.numel() else None)
    gradients = Gradients(sweep, call.hidden, wanted, weight_gradient)
    for chunk in sweep:
        g, g_entropy = (None if x is None else x[chunk.row_indices] for x in (grad_logprobs, grad_entropy))
        chunk_entropy = entropy if g_entropy is None else entropy[chunk.row_indices]
        coefficients = sweep.coefficients(chunk, g, g_entropy, stats[chunk.row_indices], chunk_entropy)
        gradients.add(chunk, sweep.gradient_tiles(chunk, coefficients))
    return gradients.finish()


@torch.library.custom_op(
    "rlhf_kernels::linear_logprobs_backward",
    mutates_args=(),
    schema=f"({SCHEMA}, {_BACKWARD}, Tensor kept) -> ({GRADIENTS})",
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the call's leaves; zero elements for one that is not wanted. kept: the forward's, only read."""
    return _gradients(arguments, None)


@_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, (*_, wanted, _kept) = split(arguments)
    return call.empty_gradients(wanted)


@torch.library.custom_op(
    "rlhf_kernels::linear_logprobs_backward_",
    mutates_args=("kept",),
    schema=f"({SCHEMA}, {_BACKWARD}, Tensor(a!) kept) -> ({GRADIENTS})",
)
def _backward_in_place(*arguments: Any) -> tuple[Tensor, ...]:
    """The same from the forward's products in `kept`, which becomes dW; the weight's place in the result is empty."""
    kept = arguments[-1]
    found = list(_gradients(arguments, kept))
    found[1] = kept.new_empty(0)
    return tuple(found)


@_backward_in_place.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, (*_, wanted, _kept) = split(arguments)
    return call.empty_gradients([wanted[0], False, *wanted[2:]])


@torch.library.custom_op(
    "rlhf_kernels::linear_logprobs_from_unit",
    mutates_args=(),
    schema="(Tensor unit, Tensor grad_logprobs, Tensor? mask) -> Tensor",
)
def _from_unit(unit: Tensor, grad: Tensor, mask: Tensor | None) -> Tensor:
    """dH of hidden's shape [O, I, D] from the forward's d logprob / d hidden and the upstream gradient [N]."""
    found = unit.clone()
    scale_rows_(found.flatten(0, 1), grad, mask)
    return found


@_from_unit.register_fake
def _(unit: Tensor, _grad: Tensor, _mask: Tensor | None) -> Tensor:
    return torch.empty_like(unit)


@torch.library.custom_op(
    "rlhf_kernels::linear_logprobs_from_unit_",
    mutates_args=("unit",),
    schema="(Tensor(a!) unit, Tensor grad_logprobs, Tensor? mask) -> ()",
)
def _from_unit_in_place(unit: Tensor, grad: Tensor, mask: Tensor | None) -> None:
    """The same over the unit gradient."""
    scale_rows_(unit.flatten(0, 1), grad, mask)


def graph_is_kept() -> bool:
    """Whether the backward now running was called with retain_graph=True; a torch that does not say so: yes."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, entropy, stats, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, kept)
    *ctx.scalars, ctx.with_entropy, ctx.keep = inputs[TENSORS:]
    if ctx.keep == "unit":
        ctx.save_for_backward(inputs[Inputs._fields.index("mask")], kept, logprobs)
    else:
        ctx.save_for_backward(*inputs[:TENSORS], entropy, stats, kept, logprobs)


def _autograd(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _stats: None, _kept: None
) -> tuple[Tensor | None, ...]:
    if not ctx.with_entropy:
        grad_entropy = None
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_logprobs is None and grad_entropy is None:
        return tuple(grads)
    *saved, kept, logprobs = ctx.saved_tensors  # read once: checkpointing unpacks each tensor a single time
    grad_logprobs, grad_entropy = (None if x is None else x.detach() for x in (grad_logprobs, grad_entropy))
    # Another backward may need it once more; a graph (a fake or functional tensor) must not write into what it saved.
    in_place = type(kept) is Tensor and not graph_is_kept()
    if ctx.keep == "unit":
        assert grad_logprobs is not None
        (mask,) = saved
        if in_place:
            _from_unit_in_place(kept, grad_logprobs, mask)
        grads[0] = kept if in_place else _from_unit(kept, grad_logprobs, mask)
        return first_derivative(OP, logprobs, *grads)
    wanted = list(ctx.needs_input_grad[:LEAVES])
    *tensors, entropy, stats = (None if x is None else x.detach() for x in saved)
    arguments = (*tensors, *ctx.scalars, grad_logprobs, grad_entropy, entropy, stats, wanted, kept)
    if wanted[1] and kept.numel() and in_place:
        found = list(_backward_in_place(*arguments))
        found[1] = kept
    else:
        found = list(_backward(*arguments))
    grads[:LEAVES] = [x if want else None for x, want in zip(found, wanted, strict=True)]
    return first_derivative(OP, logprobs, *grads)


_forward.register_autograd(_autograd, setup_context=_setup_context)
