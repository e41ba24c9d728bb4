"""The independent judge of the reviews example: TF-IDF and logistic regression on sentences that nothing else has seen.

`rlhf eval` calls `positive`; `python configs/reviews/judge.py` prints the judge's own cross-validated accuracy.
REVIEWS_DATA names the folder that prepare.py wrote (default runs/reviews/data). Needs scikit-learn.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline


def _labelled() -> tuple[list[str], list[int]]:
    path = Path(os.environ.get("REVIEWS_DATA", "runs/reviews/data")) / "judge.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record["text"] for record in records], [record["positive"] for record in records]


def _pipeline() -> Pipeline:
    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))


@cache
def _fitted() -> Pipeline:
    return _pipeline().fit(*_labelled())


def positive(prompts: list[str], completions: list[str]) -> list[float]:
    """1.0 where the judge calls the whole sentence positive, else 0.0."""
    sentences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return _fitted().predict(sentences).astype(float).tolist()


if __name__ == "__main__":
    scores = cross_val_score(_pipeline(), *_labelled(), cv=5)
    print(f"judge: 5-fold accuracy {scores.mean():.3f} on {len(_labelled()[0])} sentences")
