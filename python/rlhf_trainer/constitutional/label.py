"""`rlhf cai label`: a model judges by a rule of the constitution which of two answers is better (RLAIF)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.config import option, require
from rlhf_trainer.base.console import say
from rlhf_trainer.base.distributed import resolve_device
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import write_text
from rlhf_trainer.constitutional.constitution import Constitution
from rlhf_trainer.constitutional.dialogue import Prompt, Request, opening
from rlhf_trainer.constitutional.writer import (
    CAIConfig,
    LocalWriter,
    ServerWriter,
    Writer,
    keep_rules,
    read_requests,
    rules_for,
)
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.judging.judges import KINDS, Judge, ModelJudge, ServerJudge, both_orders, load_judge
from rlhf_trainer.judging.shots import Rule, WorkedExample
from rlhf_trainer.labelling.store import read_tasks
from rlhf_trainer.reports.page import html_table, write_page
from rlhf_trainer.sampling.batches import BatchFile, file_beside

SUMMARY = """Let a judge say by a rule which of two answers is better: pairs for `rlhf reward` and `rlhf dpo`.

The judge is asked in both orders; the mean is free of its liking for the first or the second place, and becomes the
pair's `label`, the probability that `chosen` is better. Beside --output lie .judged.jsonl (every answer and what the
judge said in each order), .report.json, .report.html and .constitution.yaml. After a crash --resume goes on."""
EXAMPLE = (
    "rlhf cai label --model runs/sft-cai --judge HELPFUL_MODEL --prompts prompts.jsonl --output pairs.jsonl\n"
    "  rlhf cai label --completions completions.jsonl --judge judge.py:kinder --output pairs.jsonl\n"
    "  rlhf reward --model runs/sft-cai --data pairs.jsonl --output_dir runs/reward"
)
SHOWN = 100  # comparisons on the page
LEAST_MASS = 0.5  # probability of A or B below which the judge hardly states a preference
LEAST_AGREEMENT = 0.5  # share of comparisons whose two orders agree; tossing coins gives as much
NOTES = {  # of our own judges
    "mass": "probability of A or B at all",
}


@dataclass
class CAILabelConfig(CAIConfig):
    output: str = option("", "JSON-lines file of pairs: {prompt, chosen, rejected, label, rule}")
    n: int = option(2, "answers to each prompt; every two of them are compared")
    completions: str | None = option(
        None, "file of `rlhf generate` whose answers are compared, in place of --prompts and sampling from --model"
    )
    judge: str | None = option(None, f"who compares: {KINDS}; none: the model that writes")
    min_confidence: float = option(0.5, "pairs whose label is lower are left out, as are ties (0.5 exactly)")

    def validate_with(self, model: bool, prompts: bool, judge: bool) -> None:
        """UserError for options that cannot work; the arguments say which objects were passed."""
        own_judge = judge or bool(self.judge)
        given = [*(["model"] if model or (self.completions and own_judge) else [])]
        self.validate(*given, *(["prompts"] if prompts or self.completions else []))
        if self.n < 2:
            raise UserError(f"--n {self.n}: two answers at least are compared")
        if not 0 <= self.min_confidence < 1:
            raise UserError(f"--min_confidence {self.min_confidence}: must be at least 0 and below 1")

    def load_judge(self, writer: Writer | None, shots: Sequence[WorkedExample]) -> Judge:
        """The judge of --judge, or else the model that writes the answers."""
        same = isinstance(writer, LocalWriter) and self.judge == self.model
        if self.judge and not same:  # the same model is loaded once
            return load_judge(
                self.judge,
                device=resolve_device(self.device),
                pad_token=self.pad_token,
                trust_remote_code=self.trust_remote_code,
                batch_size=self.batch_size,
                shots=shots,
                chat={"chat": True, "plain": False}.get(self.format),
                timeout=self.timeout,
                retries=self.retries,
                parallel=self.parallel,
            )
        if isinstance(writer, ServerWriter):
            return ServerJudge(writer.server, chat=writer.chat, shots=shots)
        assert writer is not None
        return ModelJudge(writer.model, writer.tokenizer, batch_size=self.batch_size, chat=writer.chat, shots=shots)


Config = CAILabelConfig


@dataclass
class CAILabelResult:
    """pairs: preference data; judged: every answer and comparison, a record a prompt; figures: .report.json's."""

    pairs: list[dict[str, Any]]
    judged: list[dict[str, Any]]
    figures: dict[str, Any]
    output: str  # "": nothing was written


def run(cfg: CAILabelConfig) -> dict[str, Any]:
    require(cfg, "output")
    figures = label_answers(cfg).figures
    print("\n".join(f"{name:34} {value}" for name, value in report_rows(figures)))
    for warning in warnings(figures):
        say(f"warning: {warning}")
    say(f"{cfg.output}: {figures['pairs']} pairs; {Path(cfg.output).with_suffix('.report.html')}")
    return figures


def label_answers(
    cfg: CAILabelConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[Request] | None = None,
    constitution: Constitution | None = None,
    judge: Judge | None = None,
) -> CAILabelResult:
    """Sample, compare, label. What is not passed is loaded from what cfg names; without cfg.output nothing is written.

    Args:
        prompts: texts, or chats as lists of {"role", "content"}.
        judge: (prompts, answers, others[, questions]) -> probability that each answer is the better one.

    Raises:
        UserError: bad input, one sentence; also if no pair comes of it.
    """
    cfg.validate_with(model is not None, prompts is not None, judge is not None)
    used, shots = cfg.load_rules(constitution)
    needs_writer = not cfg.completions or (judge is None and not cfg.judge)
    writer = cfg.load_writer(model, tokenizer) if needs_writer else None
    if cfg.completions:
        asked, answers = read_answers(cfg.completions, cfg.max_prompts)
    else:
        assert writer is not None
        asked, answers = read_requests(cfg.prompts, writer, prompts, cfg.max_prompts), []
    judge = cfg.load_judge(writer, shots) if judge is None else judge
    file = BatchFile(file_beside(cfg.output, ".judged.jsonl"), asdict(cfg), cfg.resume, cfg.prompts)
    batch = max(1, cfg.batch_size // cfg.n)
    start = file.resume_position([prompt.data for prompt in asked], batch)
    keep_rules(cfg.output, used)

    def batches() -> Iterator[list[dict[str, Any]]]:
        for first in range(start, len(asked), batch):
            some = asked[first : first + batch]
            rules = [rules_for(used, cfg.principles, 1, cfg.seed, first + i) for i in range(len(some))]
            given = answers[first : first + batch] or sample(writer, some, cfg.n, cfg.seed * 1_000_003 + first)
            yield compare(judge, some, given, rules)

    judged = file.append_batches(batches(), start=start, total=len(asked), description="label")
    weights = {rule.name: rule.weight for rule in used.rules}
    found = [
        (prompt, one) for p, record in zip(asked, judged, strict=True) for prompt, one in labelled(p, record, weights)
    ]
    pairs = [pair_of(*one) for one in found if one[1]["label"] > 0.5 and one[1]["label"] >= cfg.min_confidence]
    figures = statistics(judged, [one for _, one in found], len(pairs))
    if cfg.output:
        write_files(Path(cfg.output), pairs, found, figures)
    if not pairs:
        raise UserError(
            f"no pair came of {figures['comparisons']} comparisons: {figures['ties']} ties, "
            f"{figures['below_min_confidence']} below --min_confidence {cfg.min_confidence:g}; in "
            f"{figures['no_verdict']} more the judge gave no verdict (unclear, or too long for it)"
        )
    return CAILabelResult(pairs, judged, figures, cfg.output)


def read_answers(path: str, max_prompts: int | None) -> tuple[list[Prompt], list[list[str]]]:
    """The prompts of a file of `rlhf generate`, at most `max_prompts`, and the answers to each."""
    items = read_tasks(path)[:max_prompts]
    prompts = [Prompt(item.prompt, [{"role": "user", "content": item.prompt}], item.prompt) for item in items]
    return prompts, [list(item.texts) for item in items]


def sample(writer: Writer | None, prompts: Sequence[Prompt], n: int, seed: int) -> list[list[str]]:
    """`n` answers to each prompt, without those that are empty or repeat another."""
    assert writer is not None
    writer.seed(seed)
    written = writer.write([opening(prompt, writer.chat) for prompt in prompts for _ in range(n)])
    texts = [[one.text for one in written[at : at + n]] for at in range(0, len(written), n)]
    return [list(dict.fromkeys(text for text in some if text.strip())) for some in texts]


def compare(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[list[str]], rules: Sequence[Sequence[Rule]]
) -> list[dict[str, Any]]:
    """Every two answers of a prompt under each of its rules, in both orders, all in one go.

    Returns:
        {"prompt", "completions", "comparisons": [{"first", "second", "rule", "shown_first", "shown_second"}]} a prompt:
        numbers of two completions, and the probability that the first is better where it is shown first, and second;
        and the mean over both orders of each entry of the judge's `notes`. Those without a verdict are left out, and
        their number is "no_verdict".
    """
    asked = [
        (number, i, j, rule)
        for number, texts in enumerate(answers)
        for i, j in combinations(range(len(texts)), 2)
        for rule in rules[number]
    ]
    records: list[dict[str, Any]] = [
        {"prompt": p.data, "completions": t, "comparisons": []} for p, t in zip(prompts, answers, strict=True)
    ]
    if not asked:
        return records
    shown_first, shown_second = both_orders(
        judge,
        [prompts[number].shown for number, *_ in asked],
        [answers[number][i] for number, i, _, _ in asked],
        [answers[number][j] for number, _, j, _ in asked],
        [rule.question for *_, rule in asked],
    )
    columns = {"shown_first": shown_first.tolist(), "shown_second": shown_second.tolist()}
    for name, values in getattr(judge, "notes", {}).items():
        both = np.reshape(values[-2 * len(asked) :], (2, len(asked)))
        columns[name] = both.mean(0).tolist()
    for place, (number, i, j, rule) in enumerate(asked):
        if math.isnan(columns["shown_first"][place]):
            records[number]["no_verdict"] = records[number].get("no_verdict", 0) + 1
            continue
        seen = {name: values[place] for name, values in columns.items()}
        records[number]["comparisons"].append({"first": i, "second": j, "rule": rule.name, **seen})
    return records


def labelled(
    prompt: Prompt, record: dict[str, Any], weights: dict[str, float]
) -> Iterator[tuple[Prompt, dict[str, Any]]]:
    """(prompt, {"chosen", "rejected", "label", "rule"}) of every two completions: the rules' mean by their weights."""
    both: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for one in record["comparisons"]:
        both.setdefault((one["first"], one["second"]), []).append(one)
    for (first, second), found in both.items():
        total = sum(weights[one["rule"]] for one in found)
        means = (weights[one["rule"]] * (one["shown_first"] + one["shown_second"]) / 2 for one in found)
        label = sum(means) / total
        texts = [record["completions"][i] for i in (first, second)]
        chosen, rejected = texts if label >= 0.5 else texts[::-1]
        rule = ", ".join(one["rule"] for one in found)
        yield prompt, {"chosen": chosen, "rejected": rejected, "label": max(label, 1 - label), "rule": rule}


def pair_of(prompt: Prompt, one: dict[str, Any]) -> dict[str, Any]:
    """A line of the output, as `rlhf reward` and `rlhf dpo` read it; they ignore "rule"."""
    return prompt.pair(one["chosen"], one["rejected"]) | {"label": round(one["label"], 6), "rule": one["rule"]}


def statistics(judged: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], kept: int) -> dict[str, Any]:
    """What the judge did over all comparisons, and what became of the pairs.

    first_place: mean probability given to the answer shown first, 0.5 without a liking for a place. order_agreement:
    share of comparisons in which both orders prefer the same answer. Of NOTES the means, where the judge has them.
    """
    asked = [one for record in judged for one in record["comparisons"]]
    shown_first = np.array([one["shown_first"] for one in asked])
    shown_second = np.array([one["shown_second"] for one in asked])
    labels = np.array([one["label"] for one in found])
    longer = [(len(one["chosen"]) > len(one["rejected"])) for one in found if one["label"] > 0.5]
    ties = int((labels == 0.5).sum())

    def mean(values: Any) -> float | None:
        return float(np.mean(values)) if len(values) else None

    rules = sorted({one["rule"] for one in asked})
    return {
        "prompts": len(judged),
        "without_two_answers": sum(len(record["completions"]) < 2 for record in judged),
        "comparisons": len(asked),
        "no_verdict": sum(record.get("no_verdict", 0) for record in judged),
        "pairs": kept,
        "ties": ties,
        "below_min_confidence": len(found) - kept - ties,
        "dropped": 1 - kept / len(found) if found else None,
        "first_place": mean((shown_first + 1 - shown_second) / 2),
        "order_agreement": mean((shown_first - 0.5) * (shown_second - 0.5) > 0),
        "confidence": mean(labels),
        "longer_chosen": mean(longer),
        "rules": {name: sum(one["rule"] == name for one in asked) for name in rules},
        **{name: mean([one[name] for one in asked]) for name in NOTES if asked and name in asked[0]},
    }


def report_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) for every line of the printed and the HTML report."""

    def share(name: str) -> str:
        return "-" if figures.get(name) is None else f"{figures[name]:.1%}"

    rows = [
        ("prompts", f"{figures['prompts']}, {figures['without_two_answers']} without two different answers"),
        ("comparisons, each in both orders", str(figures["comparisons"])),
        ("left out, the judge gave no verdict", str(figures["no_verdict"])),
        ("pairs", str(figures["pairs"])),
        ("dropped", f"{share('dropped')}: {figures['ties']} ties, {figures['below_min_confidence']} not sure enough"),
        ("mean confidence", share("confidence")),
        ("position: for the first shown", f"{share('first_place')} (50 % is none)"),
        ("both orders prefer the same", share("order_agreement")),
        ("the longer one chosen", share("longer_chosen")),
        ("by rule", ", ".join(f"{name} {count}" for name, count in figures["rules"].items()) or "-"),
    ]
    return rows + [(what, share(name)) for name, what in NOTES.items() if name in figures]


def warnings(figures: dict[str, Any]) -> list[str]:
    """Signs in the figures that the labels mean little."""
    found = []
    if figures.get("mass") is not None and figures["mass"] < LEAST_MASS:
        found.append(
            f"A and B together have a probability of {figures['mass']:.1%} in the judge's eyes: it does not see that "
            "it is to choose; try --shots, --format or another --judge"
        )
    if figures["order_agreement"] is not None and figures["order_agreement"] < LEAST_AGREEMENT:
        found.append(
            f"in only {figures['order_agreement']:.1%} of the comparisons both orders prefer the same answer: the "
            "judge looks at the place more than at the answer"
        )
    return found


def write_files(
    path: Path,
    pairs: list[dict[str, Any]],
    found: Sequence[tuple[Prompt, dict[str, Any]]],
    figures: dict[str, Any],
) -> None:
    write_text(path.with_suffix(".report.json"), dumps(figures, indent=2) + "\n")
    columns = ("prompt", "chosen", "rejected", "label", "rule")
    shown = [
        [prompt.shown, one["chosen"].strip(), one["rejected"].strip(), f"{one['label']:.3f}", one["rule"]]
        for prompt, one in found[:SHOWN]
    ]
    parts = [
        html_table(("", ""), report_rows(figures), numbers=False),
        f"<h2>The first {len(shown)} of {len(found)}</h2>",
        html_table(columns, shown, numbers=False),
    ]
    write_page(path.with_suffix(".report.html"), "Preferences by constitution", parts)
    if pairs:
        write_jsonl(path, pairs)
