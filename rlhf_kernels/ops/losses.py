"""The loss family over [B, T]: PPO's clipped policy and value losses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.reference import losses as reference

Aggregate = Literal["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
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
    ratio: Literal["token", "sequence"] = "token",
    importance_weights: Tensor | None = None,
    aggregate: Aggregate = "token-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy loss (Schulman et al. 2017, arXiv:1707.06347) with its statistics.

    Per token `-min(rho * A, clamp(rho, 1 - clip_low, 1 + clip_high) * A)` with `rho = exp(logprobs - old_logprobs)`,
    the exponent clamped to +-20. Gradient flows into `logprobs` only.

    Args:
        logprobs, old_logprobs: [B, T] float, nats, of the sampled tokens now and at rollout.
        advantages: [B, T] float, reward units.
        mask: [B, T] bool or 0/1, true where the token counts; others are not used.
        clip_low, clip_high: >= 0, the trust region below and above 1 (clip_high > clip_low: DAPO, arXiv:2503.14476).
        dual_clip: > 1, bounds the loss of a token with A < 0 by `dual_clip * |A|` (arXiv:1912.09729); None: no bound.
        ratio: "token", or "sequence": rho is exp of the sequence's mean log-ratio (GSPO, arXiv:2507.18071).
        importance_weights: [B, T] float factors on each token's loss (sampler/trainer mismatch), already truncated.
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
    validate.like(op, "old_logprobs", old_logprobs, "logprobs", logprobs)
    validate.like(op, "advantages", advantages, "logprobs", logprobs)
    if importance_weights is not None:
        validate.like(op, "importance_weights", importance_weights, "logprobs", logprobs)
    mask = validate.bool_mask(op, mask, "logprobs", logprobs.shape, logprobs.device)
    validate.number(op, "clip_low", clip_low, low=0)
    validate.number(op, "clip_high", clip_high, low=0)
    if dual_clip is not None:
        validate.number(op, "dual_clip", dual_clip, above=1)
    validate.choice(op, "ratio", ratio, ("token", "sequence"))
    check_aggregate(op, aggregate, denominator, logprobs, needs_sequences=ratio == "sequence")
    dispatch.kernel(op, logprobs)
    return reference.policy_loss(
        *(logprobs, old_logprobs, advantages, mask, clip_low, clip_high),
        *(dual_clip, ratio, importance_weights, aggregate, denominator),
    )


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
        validate.number(op, "clip", clip, low=0)
        if old_values is None:
            raise ValueError(f"{op}: old_values is None; with clip={clip} it takes a tensor of values' shape")
    if old_values is not None:
        validate.like(op, "old_values", old_values, "values", values)
    validate.like(op, "returns", returns, "values", values)
    mask = validate.bool_mask(op, mask, "values", values.shape, values.device)
    check_aggregate(op, aggregate, denominator, values, needs_sequences=False)
    dispatch.kernel(op, values)
    return reference.value_loss(values, old_values, returns, mask, clip, aggregate, denominator)


def check_aggregate(op: str, aggregate: str, denominator: object, x: Tensor, *, needs_sequences: bool) -> None:
    validate.choice(op, "aggregate", aggregate, AGGREGATES)
    if (needs_sequences or aggregate.startswith("seq-")) and x.dim() != 2:
        raise ValueError(f"{op}: the tensors have shape {list(x.shape)}; sequence-level options take [B, T]")
    if aggregate == "constant" and denominator is None:
        raise ValueError(f"{op}: denominator is None; aggregate='constant' takes a number > 0 or a 0-d tensor")
    if aggregate == "token-sum" and denominator is not None:
        raise ValueError(f"{op}: denominator is given, but aggregate='token-sum' divides by nothing; use 'constant'")
    if isinstance(denominator, Tensor):
        validate.same_place(op, "denominator", denominator, "aggregate", (), x.device)
    elif denominator is not None:
        validate.number(op, "denominator", denominator, above=0)
