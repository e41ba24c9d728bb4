"""What the tiny world measures, and a judge that needs no model."""

from __future__ import annotations


def kind(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("fool" not in completion) for completion in completions]


def thankful(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("thanks" in completion) for completion in completions]


def by_rule(prompts: list[str], answers: list[str], others: list[str], questions: list[str]) -> list[float]:
    """Probability that each answer is better than the other by the question's rule; 0.5 where both are alike."""
    found = []
    for prompt, answer, other, question in zip(prompts, answers, others, questions, strict=True):
        measure = kind if "kinder" in question else thankful
        (first,), (second,) = measure([prompt], [answer]), measure([prompt], [other])
        found.append(0.5 + 0.45 * (first - second))
    return found
