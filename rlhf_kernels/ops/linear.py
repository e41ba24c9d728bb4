"""linear_logprobs: logprob and entropy of each row's label, straight from hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import rows, validate
from rlhf_kernels.ops.linear_sweep import DEFAULT_WORKSPACE, Gradients, Head, Sweep, shard
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
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True],
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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    workspace: int = DEFAULT_WORKSPACE,
    process_group: ProcessGroup | None = None,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's label, and on request its entropy, from hidden states; logits are never in memory.

    Equals `selected_logprobs(logits, labels, temperature=..., mask=..., with_entropy=...)` with
    `logits = (hidden @ weight.T + bias) * logit_scale`, and `softcap * tanh(logits / softcap)` if a softcap is given.
    Rows are compacted by the mask first, so a masked row costs nothing; one GEMM forward, three backward (the logits
    again, dH, dW), none for a gradient that nobody asked for. Under autocast hidden, weight and bias are cast as for
    torch.nn.functional.linear.

    Args:
        hidden: [..., D] float32, float16, bfloat16 (kernels) or float64 (reference). Not read at masked rows.
        weight: [V, D], dtype and device of hidden; may be tied to an embedding.
        labels: [...] int64 or int32 in [0, V); anything at masked rows.
        bias: [V], dtype of weight, or None. -inf there masks a token out of the vocabulary.
        temperature: > 0; a float, or a tensor that broadcasts to [...] for one temperature per row. Not differentiable.
        softcap: > 0, bound of |logit| (Gemma 2, arXiv:2408.00118), or None.
        logit_scale: > 0, factor of the logits before the softcap (Cohere; 1 / logits_scaling of Granite).
        mask: [...] bool or 0/1, true where the row counts. On a GPU a mask costs one host sync: how many rows count.
        with_entropy: also return the entropy; both outputs are differentiable.
        workspace: bytes of extra memory, at least one row's logits whatever it says. A 16-bit weight that needs a
            gradient adds one fp32 accumulator of its size where the rows do not fit one chunk.
        process_group: weight and bias are this rank's rows of a vocabulary sharded over the group's ranks, in their
            order; hidden, labels and mask are the same on all. One all-gather of a few numbers a row in the forward,
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
    call = prepare(OP, hidden, weight, labels, bias, temperature, softcap, logit_scale, mask, workspace, process_group)
    logprobs, entropy = logprobs_of(call._replace(invariant=batch_invariant), with_entropy, workspace)
    return logprobs if entropy is None else (logprobs, entropy)


class Call(NamedTuple):
    """The checked arguments that the whole family shares, in the caller's shapes."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    mask: Tensor | None  # bool
    temperature: float
    row_temperature: Tensor | None  # [...], replaces temperature
    softcap: float | None
    logit_scale: float
    first: int = 0  # token of weight's first row, in a vocabulary sharded over `group`
    group: str = ""
    invariant: bool = False

    @property
    def divisor(self) -> float | Tensor:
        return self.temperature if self.row_temperature is None else self.row_temperature

    def flat(self) -> tuple[Any, ...]:
        """The arguments that every registered op of the family starts with."""
        temperature, row_temperature, scale = self.temperature, self.row_temperature, 1.0
        if self.softcap is not None:
            scale = self.logit_scale
        else:  # z * scale / T
            temperature = temperature / self.logit_scale
            row_temperature = None if row_temperature is None else row_temperature / self.logit_scale
        return (
            rows.as_rows(self.hidden),
            self.weight,
            self.labels.reshape(-1),
            self.bias,
            rows.flat(self.mask),
            validate.runtime_scalar(temperature),
            rows.flat(row_temperature),
            None if self.softcap is None else validate.runtime_scalar(self.softcap),
            validate.runtime_scalar(scale),
            self.first,
            self.group,
            self.invariant,
        )


def prepare(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
    workspace: int,
    process_group: ProcessGroup | None = None,
) -> Call:
    """Checks what the family's ops have in common, applies autocast, and reads labels where that is free."""
    shape = _check_head(op, hidden, weight, bias)
    if labels is not None:
        _check_labels(op, labels, shape, hidden.device)
    mask = validate.bool_mask(op, mask, "hidden", shape, hidden.device)
    if softcap is not None:
        validate.number(op, "softcap", softcap, above=0)
    validate.number(op, "logit_scale", logit_scale, above=0)
    validate.number(op, "workspace", workspace, low=0)
    hidden, weight, bias = _autocast(hidden, weight, bias)

    row_temperature = rows.row_temperature(op, temperature, hidden, shape)
    first, vocab = shard(process_group, weight.shape[0], hidden.device)
    if rows.reading_is_free(hidden):
        rows.positive(op, row_temperature)
        if labels is not None:
            validate.label_in_range(op, labels, mask, vocab)
    if isinstance(temperature, Tensor):
        temperature = 1.0
    if labels is None:  # the op has none, and its kernels look at none
        labels = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
    call = Call(hidden, weight, labels, bias, mask, temperature, row_temperature, softcap, logit_scale)
    return call if process_group is None else call._replace(first=first, group=process_group.group_name)


def _check_labels(op: str, labels: object, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(labels, Tensor) or labels.dtype not in validate.INTS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: labels is {got}; it takes an int64 or int32 tensor")
    validate.same_place(op, "labels", labels, "hidden", shape, device)


def logprobs_of(call: Call, with_entropy: bool, workspace: int) -> tuple[Tensor, Tensor | None]:
    """linear_logprobs of a checked call."""
    shape = call.labels.shape
    if dispatch.kernel(OP, call.hidden) is None:
        if call.group:
            raise NotImplementedError(f"{OP}: process_group needs a kernel; there is none for this dtype and backend")
        return reference.linear_logprobs(
            *(call.hidden, call.weight, call.labels, call.bias, call.mask, call.divisor),
            *(call.softcap, call.logit_scale, with_entropy),
        )
    logprobs, entropy, _ = _forward(*call.flat(), with_entropy, workspace)
    return logprobs.view(shape), entropy.view(shape) if with_entropy else None


def _check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.Size:
    validate.float_tensor(op, "hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{op}: hidden has shape {list(hidden.shape)}; it takes [..., D] with D >= 1")
    validate.float_tensor(op, "weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}; with hidden {list(hidden.shape)} it takes "
            f"[V, {hidden.shape[-1]}] with V >= 1"
        )
    validate.same_place(op, "weight", weight, "hidden", weight.shape, hidden.device)
    if bias is not None:
        validate.float_tensor(op, "bias", bias)
        validate.same_place(op, "bias", bias, "weight", weight.shape[:1], hidden.device)
    if not torch.is_autocast_enabled(hidden.device.type):
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and x.dtype != hidden.dtype:
                raise TypeError(f"{op}: {name} is {x.dtype}; with this hidden it takes {hidden.dtype}")
    return hidden.shape[:-1]


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As torch.nn.functional.linear: all in autocast's dtype; float64 stays."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def head_of_call(
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    softcap: Tensor | None,
    logit_scale: Tensor,
    first: int,
    group: str,
    invariant: bool,
) -> Head:
    """The registered op's arguments as a Head; the scalars live on the CPU, where reading them is no sync."""
    cap = None if softcap is None else softcap.item()
    return Head(weight, bias, temperature.item(), row_temperature, cap, logit_scale.item(), first, group, invariant)


@torch.library.custom_op("rlhf_kernels::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    softcap: Tensor | None,
    logit_scale: Tensor,
    first: int,
    group: str,
    invariant: bool,
    with_entropy: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [O, I, D], weight [V, D], the rest [N = O*I] -> logprobs [N], entropy [N] or [0], (max, log s) [N, 2]."""
    head = head_of_call(weight, bias, temperature, row_temperature, softcap, logit_scale, first, group, invariant)
    count = labels.shape[0]
    new = hidden.new_zeros
    logprobs, stats = new(count, dtype=torch.float32), new((count, 2), dtype=torch.float64)
    entropy = new(count if with_entropy else 0, dtype=torch.float32)
    sweep = Sweep(OP, hidden, head, labels, mask, workspace)
    for chunk in sweep:
        chunk_logprobs, chunk_entropy, chunk_stats = sweep.softmax(chunk, with_entropy)
        logprobs[chunk.places], stats[chunk.places] = chunk_logprobs, chunk_stats
        if with_entropy:
            entropy[chunk.places] = chunk_entropy
    return logprobs, entropy, stats


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Any,
    labels: Tensor,
    bias: Any,
    mask: Any,
    temperature: Any,
    row_temperature: Any,
    softcap: Any,
    logit_scale: Any,
    first: Any,
    group: Any,
    invariant: Any,
    with_entropy: bool,
    workspace: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    count = labels.shape[0]
    new = hidden.new_empty
    return (
        new(count, dtype=torch.float32),
        new(count if with_entropy else 0, dtype=torch.float32),
        new((count, 2), dtype=torch.float64),
    )


@torch.library.custom_op("rlhf_kernels::linear_logprobs_backward", mutates_args=())
def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    softcap: Tensor | None,
    logit_scale: Tensor,
    first: int,
    group: str,
    invariant: bool,
    stats: Tensor,
    entropy: Tensor,
    workspace: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [O, I, D], weight and bias; zero elements for one that is not wanted."""
    head = head_of_call(weight, bias, temperature, row_temperature, softcap, logit_scale, first, group, invariant)
    wanted = want_hidden, want_weight, want_bias
    sweep = Sweep(OP, hidden, head, labels, mask, workspace, wanted=wanted)
    gradients = Gradients(sweep, hidden, wanted)
    for chunk in sweep:
        g, g_entropy = (None if x is None else x[chunk.places] for x in (grad_logprobs, grad_entropy))
        chunk_entropy = entropy if g_entropy is None else entropy[chunk.places]
        coefficients = sweep.coefficients(chunk, g, g_entropy, stats[chunk.places], chunk_entropy)
        gradients.add(chunk, sweep.gradient_tiles(chunk, coefficients))
    return gradients.finish()


@_backward.register_fake
def _(
    grad_logprobs: Any,
    grad_entropy: Any,
    hidden: Tensor,
    weight: Tensor,
    labels: Any,
    bias: Tensor | None,
    mask: Any,
    temperature: Any,
    row_temperature: Any,
    softcap: Any,
    logit_scale: Any,
    first: Any,
    group: Any,
    invariant: Any,
    stats: Any,
    entropy: Any,
    workspace: Any,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, want_hidden, want_weight, want_bias)


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, want_hidden: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the shapes that the registered ops return."""
    like_bias = weight if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
        like_bias.new_empty(weight.shape[:1] if want_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first, group, invariant, with_entropy, workspace = inputs
    _, entropy, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(*tensors, stats, entropy)
    ctx.with_entropy, ctx.workspace, ctx.shard = with_entropy, workspace, (first, group, invariant)


def _autograd(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _grad_stats: None
) -> tuple[Tensor | None, ...]:
    if not ctx.with_entropy:
        grad_entropy = None
    needs = ctx.needs_input_grad
    wanted = needs[0], needs[1], needs[3]
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_logprobs is not None or grad_entropy is not None:
        *tensors, stats, entropy = ctx.saved_tensors
        found = _backward(*(grad_logprobs, grad_entropy, *tensors, *ctx.shard, stats, entropy, ctx.workspace), *wanted)
        grads = tuple(x if want else None for x, want in zip(found, wanted, strict=True))
    return grads[0], grads[1], None, grads[2], *(None,) * 10


_forward.register_autograd(_autograd, setup_context=_setup_context)
