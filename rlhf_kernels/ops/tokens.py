"""The token family over [B, T]: per-token KL, shaped rewards and whitening."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.ops.autograd import first_derivative, register_autograd
from rlhf_kernels.reference import tokens as reference
from rlhf_kernels.reference.common import clamp

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Estimator = Literal["k1", "k2", "k3", "abs"]
ESTIMATORS = ("k1", "k2", "k3", "abs")
KL, REWARDS, WHITEN = "per_token_kl", "shaped_rewards", "whiten"


def per_token_kl(
    logprobs: Tensor, ref_logprobs: Tensor, *, estimator: Estimator = "k1", cap: float | None = None
) -> Tensor:
    """Estimate KL(pi || ref) at each token from the logprobs of the token that was sampled from pi.

    With `d = logprobs - ref_logprobs`: k1 `d`, k2 `d**2 / 2`, k3 `exp(-d) - 1 + d`, abs `|d|`
    (Schulman, "Approximating KL divergence", 2020). All but abs have the right mean or are close to it, but only k1
    has the right gradient as a penalty inside the reward: k2, k3 and abs there reward dropping mass of the reference.

    Args:
        logprobs, ref_logprobs: [...] float, nats, of the same tokens under the policy and under the reference.
        estimator: "k1", "k2", "k3" or "abs". Exponents are clamped to +-20 before exp: no finite input gives inf.
        cap: > 0, bound of the estimate's absolute value, beyond which its gradient is 0 (10 in verl and OpenRLHF);
            None: no bound.

    Returns:
        [...] float32 (float64 for float64 inputs), nats; differentiable in both arguments.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    validate.float_tensor(KL, "logprobs", logprobs)
    validate.float_like(KL, "ref_logprobs", ref_logprobs, "logprobs", logprobs)
    validate.choice(KL, "estimator", estimator, ESTIMATORS)
    if cap is not None:
        cap = validate.number(KL, "cap", cap, above=0)
        kl = per_token_kl(logprobs, ref_logprobs, estimator=estimator)
        return clamp(kl, -cap, cap)
    if dispatch.select_backend(KL, validate.deciding(logprobs, ref_logprobs)) is None:
        return reference.per_token_kl(logprobs, ref_logprobs, estimator)
    with_slope = torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad)
    return _per_token_kl(logprobs, ref_logprobs, ESTIMATORS.index(estimator), with_slope)[0]


@torch.library.custom_op("rlhf_kernels::per_token_kl", mutates_args=())
def _per_token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, with_slope: bool) -> tuple[Tensor, Tensor]:
    """logprobs, ref_logprobs [...] -> kl [...], and its slope in logprobs [...] or [0]; `estimator`: of ESTIMATORS."""
    backend = dispatch.backend_module(dispatch.require_backend(KL, logprobs))
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
    backend = dispatch.backend_module(dispatch.require_backend(KL, slope))
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
    ctx.inputs = inputs[:2]  # not saved: their values are not needed, and inputs make no circle of references


def _kl_autograd(ctx: Any, grad: Tensor | None, _grad_slope: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    wanted = [x.dtype if needed else None for x, needed in zip(ctx.inputs, ctx.needs_input_grad, strict=False)]
    (slope,) = ctx.saved_tensors
    grads = _per_token_kl_backward(grad.detach(), slope, *wanted)
    found = (g if dtype is not None else None for g, dtype in zip(grads, wanted, strict=True))
    return *first_derivative(KL, ctx.inputs, *found), None, None


register_autograd(_per_token_kl, _kl_autograd, _kl_context)


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
    validate.float_tensor(REWARDS, "kl", kl)
    if kl.dim() != 2:
        raise ValueError(f"{REWARDS}: kl has shape {list(kl.shape)}; it takes [B, T]")
    validate.float_tensor(REWARDS, "scores", scores)
    validate.same_device_and_shape(REWARDS, "scores", scores, "kl", kl.shape[:1], kl.device)
    kl = validate.poisoned(mask, kl)
    mask = validate.required_mask(REWARDS, mask, "kl", kl.shape, kl.device)
    kl_coef = validate.number(REWARDS, "kl_coef", kl_coef, low=0)
    if clip is not None:
        clip = validate.number(REWARDS, "clip", clip, above=0)
    scores, kl = scores.detach(), kl.detach()
    if dispatch.select_backend(REWARDS, validate.deciding(kl, scores)) is None:
        return reference.shaped_rewards(scores, kl, mask, kl_coef, clip)
    bound = validate.runtime_scalar(math.inf if clip is None else clip)
    return _shaped_rewards(scores, kl, mask, validate.runtime_scalar(kl_coef), bound)


@torch.library.custom_op("rlhf_kernels::shaped_rewards", mutates_args=())
def _shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: Tensor, clip: Tensor) -> Tensor:
    """scores [B], kl, mask [B, T], kl_coef, clip [] -> rewards [B, T]; clip inf is none."""
    backend = dispatch.backend_module(dispatch.require_backend(REWARDS, kl))
    return backend.shaped_rewards(scores, kl, mask, kl_coef.item(), clip.item())


@_shaped_rewards.register_fake
def _(scores: Tensor, kl: Tensor, *rest: Any) -> Tensor:
    return kl.new_empty(kl.shape, dtype=torch.float32)


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    dim: int | tuple[int, ...] | None = None,
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
        unbiased: divide the squared deviations by the count - 1 instead of the count; a single element has variance 0.
            The reference serves it.
        dim: dimensions over which mean and variance are taken, for each index of the others on its own; None: all. The
            reference serves it; without process_group.
        eps: > 0, added to the variance.
        process_group: take mean and variance over all ranks of this torch.distributed group. Then not differentiable.

    Returns:
        [...] float32 (float64 for float64 x), exactly 0 where mask is false; all zeros if nothing counts.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    validate.float_tensor(WHITEN, "x", x)
    x = validate.poisoned(mask, x)
    mask = validate.bool_mask(WHITEN, mask, "x", x.shape, x.device)
    eps = validate.number(WHITEN, "eps", eps, above=0)
    if process_group is not None and x.requires_grad:
        raise ValueError(f"{WHITEN}: x requires grad; with process_group whiten is not differentiable, pass x.detach()")
    if dim is not None and process_group is not None:
        raise ValueError(f"{WHITEN}: dim is {dim!r}, and process_group is given too; it takes one of them")
    if unbiased or dim is not None or dispatch.select_backend(WHITEN, x) is None:
        return reference.whiten(
            x, mask, shift_mean, eps, process_group, unbiased=unbiased, dim=_dimensions(dim, x.dim())
        )
    parts = None
    if process_group is not None:
        parts = reference.gather_moments(_whiten_moments(x, mask), process_group)
    return _whiten(x, mask, parts, validate.runtime_scalar(eps), shift_mean)[0]


def _dimensions(dim: int | tuple[int, ...] | None, count: int) -> tuple[int, ...] | None:
    if dim is None:
        return None
    found = (dim,) if isinstance(dim, int) else tuple(dim)
    if not all(-count <= d < count for d in found) or len({d % count for d in found}) != len(found):
        raise ValueError(f"{WHITEN}: dim is {dim!r}; with this x it takes different dimensions in [{-count}, {count})")
    return found


@torch.library.custom_op("rlhf_kernels::whiten_moments", mutates_args=())
def _whiten_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, mask [...] -> [3] float64: count, mean and sum of squared distances to it, of what counts."""
    return dispatch.backend_module(dispatch.require_backend(WHITEN, x)).whiten_moments(x, mask)


@_whiten_moments.register_fake
def _(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


@torch.library.custom_op("rlhf_kernels::whiten", mutates_args=())
def _whiten(
    x: Tensor, mask: Tensor | None, parts: Tensor | None, eps: Tensor, shift_mean: bool
) -> tuple[Tensor, Tensor]:
    """x, mask [...], eps [] -> x whitened [...], and the moments [3] used: x's, or those of `parts` [R, 3] merged."""
    backend = dispatch.backend_module(dispatch.require_backend(WHITEN, x))
    return backend.whiten_fwd(x, mask, parts, eps.item(), shift_mean)


@_whiten.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(3, dtype=torch.float64)


@torch.library.custom_op("rlhf_kernels::whiten_backward", mutates_args=())
def _whiten_backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, eps: Tensor, shift_mean: bool
) -> Tensor:
    backend = dispatch.backend_module(dispatch.require_backend(WHITEN, x))
    return backend.whiten_bwd(grad, x, mask, moments, eps.item(), shift_mean)


@_whiten_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _whiten_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, _, eps, shift_mean = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, mask, output[1], eps)
    ctx.shift_mean = shift_mean


def _whiten_autograd(ctx: Any, grad: Tensor | None, _grad_moments: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    x, mask, moments, eps = ctx.saved_tensors
    found = _whiten_backward(grad.detach(), x.detach(), mask, moments, eps, ctx.shift_mean)
    return *first_derivative(WHITEN, [x], found), None, None, None, None


register_autograd(_whiten, _whiten_autograd, _whiten_context)
