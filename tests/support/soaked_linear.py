"""The linear family in soak.py: heads of few columns around the tiles, with bias, softcap, scale and mask.

A 16-bit head's products are 16-bit numbers (torch has no other GEMM of them on a CPU), so the unit of error is the ulp
of the head's dtype: a logit's last place, and what a logprob, a probability and each product with it make of it. The
scales below are bounds of that, so one unit is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import rlhf_kernels as rk
from support import strategies
from support.linear_truth import Case, logits_and_slope
from support.soaked import Output, compared

# Log-ratios well inside, beyond either clip, beyond dual_clip=3 and beyond the clamp at 20: a logprob's rounding takes
# none across an edge, where gradients jump.
_NEAR, _FAR = (0.0, 0.5, -0.5, 1.7, -1.7), (0.0, 1.7, -1.7, 25.0, -25.0)


class LossCall(NamedTuple):
    head: strategies.HeadCall
    aggregate: str
    ratio: str
    kind: str  # of DPO
    estimator: str
    direction: str
    flags: tuple[bool, bool, bool]


_LOSS = st.builds(
    LossCall,
    strategies.head_calls(),
    st.sampled_from(["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]),
    st.sampled_from(["token", "token", "sequence"]),
    st.sampled_from(["sigmoid", "ipo"]),
    st.sampled_from(["k1", "k2", "k3", "abs"]),
    st.sampled_from(["reverse", "forward", "jsd"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)


class _Head:
    """A call's head on the device and in the dtype of a run, and how large its numbers get."""

    def __init__(self, call: strategies.HeadCall, cast: Callable) -> None:
        self.leaves = [
            cast(x).detach().requires_grad_() for x in (call.hidden, call.weight, call.bias) if x is not None
        ]
        self.device = self.leaves[0].device
        self.labels = call.labels.to(self.device)
        self.mask = None if call.mask is None else call.mask.to(self.device)
        temperature = call.scalars["temperature"]
        self.options = {
            **call.scalars,
            "temperature": cast(temperature) if isinstance(temperature, Tensor) else temperature,
            "bias": self.leaves[2] if call.bias is not None else None,
            "workspace": call.workspace,
        }
        self.call, self.ulp = call, torch.finfo(call.hidden.dtype).eps
        self.counted = torch.ones(call.labels.shape, dtype=torch.bool) if call.mask is None else call.mask
        hidden, weight = call.hidden[self.counted].double(), call.weight.double()
        self.largest_hidden = float(hidden.abs().max()) if hidden.numel() else 0.0
        self.largest_weight = float(weight.abs().max())
        coldest = float(torch.as_tensor(temperature).min())
        products = hidden.abs() @ weight.abs().T  # what a GEMM adds up
        if call.bias is not None:
            products = products + torch.where(call.bias.isfinite(), call.bias.double(), 0.0).abs()
        self.slope = call.scalars["logit_scale"] / coldest  # of a scaled logit by a product
        scaled = (float(products.max()) if products.numel() else 0.0) * self.slope
        # Of a logprob, in units of the head's ulp: its logits' last places, and the rounding of fp32's exponentials.
        self.logprob = 1 + 2 * scaled + 90 * 2.0**-23 / self.ulp

    def log_probabilities(self) -> Tensor:
        """Of the counted rows [N, V] in float64."""
        call, scalars = self.call, self.call.scalars
        temperature = scalars["temperature"]
        if isinstance(temperature, Tensor):
            temperature = temperature.double().expand(self.counted.shape)[self.counted].unsqueeze(-1)
        rows = Case(
            call.hidden[self.counted],
            call.weight,
            call.labels,
            call.bias,
            1.0,
            scalars["softcap"],
            scalars["logit_scale"],
        )
        return (logits_and_slope(rows)[0] / temperature).log_softmax(-1)

    def outputs(self, *values: Tensor, scale: float) -> list[Output]:
        return [Output(y, scale, self.call.mask if y.dim() else None, self.ulp) for y in values]

    def gradients(self, loss: Tensor, upstream: float, rows: float) -> list[Output]:
        """upstream: largest gradient of a row by its logits; rows: how many such rows one weight adds up."""
        grads = torch.autograd.grad(loss, self.leaves)
        by_product = 2 * upstream * self.slope * self.logprob
        scales = (
            by_product * self.largest_weight,
            rows * by_product * max(self.largest_hidden, 1.0),
            rows * by_product,
        )
        masks = (self.call.mask, None, None)
        return [Output(g, s, m, self.ulp) for g, s, m in zip(grads, scales, masks, strict=False)]

    @property
    def rows(self) -> float:
        return max(1.0, float(self.counted.sum())) ** 0.5


def _spread(head: _Head) -> float:
    """Bound of an entropy, and of a log p where its p matters."""
    return 1 + float(torch.tensor(float(head.call.weight.shape[0])).log())


def _linear_logprobs(call: strategies.HeadCall, cast: Callable) -> list[Output]:
    head = _Head(call, cast)
    logprobs, entropy = rk.linear_logprobs(
        *head.leaves[:2], head.labels, mask=head.mask, with_entropy=True, **head.options
    )
    spread = _spread(head)
    values = head.outputs(logprobs, scale=head.logprob) + head.outputs(entropy, scale=head.logprob * spread)
    return values + head.gradients(logprobs.sum() + entropy.sum(), 1 + 2 * spread, head.rows)


def _linear_logprobs_frozen(call: strategies.HeadCall, cast: Callable) -> list[Output]:
    """The head wants no gradient."""
    head = _Head(call, cast)
    for leaf in head.leaves[1:]:
        leaf.requires_grad_(False)
    logprobs = rk.linear_logprobs(*head.leaves[:2], head.labels, mask=head.mask, **head.options)
    head.leaves = head.leaves[:1]
    return head.outputs(logprobs, scale=head.logprob) + head.gradients(logprobs.sum(), 1.0, head.rows)


def _logprobs(call: strategies.HeadCall) -> Tensor:
    """float64, 0 where masked; what old and reference logprobs are made from."""
    head = _Head(call, lambda x: x.double())
    with rk.use_backend("reference"), torch.no_grad():
        return rk.linear_logprobs(*head.leaves[:2], head.labels, mask=head.mask, **head.options)


def _linear_policy_loss(call: LossCall, cast: Callable) -> list[Output]:
    head, (far, regularised, weighted) = _Head(call.head, cast), call.flags
    shape, generator = call.head.labels.shape, torch.Generator().manual_seed(call.head.seed + 1)
    exact = _logprobs(call.head)
    ratios = torch.tensor(_FAR if far else _NEAR)
    drawn = ratios[torch.randint(0, 5, shape, generator=generator)]
    if call.ratio == "sequence":  # the mean of several might lie at an edge
        drawn = drawn[:, :1].expand(shape)
    advantages = torch.randn(shape, generator=generator)
    importance = torch.rand(shape, generator=generator)
    old, ref = (exact - drawn).float(), (exact - torch.randn(shape, generator=generator)).float()
    options = {"dual_clip": 3.0 if weighted else None, "ratio": call.ratio, "aggregate": call.aggregate}
    if weighted:
        options["importance_weights"] = cast(importance)
    if regularised:
        options |= {"entropy_coef": 0.1, "kl_coef": 0.2, "kl_estimator": call.estimator, "ref_logprobs": cast(ref)}
    loss, stats = rk.linear_policy_loss(
        *head.leaves[:2], head.labels, cast(old), cast(advantages), head.mask, **options, **head.options
    )
    ratio = float(drawn[head.counted].clamp(-20, 20).exp().max()) if head.counted.any() else 1.0
    term = ratio * max(1.0, float(advantages.abs().max()))
    if regularised:
        term += 0.1 * 2 * _spread(head) + 0.2 * 30  # |d| < 4: k3's slope is below 60
    total = head.rows if call.aggregate == "token-sum" else 1.0
    values = head.outputs(loss, scale=head.logprob * term * total)
    values += [Output(x, head.logprob * max(ratio, 30.0, _spread(head)), None, head.ulp) for x in stats.values()]
    return values + head.gradients(loss, term, total)


def _linear_cross_entropy(call: LossCall, cast: Callable) -> list[Output]:
    head = _Head(call.head, cast)
    loss = rk.linear_cross_entropy(*head.leaves[:2], head.labels, head.mask, aggregate=call.aggregate, **head.options)
    total = head.rows if call.aggregate == "token-sum" else 1.0
    return head.outputs(loss, scale=head.logprob * total) + head.gradients(loss, 1.0, total)


def _linear_dpo_loss(call: LossCall, cast: Callable) -> list[Output]:
    """The rejected answers are the chosen ones' hidden states backwards in the batch, one token shorter."""
    temperature = call.head.scalars["temperature"]
    if isinstance(temperature, Tensor):
        call = call._replace(head=call.head._replace(scalars={**call.head.scalars, "temperature": 0.7}))
    head, (normalised, smoothed, _) = _Head(call.head, cast), call.flags
    pairs, length = head.labels.shape
    shorter = slice(0, max(1, length - 1))
    rejected, labels = head.leaves[0].detach().flip(0)[:, shorter], head.labels.flip(0)[:, shorter]
    mask = None if head.mask is None else head.mask.flip(0)[:, shorter]
    generator = torch.Generator().manual_seed(call.head.seed + 1)
    refs = [cast(torch.randn(pairs, generator=generator)) for _ in range(2)]
    beta, smoothing = 0.3, 0.2 if smoothed and call.kind == "sigmoid" else 0.0
    loss, *rewards = rk.linear_dpo_loss(
        head.leaves[0],
        rejected,
        head.leaves[1],
        head.labels,
        labels,
        *refs,
        head.mask,
        mask,
        beta=beta,
        label_smoothing=smoothing,
        kind=call.kind,
        length_normalised=normalised,
        **head.options,
    )
    tokens = 1.0 if normalised else float(length)
    error = tokens * head.logprob  # of an answer's logprob, in units
    largest = 2 * tokens * head.logprob + 4
    slope = 2 * (2 * largest + 0.5 / beta) if call.kind == "ipo" else beta
    values = [Output(loss, 2 * error * slope, None, head.ulp)]
    values += [Output(x, beta * error, None, head.ulp) for x in rewards]
    # The slope itself is off by what the answers' logprobs are off by.
    curvature = 2.0 if call.kind == "ipo" else beta * beta
    return values + head.gradients(loss, slope + 2 * curvature * tokens, tokens)


def _log_ratio(head: _Head, ref: _Head, direction: str) -> float:
    """Largest sum over a row's vocabulary of p |log(p / other) - KL|, what a KL and its gradient make of an error of p.

    The other is the reference, or for jsd the mixture; for jsd and forward the sum under the reference's p counts too.
    """
    log_p, log_q = (one.log_probabilities() for one in (head, ref))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    pairs = {
        "reverse": [(log_p, log_q)],
        "forward": [(log_q, log_p)],
        "jsd": [(log_p, log_m), (log_q, log_m)],
    }[direction]
    largest = 0.0
    for log_one, log_other in pairs:
        one = log_one.exp()
        ratio = torch.where(one > 0, log_one - log_other, 0.0)
        spread = (one * (ratio - (one * ratio).sum(-1, keepdim=True)).abs()).sum(-1)
        largest = max([largest, *spread.tolist()])
    return largest


def _linear_kl(call: LossCall, cast: Callable) -> list[Output]:
    head = _Head(call.head, cast)
    generator = torch.Generator().manual_seed(call.head.seed + 1)
    hidden, weight = call.head.hidden, call.head.weight
    dtype, width = hidden.dtype, weight.shape[1] // 2 + 1
    other = [torch.randn(*hidden.shape[:2], width, generator=generator).to(dtype)]
    other.append((3 * torch.randn(weight.shape[0], width, generator=generator) / width**0.5).to(dtype))
    bias = call.head.bias
    ref = _Head(call.head._replace(hidden=other[0], weight=other[1]), cast)
    kl = rk.linear_kl(
        *head.leaves[:2],
        *ref.leaves[:2],
        ref_bias=None if bias is None else cast(bias),
        direction=call.direction,
        mask=head.mask,
        **head.options,
    )
    # An error of a log p moves the KL by p times its distance from the mean log-ratio, one of a log q by |p - q|.
    largest = 1 + _log_ratio(head, ref, call.direction)
    head.logprob += ref.logprob
    upstream = 1.0 if call.direction == "forward" else largest  # p - q
    return head.outputs(kl, scale=head.logprob * largest) + head.gradients(kl.sum(), upstream, head.rows)


SOAKED = {
    name: compared(calls, run, limit=1.0)
    for name, calls, run in (
        ("linear_cross_entropy", _LOSS, _linear_cross_entropy),
        ("linear_dpo_loss", _LOSS, _linear_dpo_loss),
        ("linear_kl", _LOSS, _linear_kl),
        ("linear_logprobs", strategies.head_calls(), _linear_logprobs),
        ("linear_logprobs_frozen", strategies.head_calls(), _linear_logprobs_frozen),
        ("linear_policy_loss", _LOSS, _linear_policy_loss),
    )
}
