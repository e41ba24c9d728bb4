"""Completions to rank, and the rankings given so far: one line of the rankings file per answer, on disk at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import read_jsonl
from rlhf_trainer.data.rankings import FAIL, Rank, completions_of, ranked_of
from rlhf_trainer.data.records import text_field

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second server from the file there
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RankingItem:
    prompt: str
    completions: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The completions without repetitions: nobody ranks the same text twice."""
        return tuple(dict.fromkeys(self.completions))

    def order(self, labeller: str) -> list[str]:
        """The texts in this labeller's order, so that favouring the first on the page cancels out."""
        seed = hashlib.sha256(json.dumps([labeller, self.prompt, self.completions]).encode()).hexdigest()
        return random.Random(seed).sample(self.texts, len(self.texts))


def read_tasks(path: str | Path) -> list[RankingItem]:
    """Every line's prompt and completions, once each; UserError `file:line: reason`, also for an empty completion."""
    tasks: dict[RankingItem, None] = {}
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        task = RankingItem(text_field(record, "prompt", where), completions_of(record, where))
        if len(task.texts) > 1:  # the same text N times leaves nothing to rank
            tasks[task] = None
    if not tasks:
        raise UserError(f"{path}: no prompt with at least two different completions in it")
    return list(tasks)


class Store:
    """The items and all their rankings. One process at a time writes a rankings file; its threads share it."""

    def __init__(self, tasks: Sequence[RankingItem], path: str | Path, per_prompt: int = 0) -> None:
        self.tasks, self.path, self.per_prompt = list(tasks), Path(path), per_prompt
        self.number = {task: index for index, task in enumerate(self.tasks)}
        self.answers: dict[tuple[int, str], dict[str, Any]] = {}  # (task number, labeller) -> a ranking as written
        self.others: list[dict[str, Any]] = []  # lines about other completions, kept as they are
        self.mutex = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = self._lock()
        self._load()

    def _lock(self) -> IO[str]:
        lock = open(self.path.with_name(f".{self.path.name}.lock"), "w")  # noqa: SIM115  # held while the store lives
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise UserError(f"{self.path}: another `rlhf label` writes to it") from None
        return lock

    def close(self) -> None:
        self.lock.close()

    def _load(self) -> None:
        if not self.path.exists():
            return
        whole = self.path.read_bytes()
        if whole and not whole.endswith(b"\n"):  # an answer whose writing was cut short, never confirmed to anyone
            with open(self.path, "r+b") as file:
                file.truncate(whole.rfind(b"\n") + 1)
        for number, record in read_jsonl(self.path):
            ranked = ranked_of(record, f"{self.path}:{number}")
            task = self.number.get(RankingItem(ranked.prompt, ranked.completions))
            if task is None or ranked.scored:
                self.others.append(record)
                continue
            for ranking in record["rankings"]:
                self.answers[task, ranking["labeller"]] = ranking

    def save(self, task: int, labeller: str, ranks: dict[str, Rank]) -> None:
        """Keep a labeller's ranks by completion text; on return they are on disk. A second answer replaces the first.

        Raises OSError if they cannot be written; the file is then as it was.
        """
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        ranking = {"labeller": labeller, "ranks": [ranks[text] for text in self.tasks[task].completions], "at": at}
        with self.mutex:
            answers = {**self.answers, (task, labeller): ranking}
            if (task, labeller) in self.answers:
                self._rewrite(answers)
            else:
                self._append(self._line(task, ranking))
            self.answers = answers

    def _line(self, task: int, ranking: dict[str, Any]) -> dict[str, Any]:
        it = self.tasks[task]
        return {"prompt": it.prompt, "completions": list(it.completions), "rankings": [ranking]}

    def _append(self, record: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            before = file.tell()
            try:
                _write(file, [record])
            except OSError:
                os.truncate(self.path, before)
                raise

    def _rewrite(self, answers: dict[tuple[int, str], dict[str, Any]]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                _write(file, self.others + [self._line(task, ranking) for (task, _), ranking in answers.items()])
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def ranks(self, task: int, labeller: str) -> dict[str, Rank]:
        """Completion text -> rank that this labeller gave; empty if none."""
        ranking = self.answers.get((task, labeller))
        return dict(zip(self.tasks[task].completions, ranking["ranks"], strict=True)) if ranking else {}

    def next_task(self, labeller: str, after: int = -1) -> int | None:
        """The first task after `after` that is open for this labeller, then from the beginning; None if all is done."""
        count = len(self.tasks)
        given = [0] * count
        for task, _ in self.answers:
            given[task] += 1
        for task in [*range(after + 1, count), *range(min(after + 1, count))]:
            if (task, labeller) not in self.answers and not (self.per_prompt and given[task] >= self.per_prompt):
                return task
        return None

    def done(self) -> dict[str, int]:
        """Labeller -> number of tasks ranked."""
        counts: dict[str, int] = {}
        for _, labeller in self.answers:
            counts[labeller] = counts.get(labeller, 0) + 1
        return dict(sorted(counts.items()))


def _write(file: IO[bytes], records: list[dict[str, Any]]) -> None:
    file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8"))
    file.flush()
    os.fsync(file.fileno())


def parse_rank(text: str, count: int) -> Rank:
    """What the page sends: "1" to the number of completions, or "F". ValueError for anything else."""
    if text == FAIL:
        return FAIL
    if text not in [str(rank) for rank in range(1, count + 1)]:
        raise ValueError(f"{text[:20]!r} is not a rank from 1 to {count} or F")
    return int(text)
