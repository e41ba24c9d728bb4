"""What soak.py runs of each op: outputs and gradients of one random call, and how large its numbers get.

The unit of an error is an ulp (of fp32, or of a 16-bit product) at the largest number that the result comes from: what
one rounding on the way makes of it, not the last place of the result itself, which cancellation may leave far smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import rlhf_kernels as rk
from support import strategies

ULP = 2.0**-23
LIMIT = 16.0


class Output(NamedTuple):
    value: Tensor
    scale: float  # largest number that its computation involves, besides its own size
    counted: Tensor | None = None  # where false, value is exactly 0
    ulp: float = ULP  # of the numbers in between: those of fp32, or of a 16-bit product


class Soaked(NamedTuple):
    calls: SearchStrategy
    check: Callable[[object, str, str], float]  # (call, backend, device) -> worst error; AssertionError at a mismatch
    kernel: bool = True  # whether there is one; if not, the backend is "reference": plain PyTorch in the call's dtypes


def compared(
    calls: SearchStrategy, run: Callable[..., list[Output]], *, kernel: bool = True, limit: float = LIMIT
) -> Soaked:
    """run(call, cast) on the backend against the reference in float64; `cast` takes a float tensor to where it runs.

    run calls the op once, forward and backward. limit: of the error.
    """

    def check(call: object, backend: str, device: str) -> float:
        with rk.use_backend("reference"):
            truths = run(call, lambda x: x.double())
        with rk.use_backend(backend):
            results = run(call, lambda x: x.to(device))
        worst = 0.0
        for number, (got, exact) in enumerate(zip(results, truths, strict=True)):
            error = _error(got, exact)
            assert error <= limit, f"output {number}: {error:.3g} ulp of the largest number involved"
            worst = max(worst, error)
        return worst

    return Soaked(calls, check, kernel)


def _error(got: Output, truth: Output) -> float:
    """In ulp (`got.ulp`) at the largest number involved; infinite for a mismatch of NaN, infinity or a masked zero."""
    value, exact = got.value.detach().double().cpu(), truth.value.detach().double().cpu()
    if got.counted is not None and bool((value[~got.counted] != 0).any()):
        return float("inf")
    stores = torch.finfo(got.value.dtype)
    if got.value.dtype in (torch.float16, torch.bfloat16):  # finite gradients saturate
        exact = torch.where(exact.isfinite(), exact.clamp(-stores.max, stores.max), exact)
    finite = exact.isfinite() & value.isfinite()
    if not bool((finite | (value == exact) | (value.isnan() & exact.isnan())).all()):
        return float("inf")
    error = (value - exact).abs()[finite]
    if not error.numel():
        return 0.0
    if got.value.dtype != torch.float32:  # rounded once: half a unit of its last place, a whole one if truncated
        error = (error - stores.eps * exact[finite].abs() - stores.smallest_normal * stores.eps).clamp(min=0)
    return float((error / (got.ulp * exact[finite].abs().clamp(min=truth.scale))).max())


def _largest(*tensors: Tensor | None) -> float:
    finite = [x[x.isfinite()].abs() for x in tensors if x is not None]
    return max([1.0, *(float(x.max()) for x in finite if x.numel())])


def _selected_logprobs(call: strategies.LogitsCall, cast: Callable) -> list[Output]:
    x = cast(call.logits).detach().requires_grad_()
    temperature = cast(call.temperature) if isinstance(call.temperature, Tensor) else call.temperature
    mask = None if call.mask is None else call.mask.to(x.device)
    outputs = rk.selected_logprobs(x, call.labels.to(x.device), mask=mask, temperature=temperature, with_entropy=True)
    (grad,) = torch.autograd.grad(sum(y.sum() for y in outputs), x)
    # exp((x - m) / T) carries the rounding of its exponent, which matters down to exp(-88).
    return [*(Output(y, 90.0, call.mask) for y in outputs), Output(grad, 90.0, call.mask)]


def _full_kl(drawn: tuple[strategies.LogitsCall, str], cast: Callable) -> list[Output]:
    call, direction = drawn
    x = cast(call.logits).detach().requires_grad_()
    ref_logits = cast(call.logits.flip(-1) * 0.75)  # exact in every dtype
    temperature = cast(call.temperature) if isinstance(call.temperature, Tensor) else call.temperature
    mask = None if call.mask is None else call.mask.to(x.device)
    kl = rk.full_kl(x, ref_logits, direction=direction, temperature=temperature, mask=mask)
    (grad,) = torch.autograd.grad(kl.sum(), x)
    involved = 90.0 + 2 * _largest(call.logits if call.mask is None else call.logits[call.mask])
    return [Output(kl, involved, call.mask), Output(grad, involved, call.mask)]


def _ppo_advantages(call: strategies.BatchCall, cast: Callable) -> list[Output]:
    logprobs, ref_logprobs, values = (cast(x) for x in call.tensors[:3])
    mask = torch.ones(values.shape, dtype=torch.bool) if call.mask is None else call.mask
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.95, "whiten": False}
    outputs = rk.ppo_advantages(logprobs, ref_logprobs, cast(call.row), values, mask.to(values.device), **options)
    involved = _largest(*_counted(call)[:3]) * values.shape[1] ** 0.5
    return [Output(y, involved, mask) for y in outputs]


def _gae(call: strategies.GaeCall, cast: Callable) -> list[Output]:
    rewards, values = cast(call.rewards), cast(call.values)
    mask, bootstrap = (None if x is None else x.to(rewards.device) for x in (call.mask, call.bootstrap))
    options = {"gamma": call.gamma, "lam": call.lam, "masked": call.masked}
    outputs = rk.gae(rewards, values, mask, bootstrap=None if bootstrap is None else cast(bootstrap), **options)
    involved = _largest(
        *(x[call.mask] if call.mask is not None else x for x in (call.rewards, call.values)), call.bootstrap
    )
    return [Output(y, involved * max(1, call.rewards.shape[-1]) ** 0.5, call.mask) for y in outputs]


def _gae_packed(call: strategies.PackedCall, cast: Callable) -> list[Output]:
    rewards, values = cast(call.rewards), cast(call.values)
    mask, bootstrap = (None if x is None else x.to(rewards.device) for x in (call.mask, call.bootstrap))
    cu_seqlens = torch.tensor([0, *call.lengths]).cumsum(0).to(call.dtype).to(rewards.device)
    options = {"gamma": call.gamma, "lam": call.lam, "masked": call.masked, "cu_seqlens": cu_seqlens}
    outputs = rk.gae(rewards, values, mask, bootstrap=None if bootstrap is None else cast(bootstrap), **options)
    involved = _largest(
        *(x if call.mask is None else x[call.mask] for x in (call.rewards, call.values)), call.bootstrap
    )
    return [Output(y, involved * max([1, *call.lengths]) ** 0.5, call.mask) for y in outputs]


def _counted(call: strategies.BatchCall) -> list[Tensor]:
    """The call's tensors in float64 with zeros where the mask hides them."""
    mask = torch.ones(call.tensors[0].shape, dtype=torch.bool) if call.mask is None else call.mask
    return [torch.where(mask, x, torch.zeros_like(x)).double() for x in call.tensors]


def _per_token_kl(drawn: tuple[strategies.BatchCall, str], cast: Callable) -> list[Output]:
    """Masks are not this op's: what they would hide is NaN in, NaN out."""
    call, estimator = drawn
    a, b = (cast(x).detach().requires_grad_() for x in call.tensors[:2])
    kl = rk.per_token_kl(a, b, estimator=estimator)
    return [Output(y, 1.0) for y in (kl, *torch.autograd.grad(kl.sum(), (a, b)))]


def _shaped_rewards(call: strategies.BatchCall, cast: Callable) -> list[Output]:
    mask = torch.ones(call.tensors[0].shape, dtype=torch.bool) if call.mask is None else call.mask
    kl, clip = cast(call.tensors[0]), 0.5 if call.flag else None
    rewards = rk.shaped_rewards(cast(call.row), kl, mask.to(kl.device), kl_coef=0.1, clip=clip)
    return [Output(rewards, 1.0, mask)]


def _whiten(call: strategies.BatchCall, cast: Callable) -> list[Output]:
    x = cast(call.tensors[0]).detach().requires_grad_()
    mask = None if call.mask is None else call.mask.to(x.device)
    white = rk.whiten(x, mask, shift_mean=call.flag, eps=1e-2)
    (grad,) = torch.autograd.grad((white * cast(call.row)[:, None]).sum(), x)
    # A mean far from 0 is subtracted: the last place of the input over the spread.
    counted = _counted(call)[0] if call.mask is None else _counted(call)[0][call.mask]
    spread = float(counted.std(correction=0)) if counted.numel() else 0.0
    involved = _largest(counted) / (spread**2 + 1e-2) ** 0.5
    return [
        Output(white, involved * (1 if call.flag else _largest(counted)), call.mask),
        Output(grad, 10 * involved, call.mask),
    ]


def _policy_loss(drawn: tuple[strategies.BatchCall, dict], cast: Callable) -> list[Output]:
    call, options = drawn
    logprobs, old, advantages, weights = (cast(x).detach() for x in call.tensors)
    logprobs.requires_grad_()
    mask = None if call.mask is None else call.mask.to(logprobs.device)
    new_counted, old_counted, adv_counted, weight_counted = _counted(call)
    log_ratio = new_counted - old_counted
    if options.get("ratio") == "sequence":
        count = torch.ones_like(log_ratio) if call.mask is None else call.mask.double()
        log_ratio = (log_ratio.sum(1) / count.sum(1).clamp(min=1)).unsqueeze(1).expand_as(log_ratio)
    factor = log_ratio.clamp(-20, 20).exp()
    clipped = torch.where(
        adv_counted > 0,
        factor.clamp(max=1 + options.get("clip_high", 0.2)),
        factor.clamp(min=0.8, max=options.get("dual_clip", float("inf"))),
    )
    terms = clipped * adv_counted * (weight_counted if call.flag else 1)
    loss, stats = rk.policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        importance_weights=weights if call.flag else None,
        aggregate=call.aggregate,
        **options,
    )
    (grad,) = torch.autograd.grad(loss, logprobs)
    # The last place of an exponent, of 20 or of a mean over larger ones, is a relative error of its exponential.
    exponent = max(20.0, _largest(new_counted, old_counted) if options.get("ratio") else 20.0)
    scale = exponent * _largest(terms) * max(1.0, terms.numel() ** 0.5)
    ratios = exponent * _largest(factor)
    stats_compared = [Output(x, ratios) for name, x in stats.items() if "fraction" not in name]
    return [Output(loss, scale), Output(grad, scale, call.mask), *stats_compared]


def _value_loss(call: strategies.BatchCall, cast: Callable) -> list[Output]:
    values, old, returns, _ = (cast(x).detach() for x in call.tensors)
    values.requires_grad_()
    mask = None if call.mask is None else call.mask.to(values.device)
    loss, _ = rk.value_loss(values, old, returns, mask, clip=0.2 if call.flag else None, aggregate=call.aggregate)
    (grad,) = torch.autograd.grad(loss, values)
    largest = _largest(*_counted(call))
    return [Output(loss, largest**2 * max(1.0, values.numel() ** 0.5)), Output(grad, largest, call.mask)]


def _pairwise_loss(drawn: tuple[strategies.PreferenceCall, str], cast: Callable) -> list[Output]:
    call, reduction = drawn
    chosen, rejected = (cast(x).detach().requires_grad_() for x in call.pairs[:2])
    margin, label = (cast(x) if isinstance(x, Tensor) else x for x in (call.margin, call.label))
    losses = rk.pairwise_loss(chosen, rejected, margin=margin, label=label, reduction=reduction)
    grads = torch.autograd.grad(losses.sum(), (chosen, rejected))
    # The last place of the difference is an error of the loss and, relatively, of its slope.
    involved = _largest(*call.pairs[:2])
    return [Output(losses, involved), *(Output(grad, involved) for grad in grads)]


def _dpo_loss(call: strategies.PreferenceCall, cast: Callable) -> list[Output]:
    tensors = [cast(x).detach() for x in call.pairs]
    for x in tensors[:2]:
        x.requires_grad_()
    loss, *rewards = rk.dpo_loss(*tensors, **call.options)
    grads = torch.autograd.grad(loss, tensors[:2])
    # Of the differences, of beta times them, or of their squares.
    difference, beta = 4 * _largest(*call.pairs), call.options["beta"]
    slope = 2 * (difference + 0.5 / beta) if call.options["kind"] == "ipo" else beta * (1 + beta * difference)
    return [
        Output(loss, difference * slope),
        *(Output(reward, beta * difference) for reward in rewards),
        *(Output(grad, slope) for grad in grads),
    ]


def _group_advantages(call: strategies.PreferenceCall, cast: Callable) -> list[Output]:
    scores = cast(call.pairs[0])
    groups = call.groups.to(scores.device) if isinstance(call.groups, Tensor) else call.groups
    return [Output(rk.group_advantages(scores, groups, kind=call.kind), 1e-30)]


_LOGITS, _BATCHES, _PREFERENCES = (
    make() for make in (strategies.logits_calls, strategies.batch_calls, strategies.preference_calls)
)
_POLICY_OPTIONS = st.sampled_from([{}, {"dual_clip": 3.0, "clip_high": 0.3}, {"ratio": "sequence"}])

SOAKED = {
    "dpo_loss": compared(_PREFERENCES, _dpo_loss, kernel=False),
    "full_kl": compared(st.tuples(_LOGITS, st.sampled_from(["reverse", "forward", "jsd"])), _full_kl),
    "gae": compared(strategies.gae_calls(), _gae),
    "gae_packed": compared(strategies.packed_calls(), _gae_packed),
    "group_advantages": compared(_PREFERENCES, _group_advantages, kernel=False),
    "pairwise_loss": compared(st.tuples(_PREFERENCES, st.sampled_from(["mean", "none"])), _pairwise_loss, kernel=False),
    "per_token_kl": compared(st.tuples(_BATCHES, st.sampled_from(["k1", "k2", "k3", "abs"])), _per_token_kl),
    "policy_loss": compared(st.tuples(_BATCHES, _POLICY_OPTIONS), _policy_loss),
    "ppo_advantages": compared(_BATCHES, _ppo_advantages),
    "selected_logprobs": compared(_LOGITS, _selected_logprobs),
    "shaped_rewards": compared(_BATCHES, _shaped_rewards),
    "value_loss": compared(_BATCHES, _value_loss),
    "whiten": compared(_BATCHES, _whiten),
}
