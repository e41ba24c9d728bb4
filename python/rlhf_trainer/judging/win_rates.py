"""Which of two answers is the better one: by reward, or by a judge."""

from __future__ import annotations

import numpy as np

from rlhf_trainer.judging.judges import Judge, both_orders
from rlhf_trainer.reports.estimates import Values


def wins(after: Values, before: Values) -> Values:
    """[N]: 1 where `after` scores higher than `before`, 0.5 where they are equal, else 0."""
    return np.asarray((after > before) + 0.5 * (after == before), dtype=np.float64)


def preferred_by_judge(judge: Judge, prompts: list[str], after: list[str], before: list[str]) -> Values:
    """[N] probability that `after` is the better answer: asked in both orders, because judges favour a position."""
    shown_first, shown_second = both_orders(judge, prompts, after, before)
    return ((shown_first + shown_second) / 2).double().numpy()
