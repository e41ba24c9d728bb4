"""sample_tokens beside what frameworks write: softmax, multinomial, gather; and a sort for top-p."""

from __future__ import annotations

import torch
from harness import Comparison, Contender, compare
from torch import Tensor

import rlhf_kernels as rk

OURS = "rlhf_kernels"
SAMPLED = (64, 128256)  # rows, vocabulary


def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    tokens = torch.multinomial(log_p.exp(), 1)
    return tokens[:, 0], log_p.gather(-1, tokens)[:, 0]


def by_sort(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """transformers' TopPLogitsWarper, then the same."""
    ordered, indices = torch.sort(logits, descending=False)
    drop = ordered.float().softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1:] = False
    return plain(logits.masked_fill(drop.scatter(1, indices, drop), float("-inf")))


def sampling(dtype: torch.dtype, rounds: int, quiet: float) -> Comparison:
    logits = (3 * torch.randn(SAMPLED, generator=torch.Generator().manual_seed(0))).to(dtype)
    contenders = {
        "softmax + multinomial + gather": lambda: plain(logits),
        "sort for top_p=0.9, then the same": lambda: by_sort(logits, 0.9),
        "one read: x.sum()": logits.sum,
        OURS: lambda: rk.sample_tokens(logits),
        f"{OURS}, top_k=50": lambda: rk.sample_tokens(logits, top_k=50),
        f"{OURS}, top_p=0.9": lambda: rk.sample_tokens(logits, top_p=0.9),
    }
    with torch.no_grad():
        result = compare({name: Contender(call) for name, call in contenders.items()}, rounds, quiet=quiet)
    result.ratios = {
        "faster than softmax + multinomial + gather": result.median("softmax + multinomial + gather")
        / result.median(OURS),
        "of the time of one read": result.median(OURS) / result.median("one read: x.sum()"),
        "top_p, faster than by sort": result.median("sort for top_p=0.9, then the same")
        / result.median(f"{OURS}, top_p=0.9"),
    }
    return result
