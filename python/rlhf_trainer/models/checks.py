"""At the start of a stage, on a few rows of the user's data: the forward pass gives what training takes it to give.

A model is asked, not known by its name, so that an architecture that nobody tried stops with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.rows import TokenizedExample
from rlhf_trainer.models.modes import train_mode

AMONG = 64  # rows from the beginning of the data, of which two are taken


def rounding(model: nn.Module) -> float:
    """What two forward passes of other shapes may differ by, as a share of numbers of order 1.

    float32: layers amplify its 1e-7 to 1e-4 at most. In 16 or fewer bits logits of 20 are themselves known to 0.1.
    """
    device = next(model.parameters()).device.type
    short = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return 0.25 if short or torch.is_autocast_enabled(device) or getattr(model, "is_quantized", False) else 1e-3


def differ(model: nn.Module, first: Tensor, second: Tensor) -> bool:
    """Whether numbers of one meaning differ by more than rounding; where they are not finite others say so."""
    scale = second.abs().mean().clamp(min=1)
    return bool((first - second).abs().mean() > rounding(model) * scale)


@torch.no_grad()
def check_forward(
    model: PreTrainedModel,
    numbers: Callable[[Sequence[TokenizedExample]], Tensor],
    rows: Sequence[TokenizedExample],
) -> None:
    """UserError unless `numbers` [M] of rows do not depend on padding, and are the same bits each time.

    The model is left in the mode that it is trained in.
    """
    train_mode(model, lora_dropout=False)
    name, pair = type(model).__name__, two_lengths(rows)
    together, again = numbers(pair), numbers(pair)
    exact = together.device.type == "cpu"  # on a GPU sums in any order are no fault
    finite = bool(together.isfinite().all())
    if finite and (not torch.equal(together, again) if exact else differ(model, together, again)):
        raise UserError(
            f"{name}: two forward passes over the same rows differ by up to {_most(together, again):.3g}; something in "
            "the model is random even in evaluation mode, and losses that compare two passes would be noise: turn it "
            "off in the model's config.json"
        )
    alone = torch.cat([numbers([row]) for row in pair])
    if finite and differ(model, together, alone):
        raise UserError(
            f"{name}: beside a longer row a row gives other numbers than alone, by up to {_most(together, alone):.3g} "
            "nats or reward units; it ignores the attention mask, and cannot be trained in batches"
        )
    train_mode(model)


def two_lengths(rows: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """Two rows, the first one shorter where the data allows it, so that padding is seen; not the longest ones."""
    some = sorted(rows[:AMONG], key=lambda row: len(row.ids))
    first, second = some[0], some[len(some) // 2]
    if len(first.ids) == len(second.ids) and len(first.ids) > 2 and first.prompt_length != 1:
        first = replace(first, ids=first.ids[1:], prompt_length=max(first.prompt_length - 1, 0))
    return [first, second]


def _most(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()
