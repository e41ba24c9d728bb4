"""The loss family over [B, T]: PPO's clipped policy and value losses."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.ops.autograd import first_derivative
from rlhf_kernels.ops.registration import as_floats, can_skip_dispatcher, register
from rlhf_kernels.reference import losses as reference
from rlhf_kernels.reference.common import saturating_cast

Aggregate = Literal["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
POLICY_STATS = ("approx_kl", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "ratio_mean", "ratio_max")
VALUE_STATS = ("clip_fraction", "explained_variance")
Ratio = Literal["token", "sequence", "sequence-token"]
RATIOS = ("token", "sequence", "sequence-token")
AGGREGATES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "constant")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: Ratio = "token",
    importance_weights: Tensor | None = None,
    aggregate: Aggregate = "token-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy loss (Schulman et al. 2017, arXiv:1707.06347) with its statistics.

    Per token `-min(rho * A, clamp(rho, 1 - clip_low, 1 + clip_high) * A)` with `rho = exp(logprobs - old_logprobs)`,
    the exponent clamped to +-20. Gradient flows into `logprobs` only.

    Args:
        logprobs, old_logprobs: [B, T] float, nats, of the sampled tokens now and at rollout.
        advantages: [B, T], or one a sequence, [B] or [B, 1]; float, reward units.
        mask: [B, T] bool or 0/1, true where the token counts; others are not used.
        clip_low, clip_high: >= 0, the trust region below and above 1 (clip_high > clip_low: DAPO, arXiv:2503.14476).
        dual_clip: > 1, bounds the loss of a token with A < 0 by `dual_clip * |A|` (arXiv:1912.09729); None: no bound.
        ratio: "token"; "sequence": rho is exp of the sequence's mean log-ratio s (GSPO, arXiv:2507.18071, equation 7).
            Each token then gets the mean gradient of its sequence: where advantages vary within one, it is as if each
            token had their mean. "sequence-token" (equation 14): rho is s as a constant times the token's ratio over
            itself as a constant. Values are those of "sequence"; each token's gradient has its own advantage.
        importance_weights: [B, T], [B] or [B, 1] float factors on each token's loss (sampler/trainer mismatch),
            already truncated.
        aggregate: "token-mean"; "token-sum"; "seq-mean-token-mean" and "seq-mean-token-sum" divide the sum of sequence
            means or sums by B, fully masked sequences included; "constant" divides the sum by `denominator`.
        denominator: > 0, replaces the token or sequence count, so that losses of micro-batches add up to that of the
            whole batch; a number or a 0-d tensor.

    Returns:
        (loss, stats): a float32 scalar (float64 for float64 logprobs), 0 if nothing counts, and a dict of detached
        float32 scalars over the counted tokens, all 0 if there are none: `approx_kl` = mean(rho - 1 - log rho),
        `clip_fraction_low` (A < 0, rho < 1 - clip_low), `clip_fraction_high` (A > 0, rho > 1 + clip_high),
        `clip_fraction_dual`, `ratio_mean`, `ratio_max`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    op = "policy_loss"
    validate.float_tensor(op, "logprobs", logprobs)
    validate.float_like(op, "old_logprobs", old_logprobs, "logprobs", logprobs)
    advantages = validate.over_tokens(op, "advantages", advantages, "logprobs", logprobs)
    if importance_weights is not None:
        importance_weights = validate.over_tokens(op, "importance_weights", importance_weights, "logprobs", logprobs)
    advantages = validate.poisoned(mask, advantages)
    mask = validate.bool_mask(op, mask, "logprobs", logprobs.shape, logprobs.device)
    clip_low = validate.number(op, "clip_low", clip_low, low=0, infinite=True)
    clip_high = validate.number(op, "clip_high", clip_high, low=0, infinite=True)
    if dual_clip is not None:
        dual_clip = validate.number(op, "dual_clip", dual_clip, above=1, infinite=True)
    validate.choice(op, "ratio", ratio, RATIOS)
    check_aggregate(op, aggregate, denominator, logprobs, needs_sequences=ratio != "token")
    inputs = logprobs, old_logprobs, advantages, importance_weights
    if dispatch.select_backend(op, validate.deciding(*inputs)) is None:
        return reference.policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            ratio=ratio,
            importance_weights=importance_weights,
            mode=aggregate,
            denominator=denominator,
        )
    scalars = 1 - clip_low, 1 + clip_high, math.inf if dual_clip is None else dual_clip
    loss, stats, _ = _policy_loss_op(
        *map(_rows, (logprobs, old_logprobs, advantages, mask, importance_weights)),
        *_scalars(*scalars, aggregate=aggregate, denominator=denominator, batch=logprobs),
        RATIOS.index(ratio),
        aggregate == "seq-mean-token-mean",
        logprobs.requires_grad and torch.is_grad_enabled(),
    )
    return loss, dict(zip(POLICY_STATS, stats.unbind(), strict=False))


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregate: Aggregate = "token-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped value loss with its statistics.

    Per token `0.5 * max((v - R)**2, (old + clamp(v - old, -clip, clip) - R)**2)`. Gradient flows into `values` only.

    Args:
        values, old_values: [B, T] float, reward units, of the state before each token now and at rollout.
            `old_values` may be None when clip is None.
        returns: [B, T] float, reward units.
        mask: [B, T] bool or 0/1, true where the token counts; others are not used.
        clip: >= 0, how far the new value may move from the old one before the clipped branch counts; None: no clipping.
        aggregate, denominator: as in `policy_loss`.

    Returns:
        (loss, stats): a float32 scalar (float64 for float64 values), 0 if nothing counts, and detached float32 scalars
        `clip_fraction` (share of counted tokens whose clipped branch is the larger) and `explained_variance`
        = 1 - var(R - v) / var(R), 0 if the returns do not vary.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    op = "value_loss"
    validate.float_tensor(op, "values", values)
    if clip is not None:
        clip = validate.number(op, "clip", clip, low=0, infinite=True)
        if old_values is None:
            raise ValueError(f"{op}: old_values is None; with clip={clip} it takes a tensor of values' shape")
    if old_values is not None:
        validate.float_like(op, "old_values", old_values, "values", values)
    validate.float_like(op, "returns", returns, "values", values)
    returns = validate.poisoned(mask, returns)
    mask = validate.bool_mask(op, mask, "values", values.shape, values.device)
    check_aggregate(op, aggregate, denominator, values, needs_sequences=False)
    if dispatch.select_backend(op, validate.deciding(values, old_values, returns)) is None:
        return reference.value_loss(
            values, old_values, returns, mask, clip=clip, mode=aggregate, denominator=denominator
        )
    loss, stats, _ = _value_loss_op(
        *map(_rows, (values, old_values, returns, mask)),
        *_scalars(math.inf if clip is None else clip, aggregate=aggregate, denominator=denominator, batch=values),
        aggregate == "seq-mean-token-mean",
        values.requires_grad and torch.is_grad_enabled(),
    )
    return loss, dict(zip(VALUE_STATS, stats.unbind(), strict=False))


def check_aggregate(op: str, aggregate: str, denominator: object, x: Tensor, *, needs_sequences: bool) -> None:
    validate.choice(op, "aggregate", aggregate, AGGREGATES)
    if (needs_sequences or aggregate.startswith("seq-")) and x.dim() != 2:
        raise ValueError(f"{op}: the tensors have shape {list(x.shape)}; sequence-level options take [B, T]")
    if aggregate == "constant" and denominator is None:
        raise ValueError(f"{op}: denominator is None; aggregate='constant' takes a number > 0 or a 0-d tensor")
    if aggregate == "token-sum" and denominator is not None:
        raise ValueError(f"{op}: denominator is given, but aggregate='token-sum' divides by nothing; use 'constant'")
    if isinstance(denominator, Tensor):
        validate.same_device_and_shape(op, "denominator", denominator, "aggregate", (), x.device)
    elif denominator is not None:
        denominator = validate.number(op, "denominator", denominator, above=0)


def _rows(x: Tensor | None) -> Tensor | None:
    """[..., T] as [R, T]."""
    if x is None or x.dim() == 2:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() else x.reshape(1, 1)


def _scalars(
    *values: float, aggregate: str, denominator: float | Tensor | None, batch: Tensor
) -> tuple[tuple[float, ...], Tensor | None]:
    """For a registered op: `values` and the denominator (NaN = count the tokens), and a denominator given as a tensor,
    which may be on a GPU and then is not read here."""
    known, given = math.nan, None
    if isinstance(denominator, Tensor):
        given = denominator.detach()
    elif denominator is not None:
        known = denominator
    elif aggregate != "token-mean":
        known = 1.0 if aggregate == "token-sum" else max(batch.shape[0], 1)
    return (*values, known), given


def _policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    scalars: Tensor,
    denominator: Tensor | None,
    ratio: int,
    row_means: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors [R, T], scalars: bounds of the ratio, dual_clip, denominator -> loss [], stats [7] (the last is the
    denominator), gradient times the denominator [R, T] or [0]; float32."""
    low, high, dual_clip, known = as_floats(scalars)
    return dispatch.backend_module(dispatch.require_backend("policy_loss", logprobs)).policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        weights,
        low,
        high,
        dual_clip,
        known if denominator is None else denominator,
        ratio,
        row_means,
        with_grad,
    )


def _value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    scalars: Tensor,
    denominator: Tensor | None,
    row_means: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As _policy_loss; scalars: clip, denominator; stats [3]."""
    clip, known = as_floats(scalars)
    return dispatch.backend_module(dispatch.require_backend("value_loss", values)).value_loss(
        values,
        old_values,
        returns,
        mask,
        clip,
        known if denominator is None else denominator,
        row_means,
        with_grad,
    )


def _fake(stats: int, x: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    new = x.new_empty
    return (
        new((), dtype=torch.float32),
        new(stats, dtype=torch.float32),
        new(x.shape if with_grad else (0,), dtype=torch.float32),
    )


def _differentiable(op: str) -> type[torch.autograd.Function]:
    """The op's autograd: loss's gradient is what the forward left, times upstream / denominator."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: Any, x: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
            loss, stats, grad = call(x, *rest)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(stats, grad)
            ctx.save_for_backward(grad, stats)
            # Not saved: its values are not needed, and an input makes no circle of references.
            ctx.input, ctx.native = x, dispatch.require_backend(op, x) == "cpu"
            return loss, stats, grad

        @staticmethod
        def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if upstream is None:
                return None, None, None
            grad, stats = ctx.saved_tensors
            # no_grad costs as much as the kernel, and is for create_graph=True alone.
            if not torch.is_grad_enabled():
                return None, _scaled(ctx, grad, stats, upstream), None
            with torch.no_grad():
                found = _scaled(ctx, grad, stats, upstream)
            return None, *first_derivative(op, [ctx.input], found), None

    return Loss


def _scaled(ctx: Any, grad: Tensor, stats: Tensor, upstream: Tensor) -> Tensor:
    if ctx.native and can_skip_dispatcher((grad, stats, upstream)):
        return dispatch.backend_module("cpu").loss_bwd(grad, stats, upstream, ctx.input.dtype)
    return saturating_cast(grad * (upstream / stats[-1]), ctx.input.dtype)


_policy_loss_op = register(
    _policy_loss, lambda logprobs, *rest: _fake(7, logprobs, rest[-1]), _differentiable("policy_loss")
)
_value_loss_op = register(_value_loss, lambda values, *rest: _fake(3, values, rest[-1]), _differentiable("value_loss"))
