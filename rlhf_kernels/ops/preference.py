"""The preference family: losses over pairs of a preferred and a rejected answer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rlhf_kernels import dispatch
from rlhf_kernels.ops import validate
from rlhf_kernels.reference import preference as reference


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    label: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Bradley-Terry loss of a reward model (Ouyang et al. 2022, arXiv:2203.02155; margin: arXiv:2307.09288).

    Equals `-logsigmoid(chosen - rejected - margin).mean()`; with `label=q`:
    `-q * logsigmoid(d) - (1 - q) * logsigmoid(-d)`.

    Args:
        chosen, rejected: [M] float, rewards of the two answers of each pair.
        margin: by how much the chosen reward shall win, in reward units; a number or [M].
        label: probability that `chosen` is truly the better one, in [0, 1]; a number or [M]. 0.5 is a tie.
        reduction: "mean" over the pairs (0 if there are none) or "none".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [M] for reduction="none". Gradient in the inputs' dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    op = "pairwise_loss"
    validate.float_tensor(op, "chosen", chosen)
    validate.like(op, "rejected", rejected, "chosen", chosen)
    validate.choice(op, "reduction", reduction, ("mean", "none"))
    validate.number_or_like(op, "margin", margin, "chosen", chosen)
    validate.number_or_like(op, "label", label, "chosen", chosen, low=0.0, high=1.0)
    dispatch.kernel(op, chosen)
    return reference.pairwise_loss(chosen, rejected, margin, label, reduction)
