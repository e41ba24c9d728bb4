"""sample_tokens in soak.py: each token is where its u falls in the exact distribution, with its logprob there."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.reference.sampling import uniforms
from support import strategies, truth
from support.soaked import LIMIT, ULP, Soaked

# What fp32 exponentials and their sums may be off by, relative to the total, where a token's cell ends.
ROUNDING = 4e-6


def _check(call: strategies.SamplingCall, backend: str, device: str) -> float:
    (logits, _, mask, temperature, _), top_k, top_p, seed, repeat = call
    if backend == "triton" and device == "cpu" and logits.dtype == torch.bfloat16:
        # The interpreter reads bfloat16 denormals as 0.
        logits = torch.where(logits.abs() < torch.finfo(torch.bfloat16).tiny, 0.0, logits)
    x, t, m = (y.to(device) if isinstance(y, Tensor) else y for y in (logits, temperature, mask))
    options = {"top_k": top_k, "top_p": top_p, "seed": seed}
    with rk.use_backend(backend):
        drawn = [y.cpu() for y in rk.sample_tokens(x, temperature=t, mask=m, **options)]
        if repeat:  # the first rows alone
            again = rk.sample_tokens(x[:repeat], temperature=t, mask=None if m is None else m[:repeat], **options)
            for one, other in zip(drawn, again, strict=True):
                same = torch.equal(one[:repeat].nan_to_num(7.0), other.cpu().nan_to_num(7.0))
                assert same, f"the first {repeat} again: other tokens or logprobs"
    shape = logits.shape[:-1]
    wanted = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    assert all((y[~wanted] == 0).all() for y in drawn), "not 0 at a masked place"
    u = uniforms(seed, shape.numel(), torch.device("cpu")).view(shape)[wanted]
    divisor = torch.as_tensor(temperature, dtype=torch.float64).expand(shape)[wanted]
    return _compare(*(y[wanted] for y in drawn), u, logits[wanted], divisor, top_k, top_p)


def _compare(
    tokens: Tensor, logprobs: Tensor, u: Tensor, x: Tensor, divisor: Tensor, top_k: int | None, top_p: float | None
) -> float:
    """Worst error of the logprobs; tokens, logprobs, u, divisor [N], x [N, V]."""
    errors = torch.full(u.shape, float("inf"), dtype=torch.float64)
    # Where a set of tokens reaches top_p to within rounding, it or the next larger one is the nucleus.
    for slack in (0.0,) if top_p is None else (0.0, -ROUNDING, ROUNDING):
        nucleus = None if top_p is None else min(top_p * (1 + slack), 1.0)
        probability, spoilt = truth.sampling_distribution(x, divisor, top_k, nucleus)
        place = tokens.unsqueeze(-1)
        width, upto = (y.gather(-1, place).squeeze(-1) for y in (probability, probability.cumsum(-1)))
        inside = (width > 0) & (u >= upto - width - ROUNDING) & (u <= upto + ROUNDING)
        exact = width.log()
        # exp((x - m) / T) carries the rounding of its exponent, which matters down to exp(-88).
        error = (logprobs.double() - exact).abs() / (ULP * exact.abs().clamp(min=90.0))
        error = torch.where(inside & logprobs.isfinite(), error, float("inf"))
        error = torch.where(spoilt, torch.where(logprobs.isnan() & (tokens == 0), 0.0, float("inf")), error)
        errors = torch.minimum(errors, error)
        if (errors <= LIMIT).all():
            break
    worst = float(errors.max()) if errors.numel() else 0.0
    assert worst <= LIMIT, f"token or logprob: {worst:.3g} ulp; drawn {tokens.tolist()}, {logprobs.tolist()}"
    return worst


SOAKED = {"sample_tokens": Soaked(strategies.sampling_calls(), _check)}
