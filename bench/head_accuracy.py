"""Errors of logprobs and entropies of 16-bit heads against float64, in nats: a Markdown table.

Hidden states and weight are rounded to 16 bits first, so that what is left is the arithmetic's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import rlhf_kernels as rk

ROWS, WIDTH, VOCAB = 256, 1024, 32000


def contenders(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """logprobs and entropies [N] by name."""

    def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    def ours(logits_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        return rk.linear_logprobs(hidden, weight, labels, with_entropy=True, logits_dtype=logits_dtype)

    return {
        "rlhf_kernels, logits_dtype=torch.float32": lambda: ours(torch.float32),
        "rlhf_kernels, logits_dtype=None": lambda: ours(None),
        "plain torch, the head in its own dtype": lambda: plain(hidden @ weight.T),
        "plain torch, the head in float32": lambda: plain(hidden.float() @ weight.float().T),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| dtype | sd of the logits | | logprob: largest, mean | entropy: largest, mean |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        for spread in (1, 3, 10):
            generator = torch.Generator().manual_seed(spread)
            hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
            weight = (spread * torch.randn(VOCAB, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
            labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
            log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
            exact = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
            for name, call in contenders(hidden, weight, labels).items():
                errors = [(a.double() - b).abs() for a, b in zip(call(), exact, strict=True)]
                cells = [f"{error.max():.1e}, {error.mean():.1e}" for error in errors]
                print(f"| {str(dtype).removeprefix('torch.')} | {spread} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
