"""Reward-hacking watch: signs that the score rises for the wrong reason, each warning naming its metric."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rlhf_trainer.reports.estimates import distinct
from rlhf_trainer.sampling.rollout import Rollout
from rlhf_trainer.training.alerts import Alert

COOLDOWN_UPDATES = 10  # updates for which a metric that has warned stays silent


def repetition(texts: list[str]) -> float:
    """Mean over texts of the share of words that repeat the word before."""
    shares = []
    for text in texts:
        words = text.split()
        shares.append(sum(a == b for a, b in pairwise(words)) / max(len(words) - 1, 1))
    return sum(shares) / max(len(shares), 1)


class RewardHackingMonitor:
    """Compares every update with the first one.

    kl_budget: nats per response, or None. past: metrics of the updates before a resumed run, which warned then.
    """

    def __init__(self, kl_budget: float | None = None, past: Sequence[dict[str, float]] = ()) -> None:
        self.kl_budget = kl_budget
        self.quiet_until: dict[str, int] = {}
        for done in range(1, len(past) + 1):
            self._warnings(past[:done])

    def check(self, history: Sequence[dict[str, float]], rollout: Rollout) -> list[Alert]:
        """Add `watch/distinct_2` and `watch/repetition` to the newest metrics; return what to warn of."""
        now = history[-1]
        now["watch/distinct_2"] = distinct(rollout.completions, 2)[0]
        now["watch/repetition"] = repetition(rollout.completions)
        return self._warnings(history)

    def _warnings(self, history: Sequence[dict[str, float]]) -> list[Alert]:
        now = history[-1]
        signs = self._signs(now, history[0], history).items()
        return [Alert(name, now[name], reason) for name, reason in signs if self._speaks(name, history)]

    def _speaks(self, name: str, history: Sequence[dict[str, float]]) -> bool:
        if len(history) < self.quiet_until.get(name, 0):
            return False
        self.quiet_until[name] = len(history) + COOLDOWN_UPDATES
        return True

    def _signs(
        self, now: dict[str, float], first: dict[str, float], history: Sequence[dict[str, float]]
    ) -> dict[str, str]:
        signs = {}
        if self.kl_budget is not None and now["objective/kl"] > 0.8 * self.kl_budget:
            signs["objective/kl"] = f"{now['objective/kl']:.2f} nats, close to the budget of {self.kl_budget}"
        length, was = now["val/response_length"], first["val/response_length"]
        if not 0.5 <= length / max(was, 1e-9) <= 2:
            signs["val/response_length"] = f"{length:.1f} tokens, {was:.1f} at the start"
        if now["watch/distinct_2"] < 0.5 * first.get("watch/distinct_2", 0.0):
            signs["watch/distinct_2"] = f"{now['watch/distinct_2']:.2f}, {first['watch/distinct_2']:.2f} at the start"
        if now["watch/repetition"] > first.get("watch/repetition", 1.0) + 0.2:
            signs["watch/repetition"] = f"{now['watch/repetition']:.2f} of the words repeat the one before"
        if now["val/missing_eos"] > first["val/missing_eos"] + 0.3:
            signs["val/missing_eos"] = f"{now['val/missing_eos']:.0%} of the responses never end"
        window = 10
        if "objective/gold_scores" in now and len(history) >= 2 * window:
            earlier, late = history[-2 * window : -window], history[-window:]
            gold = _mean(late, "objective/gold_scores") - _mean(earlier, "objective/gold_scores")
            score = _mean(late, "objective/scores") - _mean(earlier, "objective/scores")
            if score > 0 > gold:
                signs["objective/gold_scores"] = (
                    f"fell by {-gold:.3f} over {window} updates while the score rose {score:.3f}"
                )
        return signs


def _mean(history: Sequence[dict[str, float]], name: str) -> float:
    return sum(metrics[name] for metrics in history) / len(history)
