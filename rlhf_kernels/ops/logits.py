"""The logits family: logprob and entropy of the chosen token, straight from logits."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import rows, validate
from rlhf_kernels.ops.autograd import first_derivative, register_autograd
from rlhf_kernels.reference import logits as reference

OP = "selected_logprobs"


@overload
def selected_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def selected_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    with_entropy: Literal[True, "detached"],
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def selected_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    with_entropy: bool,
    inplace_backward: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def selected_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool | Literal["detached"] = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's label, and on request the row's entropy, in one read of the logits.

    Equals, with `log_p = (logits.float() / temperature).log_softmax(-1)`:
    `log_p.gather(-1, labels[..., None])[..., 0]` and `-(log_p.exp() * log_p).sum(-1)`, exactly 0 at masked rows.

    Args:
        logits: [..., V] float32, float16, bfloat16 (kernels) or float64 (reference). Rows may be strided, as in
            `logits[:, :-1]`; if the last dimension is not contiguous it is copied once. -inf is a legal logit.
        labels: [...] int64 or int32 in [0, V); anything at masked rows, where it is not read.
        temperature: > 0; a float, or a tensor that broadcasts to [...] for one temperature per row. Not differentiable.
        mask: [...] bool or 0/1, true where the row counts; masked rows of logits are never read, their gradient is 0.
        with_entropy: also return the entropy; both outputs are differentiable. "detached": the entropy as a statistic,
            without a gradient.
        inplace_backward: write the gradient over `logits`, which must not be needed afterwards. Saves one tensor of
            their size. Ignored by the reference and inside torch.compile.

    Returns:
        logprobs [...] float32 (float64 for float64 logits), nats; with `with_entropy`, (logprobs, entropy).
        A row of only -inf, or with NaN or +inf, gives NaN for that row. The logprob of a label at -inf is -inf.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
        IndexError: on CPU, an unmasked label outside [0, V). On a GPU that row is NaN instead (no sync);
            RLHF_KERNELS_CHECK=1 makes it raise there too.
    """
    shape, vocab = _check(logits, labels)
    validate.choice(OP, "with_entropy", with_entropy, (False, True, "detached"))
    given, mask = mask, validate.bool_mask(OP, mask, "logits", shape, logits.device)
    row_temperature = rows.row_temperature(OP, temperature, logits, shape, mask, given)

    # Inside a trace a bad label gives NaN, as on a GPU.
    kernel = dispatch.select_backend(OP, logits)
    if rows.reading_is_free(logits):
        rows.positive(OP, row_temperature)
        if kernel != "cpu":  # the native kernel checks as it goes
            validate.label_in_range(OP, labels, mask, vocab)

    if kernel is None:
        logprobs, entropy = reference.selected_logprobs(
            logits, labels, mask, temperature if row_temperature is None else row_temperature, bool(with_entropy)
        )
        return logprobs if entropy is None else (logprobs, _as_asked(entropy, with_entropy))

    inplace = inplace_backward and logits.requires_grad and not torch.compiler.is_compiling()
    if inplace and (logits.stride(-1) != 1 or 0 in logits.stride()):
        raise ValueError(f"{OP}: inplace_backward needs logits with a contiguous last dimension that are not expanded")
    logprobs, entropy, _ = _forward(
        rows.as_rows(logits),
        labels.reshape(-1),
        rows.flat(mask),
        rows.scalar(temperature),
        rows.flat(row_temperature),
        bool(with_entropy),
        inplace,
    )
    if not with_entropy:
        return logprobs.view(shape)
    return logprobs.view(shape), _as_asked(entropy.view(shape), with_entropy)


def _as_asked(entropy: Tensor, with_entropy: bool | Literal["detached"]) -> Tensor:
    return entropy.detach() if with_entropy == "detached" else entropy


def _check(logits: Tensor, labels: Tensor) -> tuple[torch.Size, int]:
    shape, vocab = rows.check_logits(OP, "logits", logits)
    if not isinstance(labels, Tensor) or labels.dtype not in validate.INTS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{OP}: labels is {got}; it takes an int64 or int32 tensor")
    validate.same_device_and_shape(OP, "labels", labels, "logits", shape, logits.device)
    return shape, vocab


@torch.library.custom_op("rlhf_kernels::selected_logprobs", mutates_args=())
def _forward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    with_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [O, I, V], temperature [], the rest [N = O*I] -> logprobs [N], entropy [N] or [0], (max, log s) [N, 2]."""
    backend = dispatch.backend_module(dispatch.require_backend(OP, logits))
    return backend.selected_logprobs_fwd(logits, labels, mask, temperature.item(), row_temperature, with_entropy)


@_forward.register_fake
def _(
    logits: Tensor, labels: Tensor, mask: Any, temperature: Any, row_temperature: Any, with_entropy: bool, inplace: Any
) -> tuple[Tensor, Tensor, Tensor]:
    count = labels.shape[0]
    new = logits.new_empty
    return (
        new(count, dtype=torch.float32),
        new(count if with_entropy else 0, dtype=torch.float32),
        new((count, 2), dtype=torch.float32),
    )


@torch.library.custom_op("rlhf_kernels::selected_logprobs_backward", mutates_args=())
def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    stats: Tensor,
    entropy: Tensor,
) -> Tensor:
    backend = dispatch.backend_module(dispatch.require_backend(OP, logits))
    return backend.selected_logprobs_bwd(
        grad_logprobs,
        grad_entropy,
        logits,
        labels,
        mask,
        temperature.item(),
        row_temperature,
        stats,
        entropy,
        False,
    )


@_backward.register_fake
def _(grad_logprobs: Any, grad_entropy: Any, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("rlhf_kernels::selected_logprobs_backward_", mutates_args=("logits",))
def _backward_inplace(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    row_temperature: Tensor | None,
    stats: Tensor,
    entropy: Tensor,
) -> None:
    backend = dispatch.backend_module(dispatch.require_backend(OP, logits))
    backend.selected_logprobs_bwd(
        grad_logprobs,
        grad_entropy,
        logits,
        labels,
        mask,
        temperature.item(),
        row_temperature,
        stats,
        entropy,
        True,
    )


@_backward_inplace.register_fake
def _(*arguments: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.with_entropy, ctx.inplace = inputs
    _, entropy, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(*tensors, stats, entropy)


def _autograd(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _grad_stats: None
) -> tuple[Tensor | None, ...]:
    logits, *saved = ctx.saved_tensors
    if not ctx.with_entropy:
        grad_entropy = None
    grad = None
    if grad_logprobs is not None or grad_entropy is not None:
        upstream = [None if x is None else x.detach() for x in (grad_logprobs, grad_entropy)]
        rows, *saved = (None if x is None else x.detach() for x in (logits, *saved))
        if ctx.inplace:
            _backward_inplace(*upstream, rows, *saved)
            grad = rows
        else:
            grad = _backward(*upstream, rows, *saved)
    return *first_derivative(OP, [logits], grad), None, None, None, None, None, None


register_autograd(_forward, _autograd, _setup_context)
