"""What a model makes of held-out pairs: accuracy, margin, calibration; its plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from rlhf_kernels import pairwise_loss
from rlhf_trainer.data.records import Pair
from rlhf_trainer.reports.intervals import renumbered, share_interval, units_of
from rlhf_trainer.reports.page import COLOURS, error_bars, html_table, show_number

BINS = 5  # of the calibration table


def calibration(probabilities: Tensor, right: Tensor, units: NDArray[np.int64]) -> tuple[list[dict[str, Any]], float]:
    """Bins of stated confidence in [0.5, 1] against the share that was right, and the expected calibration error.

    Below 0.5 is the same again: a pair turned round has 1 - p and the other preference. units: [M], the prompt of each.
    """
    bins, error = [], 0.0
    confidence = torch.maximum(probabilities, 1 - probabilities)
    index = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    for i in range(BINS):
        members = index == i
        count = int(members.sum())
        if count:
            stated, seen = confidence[members].mean().item(), right[members].mean().item()
            interval = accuracy_interval(right[members], units[members.numpy()])
            bins.append({"confidence": stated, "accuracy": seen, **interval, "pairs": count})
            error += abs(stated - seen) * count / len(right)
    return bins, error


def accuracy_interval(right: Tensor, units: NDArray[np.int64]) -> dict[str, Any]:
    """ "low" and "high" of the share of pairs that are right; pairs of one prompt are one unit."""
    found = share_interval(right.double().numpy(), renumbered(units))
    return {side: found[side] for side in ("low", "high")}


def losses_of(chosen: Tensor, rejected: Tensor, pairs: Sequence[Pair], margin: float = 0.0) -> Tensor:
    """[M] -q log sigmoid(d - m) - (1 - q) log sigmoid(-d - m) of each pair, d = chosen - rejected, raw rewards [M].

    Whichever answer is the better one shall win by m, the pair's margin and `margin`: a tie (q = 1/2) is at its minimum
    where both rewards are equal, and a pair turned round has the same loss.
    """
    labels = chosen.new_tensor([pair.label for pair in pairs])
    margins = chosen.new_tensor([pair.margin + margin for pair in pairs])
    return pairwise_loss(chosen, rejected, margin=margins, label=labels, reduction="none")


def pair_metrics(chosen: Tensor, rejected: Tensor, pairs: Sequence[Pair], margin: float = 0.0) -> dict[str, Any]:
    """Held-out figures from raw rewards [M]: loss, and over decided pairs accuracy, mean margin and calibration.

    Equal rewards count as half right. Pairs with label 0.5 (ties) count in the loss alone. The margin is the reward of
    the preferred answer over the other's; the probability that the calibration is about is its sigmoid. Without a
    decided pair there is the loss alone, and None for the others.
    """
    labels = torch.tensor([pair.label for pair in pairs])
    decided = labels != 0.5
    difference = (chosen - rejected)[decided]
    better = torch.where(labels[decided] > 0.5, difference, -difference)
    right = (better > 0).float() + 0.5 * (better == 0)
    found: dict[str, Any] = {
        "pairs": len(right),
        "loss": losses_of(chosen, rejected, pairs, margin).mean().item(),
    }
    if not len(right):
        names = ("accuracy", "accuracy_low", "accuracy_high", "prompts", "margin", "calibration_error")
        return found | dict.fromkeys(names) | {"calibration": []}
    accuracy = right.mean().item()
    units = units_of([pair.prompt or pair for pair in pairs if pair.label != 0.5])
    interval = accuracy_interval(right, units)
    bins, error = calibration(difference.sigmoid(), right, units)
    return found | {
        "accuracy": accuracy,
        "accuracy_low": interval["low"],
        "accuracy_high": interval["high"],
        "prompts": int(units.max()) + 1,
        "margin": better.mean().item(),
        "calibration_error": error,
        "calibration": bins,
    }


def heldout_metrics(figures: dict[str, Any], *names: str) -> dict[str, float]:
    """These figures of `pair_metrics` as metrics of a step, without those that there are none of."""
    return {f"heldout/{name}": figures[name] for name in names if figures[name] is not None}


def length_baseline(training: Sequence[Pair], heldout: Sequence[Pair]) -> float | None:
    """Held-out accuracy of preferring the longer answer, or the shorter, whichever wins in training.

    None where no held-out pair is decided.
    """
    if all(pair.label == 0.5 for pair in heldout):
        return None

    def longer_wins(pairs: Sequence[Pair]) -> float:
        signs = [(len(p.chosen) - len(p.rejected)) * (1 if p.label > 0.5 else -1) for p in pairs if p.label != 0.5]
        return sum((sign > 0) + 0.5 * (sign == 0) for sign in signs) / max(len(signs), 1)

    return longer_wins(heldout) if longer_wins(training) >= 0.5 else 1 - longer_wins(heldout)


def summary(figures: dict[str, Any]) -> str:
    if not figures["pairs"]:
        return f"held-out loss {figures['loss']:.3f}; every held-out pair is a tie, so that there is no accuracy"
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return (
        f"held-out pair accuracy {figures['accuracy']:.3f}{interval} on {figures['pairs']} pairs of "
        f"{figures['prompts']} prompts; "
        f"by length {figures['length_baseline']:.3f}, chance 0.500; mean margin {figures['margin']:.3f}; "
        f"calibration error {figures['calibration_error']:.3f}"
    )


def heldout_table(figures: dict[str, Any]) -> str:
    """The figures of `pair_metrics` with their length baseline as an HTML table."""
    names = ("pairs", "prompts", "loss", "accuracy", "accuracy_low", "accuracy_high", "margin", "length_baseline")
    rows = [[name.replace("_", " "), show_number(figures[name])] for name in (*names, "calibration_error")]
    return html_table(["", "value"], rows)


def calibration_figure(figures: dict[str, Any]) -> Figure:
    """Observed preference with its 95 % interval against the stated probability, and the pairs behind each point."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    bins = figures["calibration"]
    stated = [one["confidence"] for one in bins]
    seen = [one["accuracy"] for one in bins]
    axes.plot([0.5, 1], [0.5, 1], color=COLOURS[0], linestyle="--", linewidth=1, label="perfectly calibrated")
    axes.errorbar(
        stated, seen, yerr=error_bars(bins, "accuracy"), color=COLOURS[1], marker="o", capsize=3, label="held-out pairs"
    )
    axes.set(ylabel="share of them preferred by the labellers", xlim=(0.48, 1.02), ylim=(0, 1.02))
    axes.set_title(f"expected calibration error {show_number(figures['calibration_error'])}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    counts.bar(stated, [one["pairs"] for one in bins], width=0.03, color=COLOURS[1])
    counts.set(xlabel="probability that the model gives to the answer it prefers", ylabel="pairs")
    for each in (axes, counts):
        each.spines[["top", "right"]].set_visible(False)
    return figure
