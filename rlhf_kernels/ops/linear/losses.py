"""Losses straight from hidden states: linear_policy_loss, linear_cross_entropy.

What a token's loss adds to the gradient is known as soon as its row's softmax is, so a chunk forms its gradients while
its logits are at hand: three GEMMs in all, and a row whose gradient is zero takes columns in the first alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import rows, validate
from rlhf_kernels.ops.autograd import first_derivative
from rlhf_kernels.ops.linear.call import GRADIENTS, SCHEMA, LinearCall, Lora, Wanted, prepare, split
from rlhf_kernels.ops.linear.chunks import DEFAULT_WORKSPACE, ChunkedHead, RowChunk
from rlhf_kernels.ops.linear.gradients import Gradients
from rlhf_kernels.ops.linear.logprobs import graph_is_kept, logprobs_of
from rlhf_kernels.ops.linear.token_terms import token_terms, token_weights
from rlhf_kernels.ops.losses import RATIOS, Aggregate, Ratio, check_aggregate
from rlhf_kernels.ops.tokens import ESTIMATORS, Estimator
from rlhf_kernels.reference import linear as reference
from rlhf_kernels.reference import losses as reference_losses
from rlhf_kernels.reference.common import select, upcast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_policy_loss"


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
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
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Estimator = "k3",
    bias: Tensor | None = None,
    lora: Lora | Sequence[Lora] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = torch.float32,
    workspace: int = DEFAULT_WORKSPACE,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's policy loss from hidden states: head, logprob, clipped ratio, entropy bonus and KL term in one sweep.

    Equals `policy_loss(logprobs, ...) - entropy_coef * mean entropy + kl_coef * mean per_token_kl(logprobs,
    ref_logprobs)` with `logprobs, entropy = linear_logprobs(...)`, all three aggregated alike (`importance_weights`
    weigh the first alone). Gradients of hidden, weight and bias are formed in the forward, with three GEMMs in all; on
    CPU rows whose gradient is zero (clipped, advantage 0) take part in the first alone. A ratio of sequences needs
    every logprob of a sequence first and takes a second sweep (four GEMMs).

    Args:
        hidden, weight, labels, bias, lora, temperature, softcap, logit_scale, logits_dtype, workspace, process_group:
            linear_logprobs's.
        old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, ratio, importance_weights, aggregate,
            denominator: as in `policy_loss`, of labels' shape.
        entropy_coef: weight of the entropy bonus, nats^-1; 0: no entropy is computed.
        ref_logprobs: logprobs of the labels under the reference, for the KL term; None: no such term.
        kl_coef, kl_estimator: weight and estimator of the KL term, see `per_token_kl`.

    Returns:
        (loss, stats): a float32 scalar, and `policy_loss`'s statistics, with `entropy` (mean over counted tokens) if
        entropy_coef is not 0 and `kl` if ref_logprobs are given. An upstream gradient other than 1 multiplies gradients
        that are already in the inputs' dtype.

    Raises:
        TypeError, ValueError, IndexError: as `linear_logprobs` and `policy_loss`.
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
    )
    mask = call.mask
    old_logprobs = validate.float_like(OP, "old_logprobs", old_logprobs, "labels", labels)
    advantages = validate.over_tokens(OP, "advantages", advantages, "labels", labels)
    if importance_weights is not None:
        importance_weights = validate.over_tokens(OP, "importance_weights", importance_weights, "labels", labels)
    if ref_logprobs is not None:
        ref_logprobs = validate.float_like(OP, "ref_logprobs", ref_logprobs, "labels", labels)
    clip_low = validate.number(OP, "clip_low", clip_low, low=0, infinite=True)
    clip_high = validate.number(OP, "clip_high", clip_high, low=0, infinite=True)
    if dual_clip is not None:
        dual_clip = validate.number(OP, "dual_clip", dual_clip, above=1, infinite=True)
    validate.choice(OP, "ratio", ratio, RATIOS)
    entropy_coef = validate.number(OP, "entropy_coef", entropy_coef)
    kl_coef = validate.number(OP, "kl_coef", kl_coef)
    validate.choice(OP, "kl_estimator", kl_estimator, ESTIMATORS)
    check_aggregate(OP, aggregate, denominator, labels, needs_sequences=ratio != "token")

    def from_logprobs(logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = reference_losses.policy_loss(
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
        return reference.regularised(
            loss,
            stats,
            logprobs=logprobs,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            mask=mask,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            mode=aggregate,
            denominator=denominator,
        )

    kernel = dispatch.select_backend(OP, call.hidden)
    if ratio != "token" or kernel is None:
        return from_logprobs(*logprobs_of(call, entropy_coef != 0, kernel=kernel))

    factor = token_weights(mask, labels, aggregate, denominator)
    weights = factor if importance_weights is None else factor * importance_weights.detach().float()
    per_row = [old_logprobs, advantages, weights, factor, factor if ref_logprobs is None else ref_logprobs]
    scalars = (clip_low, clip_high, float("inf") if dual_clip is None else dual_clip, entropy_coef, kl_coef)
    loss, logprobs, entropy = _swept(
        call,
        per_row=torch.stack([x.detach().float().reshape(-1) for x in per_row]),
        scalars=torch.stack([validate.runtime_scalar(x) for x in scalars]),
        kind="policy" if ref_logprobs is None else f"policy {kl_estimator}",
        with_entropy=entropy_coef != 0,
    )
    with torch.no_grad():
        seen = entropy.view(labels.shape) if entropy_coef != 0 else None
        stats = from_logprobs(logprobs.view(labels.shape), seen)[1]
    return loss, stats


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    aggregate: Aggregate = "token-mean",
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,
    lora: Lora | Sequence[Lora] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = torch.float32,
    workspace: int = DEFAULT_WORKSPACE,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Supervised loss from hidden states: minus the labels' logprobs, aggregated; gradients formed in the forward.

    Equals `torch.nn.functional.cross_entropy(logits[mask], labels[mask], ignore_index=..., label_smoothing=...)` with
    `linear_logprobs`'s logits over the temperature, and `z_loss * logsumexp(logits)**2` beside it (PaLM,
    arXiv:2204.02311). Three GEMMs in all; with label_smoothing or z_loss those of `linear_logprobs`, and each label's
    row of the weight besides.

    Args:
        hidden, weight, labels, bias, lora, temperature, softcap, logit_scale, logits_dtype, workspace, process_group:
            linear_logprobs's.
        ignore_index: rows with this label do not count, as if masked. On a GPU that costs the sync of a mask where
            none is given.
        label_smoothing: in [0, 1]: the share of the target that lies evenly over the vocabulary; without a softcap and
            a process_group.
        z_loss: >= 0, weight of the squared log of the softmax's sum; without a process_group.
        mask, aggregate, denominator: as in `policy_loss`.

    Returns:
        The loss, a float32 scalar (float64 for float64), 0 if nothing counts.

    Raises:
        TypeError, ValueError, IndexError: as `linear_logprobs`.
    """
    op = "linear_cross_entropy"
    label_smoothing = validate.number(op, "label_smoothing", label_smoothing, low=0, high=1)
    z_loss = validate.number(op, "z_loss", z_loss, low=0)
    mask = _without(labels, ignore_index, mask)
    call = prepare(
        op,
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
    )
    check_aggregate(op, aggregate, denominator, labels, needs_sequences=False)
    kernel = dispatch.select_backend(op, call.hidden)
    if label_smoothing != 0 or z_loss != 0:
        losses = _regularised_nll(op, call, label_smoothing=label_smoothing, z_loss=z_loss, kernel=kernel)
        return reference_losses.aggregate(losses, call.mask, aggregate, denominator)
    if kernel is None:  # logprobs_of refuses a group there
        logprobs, _ = logprobs_of(call, False, kernel=None)
        return reference_losses.aggregate(-logprobs, call.mask, aggregate, denominator)
    factor = token_weights(call.mask, labels, aggregate, denominator).reshape(1, -1)
    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    return _swept(call, per_row=factor, scalars=none, kind="nll", with_entropy=False)[0]


def _without(labels: object, ignore_index: int, mask: Tensor | None) -> Tensor | None:
    """The mask, false at rows with that label too; None where every row counts and that is seen for free."""
    if not isinstance(labels, Tensor):
        return mask  # `prepare` has a sentence for it
    kept = labels != ignore_index
    if rows.reading_is_free(labels) and bool(kept.all()):
        return mask
    if mask is None:
        return kept
    if not isinstance(mask, Tensor) or mask.shape != labels.shape or mask.device != labels.device:
        return mask  # as above
    return torch.where(kept, mask, torch.zeros_like(mask))  # as it is given: `prepare` looks for other numbers


def _regularised_nll(op: str, call: LinearCall, *, label_smoothing: float, z_loss: float, kernel: str | None) -> Tensor:
    """Losses of labels' shape, 0 where masked, from the labels' logprobs and logits.

    The mean over the vocabulary of log p is the mean logit minus logsumexp, and that is the label's logit minus its
    logprob; without a softcap the mean logit is one product with the mean row of the head.
    """
    if call.group:
        raise ValueError(f"{op}: process_group is given; with label_smoothing or z_loss it takes a whole vocabulary")
    if call.softcap is not None and label_smoothing != 0:
        raise ValueError(f"{op}: softcap is given; with label_smoothing it takes a head without one")
    logprobs, _ = logprobs_of(call, False, kernel=kernel)
    hidden = upcast(call.hidden) if call.mask is None else select(call.mask.unsqueeze(-1), upcast(call.hidden))
    labels = (call.labels if call.mask is None else select(call.mask, call.labels, 0)).long()

    def logits(rows_of: Callable[[Tensor], Tensor]) -> Tensor:
        z = (hidden * rows_of(call.weight).to(hidden.dtype)).sum(-1)
        if call.lora_a is not None and call.lora_b is not None:
            low = hidden @ call.lora_a.to(hidden.dtype).T
            z = z + (low * rows_of(call.lora_b).to(hidden.dtype)).sum(-1)
        if call.bias is not None:
            z = z + rows_of(call.bias).to(hidden.dtype)
        z = z * call.logit_scale.to(z.dtype)
        z = z if call.softcap is None else call.softcap.to(z.dtype) * torch.tanh(z / call.softcap.to(z.dtype))
        return z / call.divisor

    label = logits(lambda x: x[labels])
    losses = -logprobs
    if label_smoothing != 0:
        losses = losses + label_smoothing * (label - logits(lambda x: upcast(x).mean(0)))
    if z_loss != 0:
        losses = losses + z_loss * (label - logprobs).square()
    return select(call.mask, losses)


def _swept(
    call: LinearCall, *, per_row: Tensor, scalars: Tensor, kind: str, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, logprobs [N], entropy [N] or [0], the gradients of the loss formed for those inputs that want one."""
    wanted = call.wanted
    loss, logprobs, entropy, *grads = _forward(*call.detached().by_rows(), per_row, scalars, kind, with_entropy, wanted)
    if any(wanted):
        grads[0] = grads[0].view(call.hidden.shape) if wanted.hidden else grads[0]
        loss = _WithGradients.apply(loss, *grads, *call.head_inputs)
    return loss, logprobs, entropy


class _WithGradients(torch.autograd.Function):
    """The loss, with the gradients of the call's head inputs that the forward has formed already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *grads_and_inputs: Tensor | None) -> Tensor:
        found = loss.clone()
        # Not the inputs: hidden is not needed any more. The output leads to them if a second derivative is asked for.
        ctx.save_for_backward(*grads_and_inputs[: len(Wanted._fields)], found)
        return found

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *grads, loss = ctx.saved_tensors
        count = len(grads)
        scaled = [
            _scaled(grad.detach(), grad_loss.detach()) if need else None
            for grad, need in zip(grads, ctx.needs_input_grad[1 + count :], strict=True)
        ]
        return *(None,) * (1 + count), *first_derivative(OP, [loss], *scaled)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor; in the saved gradient's own memory where this backward is its last reader.

    A second tensor of the weight's size would be more than the forward's whole workspace.
    """
    if not validate.is_eager([grad, factor]) or graph_is_kept():
        return grad * factor.to(grad.dtype)
    if factor.device.type == "cpu" and factor.item() == 1:
        return grad
    return grad.mul_(factor.to(grad.dtype))


@torch.library.custom_op(
    "rlhf_kernels::linear_policy_loss",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor per_row, Tensor scalars, str kind, bool with_entropy, bool[] wanted)"
    f" -> (Tensor, Tensor, Tensor, {GRADIENTS})",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """per_row [k, N] and scalars as in `token_terms` -> loss [], logprobs [N], entropy [N] or [0], gradients."""
    call, (per_row, scalars, kind, with_entropy, wanted) = split(arguments)
    rows, new = call.labels.shape[0], call.hidden.new_zeros
    losses, logprobs = (new(rows, dtype=torch.float32) for _ in range(2))
    entropy = new(rows if with_entropy else 0, dtype=torch.float32)
    wanted = Wanted(*wanted)
    sweep = call.sweep(OP, keep=any(wanted), wants_weight=wanted.weight)
    gradients = Gradients(sweep, wanted)
    numbers = scalars.tolist()
    for chunk in sweep:
        found, found_entropy, stats = sweep.softmax(chunk, with_entropy)
        logprobs[chunk.row_indices] = found
        if with_entropy:
            entropy[chunk.row_indices] = found_entropy
        terms = per_row[:, chunk.row_indices]
        losses[chunk.row_indices], g, g_entropy = token_terms(found, found_entropy, terms, numbers, kind)
        if any(wanted):
            _add_gradient(sweep, gradients, chunk, g, g_entropy, stats, found_entropy)
    return losses.sum(dtype=torch.float64).float(), logprobs, entropy, *gradients.finish()


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, (*_, with_entropy, wanted) = split(arguments)
    new, rows = call.hidden.new_empty, call.labels.shape[0]
    return (
        new((), dtype=torch.float32),
        new(rows, dtype=torch.float32),
        new(rows if with_entropy else 0, dtype=torch.float32),
        *call.empty_gradients(Wanted(*wanted)),
    )


def _add_gradient(
    sweep: ChunkedHead,
    gradients: Gradients,
    chunk: RowChunk,
    g: Tensor,
    g_entropy: Tensor | None,
    stats: Tensor,
    entropy: Tensor,
) -> None:
    if g.device.type == "cpu":  # elsewhere how many rows are left is not known without a sync
        moved = g != 0 if g_entropy is None else (g != 0) | (g_entropy != 0)
        kept = moved.nonzero().squeeze(-1)
        if kept.numel() == 0:
            return
        if kept.numel() < 0.9 * g.numel():  # fewer are not worth the copies
            chunk = sweep.compacted(chunk, kept)
            g, stats = g[kept], stats[kept]
            if g_entropy is not None:
                g_entropy, entropy = g_entropy[kept], entropy[kept]
    coefficients = sweep.coefficients(chunk, g, g_entropy, stats, entropy)
    gradients.add(chunk, sweep.gradient_tiles(chunk, coefficients, exact=gradients.wanted.needs_exact_tiles))
