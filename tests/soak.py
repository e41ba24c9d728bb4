"""Very many random calls of every op on one backend against the reference in float64; prints the worst of each.

python tests/soak.py {cpu|triton} --cases 1000000 --seed 0 [--only OP]   (Triton: in its interpreter without a GPU)

A mismatch is NaN or infinity where truth has none (or another one), something other than 0 at a masked place, or an
error above 16 ulp (fp32) of the largest number involved. The exit code is 1 if there is one, and the call is printed.
The accuracy rule proper, which compares with plain PyTorch's error, is what the conformance tests check.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import strategies
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import rlhf_kernels as rk

ULP = 2.0**-23
LIMIT = 16.0
BATCH = 2_000  # cases of one run of hypothesis, whose memory grows with them


class Output(NamedTuple):
    value: Tensor
    scale: float  # largest number that its computation involves, besides its own size
    counted: Tensor | None = None  # where false, value is exactly 0


class Soaked(NamedTuple):
    calls: SearchStrategy
    run: Callable[..., list[Output]]  # (call, cast): `cast` takes a float tensor to the dtype and device of this run


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


def _full_kl(call: strategies.LogitsCall, cast: Callable) -> list[Output]:
    ref_logits = cast(call.logits.flip(-1) * 0.75)  # exact in every dtype
    temperature = cast(call.temperature) if isinstance(call.temperature, Tensor) else call.temperature
    mask = None if call.mask is None else call.mask.to(ref_logits.device)
    outputs = []
    for direction in ("reverse", "forward", "jsd"):
        x = cast(call.logits).detach().requires_grad_()
        kl = rk.full_kl(x, ref_logits, direction=direction, temperature=temperature, mask=mask)
        (grad,) = torch.autograd.grad(kl.sum(), x)
        involved = 90.0 + 2 * _largest(call.logits if call.mask is None else call.logits[call.mask])
        outputs += [Output(kl, involved, call.mask), Output(grad, involved, call.mask)]
    return outputs


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


def _per_token_kl(call: strategies.BatchCall, cast: Callable) -> list[Output]:
    """Masks are not this op's: what they would hide is NaN in, NaN out."""
    outputs = []
    for estimator in ("k1", "k2", "k3", "abs"):
        a, b = (cast(x).detach().requires_grad_() for x in call.tensors[:2])
        kl = rk.per_token_kl(a, b, estimator=estimator)
        grads = torch.autograd.grad(kl.sum(), (a, b))
        outputs += [Output(y, 1.0) for y in (kl, *grads)]
    return outputs


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


def _policy_loss(call: strategies.BatchCall, cast: Callable) -> list[Output]:
    logprobs, old, advantages, weights = (cast(x).detach() for x in call.tensors)
    logprobs.requires_grad_()
    mask = None if call.mask is None else call.mask.to(logprobs.device)
    new_counted, old_counted, adv_counted, weight_counted = _counted(call)
    terms = (new_counted - old_counted).clamp(-20, 20).exp() * adv_counted * (weight_counted if call.flag else 1)
    outputs = []
    for options in ({}, {"dual_clip": 3.0, "clip_high": 0.3}, {"ratio": "sequence"}):
        loss, stats = rk.policy_loss(
            *(logprobs, old, advantages, mask),
            importance_weights=weights if call.flag else None,
            aggregate=call.aggregate,
            **options,
        )
        (grad,) = torch.autograd.grad(loss, logprobs)
        # The last place of an exponent, of 20 or of a mean over larger ones, is a relative error of its exponential.
        exponent = max(20.0, _largest(new_counted, old_counted) if options.get("ratio") else 20.0)
        scale = exponent * _largest(terms) * max(1.0, terms.numel() ** 0.5)
        ratios = exponent * _largest((new_counted - old_counted).clamp(-20, 20).exp())
        outputs += [Output(loss, scale), Output(grad, scale, call.mask)]
        outputs += [Output(x, ratios) for name, x in stats.items() if "fraction" not in name]
    return outputs


def _value_loss(call: strategies.BatchCall, cast: Callable) -> list[Output]:
    values, old, returns, _ = (cast(x).detach() for x in call.tensors)
    values.requires_grad_()
    mask = None if call.mask is None else call.mask.to(values.device)
    loss, _ = rk.value_loss(values, old, returns, mask, clip=0.2 if call.flag else None, aggregate=call.aggregate)
    (grad,) = torch.autograd.grad(loss, values)
    largest = _largest(*_counted(call))
    return [Output(loss, largest**2 * max(1.0, values.numel() ** 0.5)), Output(grad, largest, call.mask)]


SOAKED = {
    "full_kl": Soaked(strategies.logits_calls(), _full_kl),
    "gae": Soaked(strategies.gae_calls(), _gae),
    "gae_packed": Soaked(strategies.packed_calls(), _gae_packed),
    "per_token_kl": Soaked(strategies.batch_calls(), _per_token_kl),
    "policy_loss": Soaked(strategies.batch_calls(), _policy_loss),
    "ppo_advantages": Soaked(strategies.batch_calls(), _ppo_advantages),
    "selected_logprobs": Soaked(strategies.logits_calls(), _selected_logprobs),
    "shaped_rewards": Soaked(strategies.batch_calls(), _shaped_rewards),
    "value_loss": Soaked(strategies.batch_calls(), _value_loss),
    "whiten": Soaked(strategies.batch_calls(), _whiten),
}


def _error(got: Output, truth: Output, stores: torch.dtype) -> float:
    """In ulp of fp32 at the largest number involved; infinite for a mismatch of NaN, infinity or a masked zero."""
    value, exact = got.value.detach().double().cpu(), truth.value.detach().double().cpu()
    if got.counted is not None and bool((value[~got.counted] != 0).any()):
        return float("inf")
    if got.value.dtype in (torch.float16, torch.bfloat16):  # finite gradients saturate
        largest = torch.finfo(got.value.dtype).max
        exact = torch.where(exact.isfinite(), exact.clamp(-largest, largest), exact)
    finite = exact.isfinite() & value.isfinite()
    if not bool((finite | (value == exact) | (value.isnan() & exact.isnan())).all()):
        return float("inf")
    error = (value - exact).abs()[finite]
    if not error.numel():
        return 0.0
    if got.value.dtype != torch.float32:  # rounded once: half a unit of its last place, a whole one if truncated
        spacing = torch.finfo(got.value.dtype).eps
        error = (error - spacing * exact[finite].abs() - torch.finfo(got.value.dtype).smallest_normal * spacing).clamp(
            min=0
        )
    return float((error / (ULP * exact[finite].abs().clamp(min=truth.scale))).max())


def soak(op: str, backend: str, cases: int, first_seed: int) -> tuple[int, float]:
    """Run `cases` calls -> (how many ran, worst error). Raises AssertionError with the call at a mismatch."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    worst, ran = 0.0, 0

    def check(call: object) -> None:
        nonlocal worst, ran
        with rk.use_backend("reference"):
            truths = SOAKED[op].run(call, lambda x: x.double())
        with rk.use_backend(backend):
            results = SOAKED[op].run(call, lambda x: x.to(device))
        ran += 1
        for number, (got, truth) in enumerate(zip(results, truths, strict=True)):
            error = _error(got, truth, got.value.dtype)
            assert error <= LIMIT, f"{op}, output {number}: {error:.3g} ulp of the largest number involved, at {call}"
            worst = max(worst, error)

    for start in range(0, cases, BATCH):
        run = settings(
            max_examples=min(BATCH, cases - start),
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(given(call=SOAKED[op].calls)(check))
        seed(first_seed + start // BATCH)(run)()
    return ran, worst


def small_triton_blocks() -> None:
    """The interpreter's time goes with the size of a block, and short inputs shall span several."""
    import conftest
    import pytest

    conftest.shrink_blocks(pytest.MonkeyPatch())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["cpu", "triton"])
    parser.add_argument("--cases", type=int, default=10_000, help="over all ops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SOAKED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.backend == "triton" and not torch.cuda.is_available():
        small_triton_blocks()
    ops = [options.only] if options.only else list(SOAKED)
    total, failed = 0, False
    for number, op in enumerate(ops):
        share = options.cases // len(ops) + (number < options.cases % len(ops))
        began = time.perf_counter()
        try:
            ran, worst = soak(op, options.backend, share, options.seed)
        except AssertionError as error:
            print(f"{op}: MISMATCH {error}", flush=True)
            failed = True
            continue
        total += ran
        print(f"{op:20} {ran:8} cases, worst {worst:6.2f} ulp, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{total} cases on {options.backend}, seed {options.seed}: {'MISMATCHES' if failed else '0 mismatches'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
