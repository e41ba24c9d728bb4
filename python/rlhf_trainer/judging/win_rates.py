"""Which of two answers is the better one: by reward, or by a judge."""

from __future__ import annotations

import numpy as np

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.judging.judges import Judge, both_orders
from rlhf_trainer.reports.intervals import Values

MOST_SILENT = 0.2  # share of comparisons without a verdict


def wins(after: Values, before: Values) -> Values:
    """[N]: 1 where `after` scores higher than `before`, 0.5 where they are equal, else 0."""
    return np.asarray((after > before) + 0.5 * (after == before), dtype=np.float64)


def preferred_by_judge(judge: Judge, prompts: list[str], after: list[str], before: list[str]) -> Values:
    """[N] probability that `after` is the better answer: asked in both orders, because judges favour a position.

    NaN where it gave no verdict.

    Raises:
        UserError: it gave none for more than MOST_SILENT of them, so that the others are no sample of all.
    """
    shown_first, shown_second = both_orders(judge, prompts, after, before)
    found = ((shown_first + shown_second) / 2).double().numpy()
    silent = int(np.isnan(found).sum())
    if silent > MOST_SILENT * len(found):
        reasons = {name: int(sum(values)) for name, values in getattr(judge, "notes", {}).items() if name != "mass"}
        said = ", ".join(f"{name} {count}" for name, count in reasons.items() if count)
        raise UserError(
            f"the judge gave no verdict in {silent} of {len(found)} comparisons"
            + (f" ({said}, of two orders each)" if said else "")
            + "; a judge with a longer context, or one that says A or B, is needed"
        )
    return found
