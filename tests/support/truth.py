"""What the ops shall return, in float64 and written independently of rlhf_kernels, and how close is close enough.

rlhf_kernels.reference is used for one thing: the error that plain PyTorch makes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.reference import scan as reference_scan

NEG_INF = float("-inf")


def assert_accurate(actual: Tensor, truth: Tensor, plain_error: float, *, truncates: bool = False) -> None:
    """The one tolerance: twice the error of the best plain PyTorch formulation, plus 2 ulp of the result's dtype.

    plain_error: largest error of that formulation on such inputs. Non-finite truth must be met exactly.
    truncates: the Triton interpreter's bf16 stores may be one ulp off.
    """
    assert actual.shape == truth.shape
    assert math.isfinite(plain_error)
    result, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    finite = truth.isfinite()
    torch.testing.assert_close(result[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    bound = 2 * plain_error + (2 + truncates) * ulp(truth[finite], actual.dtype)
    error = (result[finite] - truth[finite]).abs()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), (
        f"error {error[worst]:.3e} over the bound {bound[worst]:.3e} at truth {truth[finite][worst]:.6g}; "
        f"the best plain formulation's error is {plain_error:.3e}"
    )


def max_error(plain: Tensor, truth: Tensor) -> float:
    """Largest error where truth is finite; infinite if the formulation gives NaN there."""
    error = (plain.detach().double() - truth.detach().double())[truth.isfinite()].abs()
    return error.nan_to_num(nan=math.inf).max().item() if error.numel() else 0.0


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next number of `dtype` at |x|, float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps), exponent - 1)


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V], temperature [N] -> d and log_s, log p = d - log_s, and the divisor; float64.

    NaN in rows that are no distribution.
    """
    x = logits.detach().double().cpu()
    spoilt = x.isnan().any(-1) | (x == math.inf).any(-1) | (x == NEG_INF).all(-1)
    x = x.masked_fill(spoilt.unsqueeze(-1), math.nan)
    divisor = torch.as_tensor(temperature, dtype=torch.float64).cpu().expand(x.shape[:-1]).unsqueeze(-1)
    top, place = x.max(-1, keepdim=True)
    d = (x - top) / divisor
    # log1p over all but the largest: beside 1, float64 too would lose a rest of 1e-17.
    return d, d.exp().scatter(-1, place, 0.0).sum(-1, keepdim=True).log1p(), divisor


def selected_logprobs(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, grad_logprobs: Tensor, grad_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V], the rest [N] -> logprobs, entropy [N], and their gradient [N, V] for the given upstream ones."""
    d, log_s, divisor = _log_softmax(logits, temperature)
    log_p = d - log_s
    p = log_p.exp()
    logprobs = log_p.gather(-1, labels.cpu().long().unsqueeze(-1)).squeeze(-1)
    surprise = torch.where(p == 0, 0.0, p * log_p)
    entropy = -surprise.sum(-1)
    onehot = torch.zeros_like(p).scatter(-1, labels.cpu().long().unsqueeze(-1), 1.0)
    g, g_entropy = (grad.detach().double().cpu().unsqueeze(-1) for grad in (grad_logprobs, grad_entropy))
    grad = g * (onehot - p) - g_entropy * (surprise + p * entropy.unsqueeze(-1))
    return logprobs, entropy, grad / divisor


def _by_log_softmax(z: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    log_p = z.log_softmax(-1)
    surprise = log_p.exp() * log_p.masked_fill(log_p == NEG_INF, 0.0)
    return log_p.gather(-1, chosen).squeeze(-1), -surprise.sum(-1)


def _by_logsumexp(z: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    lse = z.logsumexp(-1)
    return z.gather(-1, chosen).squeeze(-1) - lse, lse - (z.softmax(-1) * z).sum(-1)


def plain_logprobs_errors(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, grad_logprobs: Tensor, grad_entropy: Tensor
) -> list[float]:
    """Errors of logprobs, entropy and gradient as people write them: fp32 on upcast logits, differentiated by autograd.

    Each formulation's largest error over the logits and slightly scaled ones, because one draw of rounding errors in a
    few rows may be lucky; then the better formulation's.
    """
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    upstream = grad_logprobs, grad_entropy
    errors = torch.zeros(2, 3, dtype=torch.float64)
    # The fewer the elements, the more draws: the largest of a handful of rounding errors says little.
    draws = 24 if logits.numel() < 2_000 else 5 if logits.numel() < 100_000 else 1
    for step in range(draws):
        x = (logits.detach() * (1 - step / 64)).to(logits.dtype)
        exact = selected_logprobs(x, labels, temperature, *upstream)
        for i, formulation in enumerate((_by_log_softmax, _by_logsumexp)):
            leaf = x.clone().requires_grad_()
            outputs = formulation(leaf.float() / divisor, labels.long().unsqueeze(-1))
            (grad,) = torch.autograd.grad(outputs, leaf, upstream)
            found = [max_error(*pair) for pair in zip((*outputs, grad), exact, strict=True)]
            errors[i] = torch.maximum(errors[i], torch.tensor(found, dtype=torch.float64))
    return errors.amin(0).tolist()


def full_kl(
    logits: Tensor, ref_logits: Tensor, temperature: float | Tensor, direction: str, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """logits, ref_logits [N, V], the rest [N] -> divergence [N] and its gradient [N, V] for the given upstream one.

    An infinite reverse KL has no gradient: NaN.
    """
    (d, log_s, divisor), (d_ref, log_s_ref, _) = (_log_softmax(x, temperature) for x in (logits, ref_logits))
    spoilt = (log_s + log_s_ref).isnan().squeeze(-1)
    log_p, log_q = d - log_s, d_ref - log_s_ref
    p, q = log_p.exp(), log_q.exp()
    if direction == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        half = (d - d_ref - (log_s - log_s_ref)) / 2  # log(p / m) = h - log cosh h, whose series keeps what is tiny
        log_cosh = half**2 / 2 - half**4 / 12
        close = half.abs() < 1e-4
        log_p_m = torch.where(p == 0, 0.0, torch.where(close, half - log_cosh, log_p - log_m))
        log_q_m = torch.where(q == 0, 0.0, torch.where(close, -half - log_cosh, log_q - log_m))
        of_p = (p * log_p_m).sum(-1, keepdim=True)
        kl = 0.5 * (of_p.squeeze(-1) + (q * log_q_m).sum(-1))
        by_logits = 0.5 * p * (log_p_m - of_p)
    else:
        # d's apart from log_s's: logits of 1e-40 would be lost beside them.
        sign, first = (1, p) if direction == "reverse" else (-1, q)
        impossible = (d if direction == "reverse" else d_ref) == NEG_INF
        log_ratio = torch.where(impossible, 0.0, sign * (d - d_ref - (log_s - log_s_ref)))
        # Infinite also where float64 rounds the first one's chance to 0.
        terms = torch.where(log_ratio == math.inf, math.inf, first * log_ratio)
        kl = terms.sum(-1)
        by_logits = p - q
        if direction == "reverse":
            by_logits = p * (log_ratio - kl.unsqueeze(-1))
            by_logits = torch.where(kl.isinf().unsqueeze(-1), math.nan, by_logits)
    by_logits = torch.where(spoilt.unsqueeze(-1), math.nan, by_logits)
    return torch.where(spoilt, math.nan, kl), grad.detach().double().cpu().unsqueeze(-1) * by_logits / divisor


def _plain_kl(log_p: Tensor, log_q: Tensor, direction: str) -> Tensor:
    if direction == "forward":
        return _plain_kl(log_q, log_p, "reverse")
    p, q = log_p.exp(), log_q.exp()
    if direction == "reverse":
        return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)
    log_p, log_q = log_p.clamp(min=-1e4), log_q.clamp(min=-1e4)  # -inf on both sides would have the gradient NaN
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1)


def plain_kl_errors(
    logits: Tensor, ref_logits: Tensor, temperature: float | Tensor, direction: str, grad: Tensor
) -> list[float]:
    """Errors of the divergence and of its gradient, as plain_logprobs_errors finds them."""
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    errors = torch.zeros(2, 2, dtype=torch.float64)
    draws = 24 if logits.numel() < 2_000 else 5 if logits.numel() < 100_000 else 1
    for step in range(draws):
        x, y = ((row.detach() * (1 - step / 64)).to(row.dtype) for row in (logits, ref_logits))
        exact = full_kl(x, y, temperature, direction, grad)
        for i, normalise in enumerate((lambda z: z.log_softmax(-1), lambda z: z - z.logsumexp(-1, keepdim=True))):
            leaf = x.clone().requires_grad_()
            kl = _plain_kl(normalise(leaf.float() / divisor), normalise(y.float() / divisor), direction)
            (by_logits,) = torch.autograd.grad(kl, leaf, grad)
            found = [max_error(*pair) for pair in zip((kl, by_logits), exact, strict=True)]
            errors[i] = torch.maximum(errors[i], torch.tensor(found, dtype=torch.float64))
    return errors.amin(0).tolist()


def _gae_row(rewards: list[float], values: list[float], end: float, gamma: float, lam: float) -> list[float]:
    """Advantages of one uninterrupted sequence, by the sum that defines them (arXiv:1506.02438, equation 16)."""
    following = [*values, end][1:]
    deltas = [r + gamma * v_next - v for r, v_next, v in zip(rewards, following, values, strict=True)]
    return [math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    masked: str,
) -> tuple[Tensor, Tensor]:
    """[B, T] float64 by what each semantics means: compact the row, cut it at its holes, or fill the holes with 0."""
    rewards, values = rewards.double().cpu(), values.double().cpu()
    batch, time = rewards.shape
    counted = torch.ones(batch, time, dtype=torch.bool) if mask is None else mask.bool().cpu()
    advantages = torch.zeros(batch, time, dtype=torch.float64)
    for b in range(batch):
        end = 0.0 if bootstrap is None else float(bootstrap[b])
        for places, tail in _pieces(counted[b].tolist(), end, masked):
            kept = [bool(counted[b, t]) for t in places]
            r = [float(rewards[b, t]) if keep else 0.0 for t, keep in zip(places, kept, strict=True)]
            v = [float(values[b, t]) if keep else 0.0 for t, keep in zip(places, kept, strict=True)]
            for t, keep, advantage in zip(places, kept, _gae_row(r, v, tail, gamma, lam), strict=True):
                advantages[b, t] = advantage if keep else 0.0
    returns = torch.where(counted, advantages + values, 0.0)
    return advantages, returns


def gae_loop_error(rewards: Tensor, values: Tensor, mask: Tensor | None, *rest: Any) -> list[float]:
    """Largest error of the plain recurrence in fp32 for advantages and returns, over several draws of a small call.

    rest: bootstrap, gamma, lam, masked, as in `gae`.
    """
    errors = [0.0, 0.0]
    for step in range(24 if rewards.numel() < 40 else 8 if rewards.numel() < 500 else 2):
        r, v = ((x.float() * (1 - step / 64)).to(x.dtype).float() for x in (rewards, values))
        pairs = zip(reference_scan.gae(r, v, mask, *rest), gae(r, v, mask, *rest), strict=True)
        errors = [max(e, max_error(*pair)) for e, pair in zip(errors, pairs, strict=True)]
    return errors


def _pieces(counted: list[bool], end: float, masked: str) -> list[tuple[list[int], float]]:
    """The uninterrupted sequences of a row: their positions, and the value after each."""
    everything = range(len(counted))
    if masked == "zero":
        return [(list(everything), end)]
    if masked == "skip":
        return [([t for t in everything if counted[t]], end)]
    pieces: list[tuple[list[int], float]] = []
    for t in everything:
        if counted[t]:
            if t == 0 or not counted[t - 1]:
                pieces.append(([], 0.0))
            pieces[-1][0].append(t)
    if counted and counted[-1]:
        pieces[-1] = (pieces[-1][0], end)
    return pieces


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def dpo(
    pairs: list[tuple[float, float, float, float]], beta: float, label_smoothing: float, kind: str
) -> tuple[float, list[float]]:
    """(policy_chosen, policy_rejected, ref_chosen, ref_rejected) a pair -> mean loss, its slope in policy_chosen."""
    losses, slopes = [], []
    for policy_chosen, policy_rejected, ref_chosen, ref_rejected in pairs:
        h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
        if kind == "ipo":
            losses.append((h - 0.5 / beta) ** 2)
            slopes.append(2 * (h - 0.5 / beta) / len(pairs))
            continue
        u = beta * h
        losses.append((1 - label_smoothing) * _softplus(-u) + label_smoothing * _softplus(u))
        sigmoid = 1 / (1 + math.exp(-u)) if u > 0 else math.exp(u) / (1 + math.exp(u))
        slopes.append(beta * (sigmoid - (1 - label_smoothing)) / len(pairs))
    return math.fsum(losses) / len(pairs), slopes


def group_advantages(scores: Tensor, groups: Tensor, kind: str, eps: float) -> Tensor:
    """[B] float64, one answer at a time from exact sums over its group."""
    values, ids = scores.double().tolist(), groups.tolist()
    advantages = []
    for i, score in enumerate(values):
        others = [values[j] for j in range(len(values)) if ids[j] == ids[i] and j != i]
        if not others:
            advantages.append(0.0)
            continue
        mean = math.fsum([score, *others]) / (len(others) + 1)
        if kind == "rloo":
            advantages.append(score - math.fsum(others) / len(others))
        elif kind == "mean":
            advantages.append(score - mean)
        else:
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in [score, *others]) / len(others))
            advantages.append((score - mean) / (deviation + eps))
    return torch.tensor(advantages, dtype=torch.float64)


def sampling_distribution(
    logits: Tensor, temperature: Tensor, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """logits [N, V], temperature [N] float64 -> probabilities after the filters [N, V] float64, rows without any [N].

    One row and one token at a time, from the largest logit down: a set of tied logits is kept or dropped as one.
    """
    x = logits.double().cpu()
    spoilt = x.isnan().any(-1) | (x == math.inf).any(-1) | (x == NEG_INF).all(-1)
    top = x.amax(-1, keepdim=True)
    weights = ((x - top) / temperature.unsqueeze(-1)).exp()
    # The kernels weigh in fp32 and drop what is below its range.
    weights = torch.where(weights < 1e-38, 0.0, weights).masked_fill(spoilt.unsqueeze(-1), 0.0)
    for row in (~spoilt).nonzero().flatten().tolist():
        if top_k is None and top_p is None:
            break
        values, order = x[row].sort(descending=True)
        if top_k is not None:
            weights[row][x[row] < values[min(top_k, len(values)) - 1]] = 0.0
        if top_p is not None and top_p < 1:
            reached = weights[row][order].cumsum(0) >= top_p * weights[row].sum()
            last = int(reached.nonzero()[0]) if reached.any() else len(values) - 1
            weights[row][x[row] < values[last]] = 0.0
    return weights / weights.sum(-1, keepdim=True), spoilt


def ppo_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    whitened: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T], scores [B] -> advantages, returns, kl in float64, token by token."""
    kl = torch.zeros(mask.shape, dtype=torch.float64)
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask.tolist()):
        counted = [t for t, keep in enumerate(row) if keep]
        for t in counted:
            kl[b, t] = float(logprobs[b, t]) - float(ref_logprobs[b, t])
            rewards[b, t] = -kl_coef * kl[b, t]
        if counted:
            rewards[b, counted[-1]] += float(scores[b])
    advantages, returns = gae(rewards, values, mask, None, gamma, lam, "skip")
    kept = advantages[mask.cpu()]
    if whitened and kept.numel():
        deviation = math.sqrt(kept.var(unbiased=False).item() + 1e-8)
        advantages = torch.where(mask.cpu(), (advantages - kept.mean()) / deviation, 0.0)
    return advantages, returns, kl
