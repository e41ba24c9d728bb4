"""linear_logprobs: logprob and entropy of each row's label, straight from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.ops.autograd import first_derivative, register_autograd, under_the_forwards_backend
from rlhf_kernels.ops.linear.call import GRADIENTS, SCHEMA, LinearCall, Lora, Wanted, prepare, split
from rlhf_kernels.ops.linear.chunks import DEFAULT_WORKSPACE, ChunkedHead
from rlhf_kernels.ops.linear.gradients import Gradients
from rlhf_kernels.ops.linear.logprob_gradient import LogprobGradient, scale_rows_, scaled_rows
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
    logits_dtype: torch.dtype | None = ...,
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
    logits_dtype: torch.dtype | None = ...,
    workspace: int = ...,
    process_group: ProcessGroup | None = ...,
    batch_invariant: bool = ...,
) -> tuple[Tensor, Tensor]: ...
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
    with_entropy: bool | Literal["detached"],
    logits_dtype: torch.dtype | None = ...,
    workspace: int = ...,
    process_group: ProcessGroup | None = ...,
    batch_invariant: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    logits_dtype: torch.dtype | None = torch.float32,
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
    Under autocast hidden, weight and bias are cast as for torch.nn.functional.linear.

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
        logits_dtype: float32: products of 16-bit hidden states and weights are summed and stay in float32 until the
            softmax, and so do the sums of dH and dW. None: they are rounded to 16 bits first, as by torch's own head,
            where the device multiplies so.
        workspace: bytes of extra memory. One row's logits are taken even where they are more. A 16-bit weight that
            needs a gradient adds one fp32 accumulator of its size where the rows do not fit one chunk.
        process_group: weight, bias and B are this rank's rows of a vocabulary sharded over the group's ranks, in their
            order; hidden, A, labels and mask are the same on all. One all-gather of a few numbers a row in the forward,
            one all-reduce of dH in the backward; kernels only (not float64).
        batch_invariant: a row's logprob has the same bits alone and in any batch, at a given number of threads. Where
            the GEMM is the library's it is cut into pieces of one shape, 64 rows by 4096 tokens; the native backend's
            float32 products are so anyway. Gradients are not included.

    Returns:
        logprobs [...] float32 (float64 for float64), nats; with `with_entropy`, (logprobs, entropy). Exactly 0, and
        gradient 0, at masked rows.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
        IndexError: on CPU, an unmasked label outside [0, V). On a GPU that row is NaN instead (no sync);
            RLHF_KERNELS_CHECK=1 makes it raise there too.
    """
    call = prepare(
        OP,
        hidden,
        weight,
        labels,
        bias=bias,
        lora=lora,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        logits_dtype=logits_dtype,
        workspace=workspace,
        process_group=process_group,
        batch_invariant=batch_invariant,
    )
    validate.choice(OP, "with_entropy", with_entropy, (False, True, "detached"))
    logprobs, entropy = logprobs_of(call, with_entropy, kernel=dispatch.select_backend(OP, call.hidden))
    return logprobs if entropy is None else (logprobs, entropy)


def logprobs_of(
    call: LinearCall, with_entropy: bool | Literal["detached"], *, kernel: str | None
) -> tuple[Tensor, Tensor | None]:
    """linear_logprobs of a checked call. kernel: the backend that serves the public op, None for the reference."""
    if kernel is None:
        if call.group:
            raise NotImplementedError(f"{OP}: process_group needs a kernel; there is none for this dtype and backend")
        logprobs, entropy = reference.linear_logprobs(
            labels=call.labels,
            temperature=call.divisor,
            with_entropy=bool(with_entropy),
            **call.reference_arguments(),
        )
    else:
        flat, shape = call.by_rows(), call.labels.shape
        # d logprob / d hidden, formed in the forward, is all that the backward of a frozen head needs.
        hidden_alone = call.wanted == Wanted(hidden=True) and call.lora_a is None and with_entropy is not True
        # A trace keeps nothing in place: a registered op never writes into what it gave.
        eager = validate.is_eager(call.tensors())
        if eager and call.wanted.weight:
            logprobs, entropy = _KeepsLogits.apply(flat, bool(with_entropy), *flat.head_inputs)
        elif eager and hidden_alone:
            logprobs, entropy = _KeepsGradient.apply(flat, bool(with_entropy), flat.hidden)
        else:
            logprobs, entropy, *_ = _forward(*flat, bool(with_entropy), hidden_alone)
        logprobs, entropy = logprobs.view(shape), entropy.view(shape) if with_entropy else None
    return logprobs, entropy.detach() if with_entropy == "detached" and entropy is not None else entropy


@torch.library.custom_op(
    "rlhf_kernels::linear_logprobs",
    mutates_args=(),
    schema=f"({SCHEMA}, bool with_entropy, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """logprobs [N], entropy [N] or [0], (max, log s) [N, 2], and `with_gradient` d logprob / d hidden, of hidden's
    shape, else [0]."""
    call, (with_entropy, with_gradient) = split(arguments)
    like = call.hidden
    gradient = torch.zeros(like.shape if with_gradient else (0,), dtype=like.dtype, device=like.device)
    return *_run(call.sweep(OP), with_entropy, gradient if with_gradient else None), gradient


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, (with_entropy, with_gradient) = split(arguments)
    count, new = call.labels.shape[0], call.hidden.new_empty
    return (
        new(count, dtype=torch.float32),
        new(count if with_entropy else 0, dtype=torch.float32),
        new((count, 2), dtype=torch.float64),
        new(call.hidden.shape if with_gradient else (0,)),
    )


def _run(sweep: ChunkedHead, with_entropy: bool, dlogprob_dhidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and stats as `_forward`'s; dlogprob_dhidden: zeros of hidden's shape, filled where given."""
    call = sweep.call
    count, new = call.labels.shape[0], call.hidden.new_zeros
    logprobs, stats = new(count, dtype=torch.float32), new((count, 2), dtype=torch.float64)
    entropy = new(count if with_entropy else 0, dtype=torch.float32)
    for chunk in sweep:
        gradient = None if dlogprob_dhidden is None else LogprobGradient(sweep, chunk)
        chunk_logprobs, chunk_entropy, chunk_stats = sweep.softmax(
            chunk, with_entropy, None if gradient is None else gradient.add
        )
        logprobs[chunk.row_indices], stats[chunk.row_indices] = chunk_logprobs, chunk_stats
        if with_entropy:
            entropy[chunk.row_indices] = chunk_entropy
        if gradient is not None and dlogprob_dhidden is not None:
            gradient.store(dlogprob_dhidden.flatten(0, 1), chunk_logprobs, chunk_stats)
    return logprobs, entropy, stats


def _gradients(
    call: LinearCall,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    entropy: Tensor,
    stats: Tensor,
    wanted: Wanted,
    logits_buffer: Tensor | None = None,
    weight_gradient: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """logits_buffer: what the forward kept. weight_gradient: memory for dW."""
    sweep = call.sweep(OP, wants_weight=wanted.weight, logits_buffer=logits_buffer)
    gradients = Gradients(sweep, wanted, weight_gradient)
    for chunk in sweep:
        g, g_entropy = (None if x is None else x[chunk.row_indices] for x in (grad_logprobs, grad_entropy))
        chunk_entropy = entropy if g_entropy is None else entropy[chunk.row_indices]
        coefficients = sweep.coefficients(chunk, g, g_entropy, stats[chunk.row_indices], chunk_entropy)
        gradients.add(chunk, sweep.gradient_tiles(chunk, coefficients, exact=wanted.needs_exact_tiles))
    return gradients.finish()


@torch.library.custom_op(
    "rlhf_kernels::linear_logprobs_backward",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor entropy, Tensor stats, bool[] wanted)"
    f" -> ({GRADIENTS})",
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the call's head inputs; zero elements for one that is not wanted."""
    call, (grad_logprobs, grad_entropy, entropy, stats, wanted) = split(arguments)
    return _gradients(call, grad_logprobs, grad_entropy, entropy=entropy, stats=stats, wanted=Wanted(*wanted))


@_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, (*_, wanted) = split(arguments)
    return call.empty_gradients(Wanted(*wanted))


def graph_is_kept() -> bool:
    """Whether the backward now running was called with retain_graph=True; a torch that does not say so: yes."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, (ctx.with_entropy, ctx.with_gradient) = split(inputs)
    _, entropy, stats, dlogprob_dhidden = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, dlogprob_dhidden)
    ctx.save_for_backward(dlogprob_dhidden, entropy, stats, *call.tensors())
    ctx.call = call.without_tensors()


def _autograd(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    grad_entropy = grad_entropy if ctx.with_entropy else None
    if grad_logprobs is None and grad_entropy is None:
        return tuple(grads)
    dlogprob_dhidden, entropy, stats, *saved = ctx.saved_tensors
    call = ctx.call.with_tensors(saved)
    wanted = Wanted(*ctx.needs_input_grad[: len(Wanted._fields)])
    grad_logprobs, grad_entropy = (None if x is None else x.detach() for x in (grad_logprobs, grad_entropy))
    if ctx.with_gradient and wanted == Wanted(hidden=True) and grad_entropy is None and grad_logprobs is not None:
        grads[0] = scaled_rows(dlogprob_dhidden.flatten(0, 1), grad_logprobs, call.mask).view(call.hidden.shape)
    else:
        upstream_and_saved = grad_logprobs, grad_entropy, entropy.detach(), stats
        found = _backward(*call.detached(), *upstream_and_saved, wanted)
        grads[: len(wanted)] = [x if want else None for x, want in zip(found, wanted, strict=True)]
    return first_derivative(OP, call.head_inputs, *grads)


register_autograd(_forward, _autograd, _setup_context)


class _KeepsLogits(torch.autograd.Function):
    """linear_logprobs of an eager call that leaves the first chunk's logits in memory that becomes dW."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, with_entropy: bool, *_head_inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = call.weight
        with torch.profiler.record_function(f"rlhf_kernels::{OP}"):
            sweep = call.detached().sweep(OP)
            if sweep.fits_weight_gradient():
                sweep.logits_buffer = sweep.backend.allocate(tuple(weight.shape), weight.dtype, weight.device)
            logprobs, entropy, stats = _run(sweep, with_entropy, None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sweep.logits_buffer, entropy, stats, *call.tensors())
        ctx.call, ctx.forced = call.without_tensors(), dispatch.forced()
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * len(ctx.needs_input_grad)
        logits_buffer, entropy, stats, *saved = ctx.saved_tensors
        call = ctx.call.with_tensors(saved)
        wanted = Wanted(*ctx.needs_input_grad[-len(Wanted._fields) :])
        profiled = torch.profiler.record_function(f"rlhf_kernels::{OP}_backward")
        with torch.no_grad(), profiled, under_the_forwards_backend(ctx):
            found = _gradients(
                call.detached(),
                grad_logprobs,
                grad_entropy,
                entropy=entropy,
                stats=stats,
                wanted=wanted,
                logits_buffer=logits_buffer,
                # Another backward would need the logits once more.
                weight_gradient=logits_buffer if wanted.weight and not graph_is_kept() else None,
            )
        chosen = (x if want else None for x, want in zip(found, wanted, strict=True))
        return None, None, *first_derivative(OP, call.head_inputs, *chosen)


class _KeepsGradient(torch.autograd.Function):
    """linear_logprobs of an eager call that leaves d logprob / d hidden, in memory that becomes dH."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, with_entropy: bool, hidden: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        with torch.profiler.record_function(f"rlhf_kernels::{OP}"):
            logprobs, entropy, _ = _run(call.detached().sweep(OP), with_entropy, gradient)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(entropy)
        # Neither hidden nor weight is kept; the output leads to them where a second derivative is asked for.
        ctx.save_for_backward(gradient, call.mask, logprobs)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, _grad_entropy: None) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None:
            return None, None, None
        gradient, mask, logprobs = ctx.saved_tensors
        with torch.no_grad(), torch.profiler.record_function(f"rlhf_kernels::{OP}_backward"):
            grad = gradient.clone() if graph_is_kept() else gradient
            scale_rows_(grad.flatten(0, 1), grad_logprobs, mask)
        return None, None, *first_derivative(OP, [logprobs], grad)
