"""The token family over [B, T]: per-token KL, shaped rewards and whitening."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.reference import tokens as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Estimator = Literal["k1", "k2", "k3", "abs"]
ESTIMATORS = ("k1", "k2", "k3", "abs")
KL, REWARDS, WHITEN = "per_token_kl", "shaped_rewards", "whiten"


def per_token_kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: Estimator = "k1") -> Tensor:
    """Estimate KL(pi || ref) at each token from the logprobs of the token that was sampled from pi.

    With `d = logprobs - ref_logprobs`: k1 `d`, k2 `d**2 / 2`, k3 `exp(-d) - 1 + d`, abs `|d|`
    (Schulman, "Approximating KL divergence", 2020). All but abs have the right mean or are close to it, but only k1
    has the right gradient as a penalty inside the reward: k2, k3 and abs there reward dropping mass of the reference.

    Args:
        logprobs, ref_logprobs: [...] float, nats, of the same tokens under the policy and under the reference.
        estimator: "k1", "k2", "k3" or "abs". Exponents are clamped to +-20 before exp: no finite input gives inf.

    Returns:
        [...] float32 (float64 for float64 inputs), nats; differentiable in both arguments.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    validate.float_tensor(KL, "logprobs", logprobs)
    validate.like(KL, "ref_logprobs", ref_logprobs, "logprobs", logprobs)
    validate.choice(KL, "estimator", estimator, ESTIMATORS)
    if dispatch.kernel(KL, _widest(logprobs, ref_logprobs)) is None:
        return reference.per_token_kl(logprobs, ref_logprobs, estimator)
    with_slope = torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad)
    return _per_token_kl(logprobs, ref_logprobs, ESTIMATORS.index(estimator), with_slope)[0]


def _widest(a: Tensor, b: Tensor) -> Tensor:
    """The one that decides whether there is a kernel: float64 has none."""
    return b if b.dtype == torch.float64 else a


@torch.library.custom_op("rlhf_kernels::per_token_kl", mutates_args=())
def _per_token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, with_slope: bool) -> tuple[Tensor, Tensor]:
    """logprobs, ref_logprobs [...] -> kl [...], and its slope in logprobs [...] or [0]; `estimator`: of ESTIMATORS."""
    backend = dispatch.load(dispatch.required(KL, logprobs))
    return backend.per_token_kl_fwd(logprobs, ref_logprobs, estimator, with_slope)


@_per_token_kl.register_fake
def _(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, with_slope: bool) -> tuple[Tensor, Tensor]:
    def new() -> Tensor:
        return logprobs.new_empty(logprobs.shape, dtype=torch.float32)

    return new(), new() if with_slope else logprobs.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("rlhf_kernels::per_token_kl_backward", mutates_args=())
def _per_token_kl_backward(
    grad: Tensor, slope: Tensor, dtype: torch.dtype | None, ref_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """grad, slope [...] -> gradients of logprobs and ref_logprobs, each [...] in its dtype, [0] where that is None."""
    backend = dispatch.load(dispatch.required(KL, slope))
    return backend.per_token_kl_bwd(grad, slope, dtype, ref_dtype)


@_per_token_kl_backward.register_fake
def _(grad: Tensor, slope: Tensor, dtype: torch.dtype | None, ref_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    def new(wanted: torch.dtype | None) -> Tensor:
        return slope.new_empty(0) if wanted is None else slope.new_empty(slope.shape, dtype=wanted)

    return new(dtype), new(ref_dtype)


def _kl_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _kl_autograd(ctx: Any, grad: Tensor | None, _grad_slope: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    wanted = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[:2], strict=True)]
    grads = _per_token_kl_backward(grad, *ctx.saved_tensors, *wanted)
    return *(g if dtype is not None else None for g, dtype in zip(grads, wanted, strict=True)), None, None


_per_token_kl.register_autograd(_kl_autograd, setup_context=_kl_context)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, clip: float | None = None) -> Tensor:
    """Token rewards of RLHF's PPO: a KL penalty at every token, the sequence's score at its last counted token.

    Equals `-kl_coef * kl` with `scores` (bounded to +-clip first, if given) added at the last true position of each
    row of `mask` (Ziegler et al. 2019, arXiv:1909.08593). Not differentiable: rewards are targets.

    Args:
        scores: [B] float, reward units. Not used for a fully masked sequence, which gets nothing.
        kl: [B, T] float, nats per token (`per_token_kl(..., estimator="k1")`); not used where mask is false.
        mask: [B, T] bool or 0/1, true where the token counts.
        kl_coef: weight of the penalty (beta), >= 0, reward units per nat.
        clip: bound on |score|, > 0, or None.

    Returns:
        [B, T] float32 (float64 for float64 inputs), exactly 0 where mask is false.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    op = "shaped_rewards"
    validate.float_tensor(op, "kl", kl)
    if kl.dim() != 2:
        raise ValueError(f"{op}: kl has shape {list(kl.shape)}; it takes [B, T]")
    validate.float_tensor(op, "scores", scores)
    validate.same_place(op, "scores", scores, "kl", kl.shape[:1], kl.device)
    mask = validate.required_mask(op, mask, "kl", kl.shape, kl.device)
    validate.number(op, "kl_coef", kl_coef, low=0)
    if clip is not None:
        validate.number(op, "clip", clip, above=0)
    dispatch.kernel(op, kl)
    return reference.shaped_rewards(scores.detach(), kl.detach(), mask, kl_coef, clip)


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Scale the counted elements to variance 1 and, with `shift_mean`, to mean 0.

    Equals `(x - mean) / sqrt(var + eps)` with mean and population variance over the counted elements, plus the mean
    again when not `shift_mean`.

    Args:
        x: [...] float, any unit.
        mask: [...] bool or 0/1, true where the element counts; others are not used.
        shift_mean: subtract the mean; if false the mean is kept.
        eps: > 0, added to the variance.
        process_group: take mean and variance over all ranks of this torch.distributed group. Then not differentiable.

    Returns:
        [...] float32 (float64 for float64 x), exactly 0 where mask is false; all zeros if nothing counts.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    op = "whiten"
    validate.float_tensor(op, "x", x)
    mask = validate.bool_mask(op, mask, "x", x.shape, x.device)
    validate.number(op, "eps", eps, above=0)
    if process_group is not None and x.requires_grad:
        raise ValueError(f"{op}: x requires grad; with process_group whiten is not differentiable, pass x.detach()")
    dispatch.kernel(op, x)
    return reference.whiten(x, mask, shift_mean, eps, process_group)
