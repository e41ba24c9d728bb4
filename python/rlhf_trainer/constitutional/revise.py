"""`rlhf cai revise`: answers to red-team prompts, criticised and revised by the model itself (Bai et al. 2022)."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.config import option, require
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.writing import write_text
from rlhf_trainer.constitutional.constitution import Constitution
from rlhf_trainer.constitutional.dialogue import STOPS, Prompt, Request, critique_request, opening, revision_request
from rlhf_trainer.constitutional.writer import CAIConfig, Writer, keep_rules, read_requests, rules_for
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.judging.shots import Rule, WorkedExample
from rlhf_trainer.reports.page import write_page
from rlhf_trainer.sampling.batches import BatchFile, file_beside

SUMMARY = """Let a model answer prompts, criticise its answers by rules, and revise them: data for `rlhf sft`.

In each round the critique request of a rule of the constitution is put to the model, then its revision request.
Beside --output lie .transcripts.jsonl and .transcripts.html (every text in between, with the rules' names),
.report.json and .constitution.yaml. Every batch is on disk once written; after a crash --resume goes on and gives the
same files, bit by bit on the CPU."""
EXAMPLE = (
    "rlhf cai revise --model runs/helpful --prompts red_team.jsonl --output revised.jsonl --rounds 2\n"
    "  rlhf cai revise --model BASE --format plain --shots 2 --prompts red_team.txt --output revised.jsonl\n"
    "  rlhf cai revise --server http://127.0.0.1:8000/v1 --prompts red_team.jsonl --output revised.jsonl\n"
    "  rlhf sft --model runs/helpful --data revised.jsonl --output_dir runs/sft-cai"
)
SHOWN = 500  # transcripts on the page; all are in the JSON lines


@dataclass
class CAIReviseConfig(CAIConfig):
    output: str = option("", "JSON-lines file of {prompt, completion}: each prompt with its last revision")
    n: int = option(1, "answers to each prompt, each of them revised")
    rounds: int = option(
        1, "critiques and revisions of an answer, each by another rule; with --principles all: a round a rule"
    )
    drop_unfinished: bool = option(False, "leave out revisions that did not come to an end by themselves")


Config = CAIReviseConfig


@dataclass
class CAIReviseResult:
    """examples: SFT data; transcripts: every text, a record a conversation; figures: what .report.json holds."""

    examples: list[dict[str, Any]]
    transcripts: list[dict[str, Any]]
    figures: dict[str, Any]
    output: str  # "": nothing was written


def run(cfg: CAIReviseConfig) -> dict[str, Any]:
    require(cfg, "output")
    figures = revise_answers(cfg).figures
    left_out = sum(figures["left_out"].values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in figures["left_out"].items())
    say(
        f"{cfg.output}: {figures['examples']} examples from {figures['conversations']} answers"
        + (f", {left_out} left out ({reasons})" if left_out else "")
        + f"; {figures['changed']:.0%} of the revisions differ from the answer, {figures['ended']:.0%} ended by "
        f"themselves; words {figures['words_before']:.0f} -> {figures['words_after']:.0f}; "
        f"read them in {Path(cfg.output).with_suffix('.transcripts.html')}"
    )
    return figures


def revise_answers(
    cfg: CAIReviseConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[Request] | None = None,
    constitution: Constitution | None = None,
) -> CAIReviseResult:
    """Answer, criticise, revise. What is not passed is loaded from what cfg names; without cfg.output nothing is kept.

    Args:
        prompts: texts, or chats as lists of {"role", "content"}.

    Raises:
        UserError: bad input, one sentence; also if no example comes of it.
    """
    cfg.validate(*(name for name, given in (("model", model), ("prompts", prompts)) if given is not None))
    if cfg.rounds < 1:
        raise UserError(f"--rounds {cfg.rounds}: must be at least 1")
    used, shots = cfg.load_rules(constitution)
    writer = cfg.load_writer(model, tokenizer)
    read = read_requests(cfg.prompts, writer, prompts, cfg.max_prompts)
    asked = [prompt for prompt in read for _ in range(cfg.n)]
    file = BatchFile(file_beside(cfg.output, ".transcripts.jsonl"), asdict(cfg), cfg.resume, cfg.prompts)
    start = file.resume_position([prompt.data for prompt in asked], cfg.batch_size)
    keep_rules(cfg.output, used)

    def batches() -> Iterator[list[dict[str, Any]]]:
        for first in range(start, len(asked), cfg.batch_size):
            writer.seed(cfg.seed * 1_000_003 + first)  # each batch has its own seed
            some = asked[first : first + cfg.batch_size]
            rules = [rules_for(used, cfg.principles, cfg.rounds, cfg.seed, first + i) for i in range(len(some))]
            yield revise_batch(writer, shots, some, rules)

    transcripts = file.append_batches(batches(), start=start, total=len(asked), description="revise")
    made = (example_of(p, t, cfg.drop_unfinished) for p, t in zip(asked, transcripts, strict=True))
    examples = [example for example in made if example is not None]
    figures = statistics(transcripts, len(examples), cfg.drop_unfinished)
    if cfg.output:
        write_files(Path(cfg.output), examples, asked, transcripts, figures)
    if not examples:
        raise UserError(f"no example came of {len(asked)} answers: {figures['left_out']}")
    return CAIReviseResult(examples, transcripts, figures, cfg.output)


def revise_batch(
    writer: Writer, shots: Sequence[WorkedExample], prompts: Sequence[Prompt], rules: Sequence[Sequence[Rule]]
) -> list[dict[str, Any]]:
    """One record a conversation: {"prompt", "answer", "rounds": [{"rule", "critique", "revision"}], "ended"}.

    "skipped" says why a conversation ended early: a text that came out empty, or one too long for the model.
    """
    chat = writer.chat
    records: list[dict[str, Any]] = [{"prompt": p.data, "answer": "", "rounds": [], "ended": False} for p in prompts]
    active = list(range(len(prompts)))
    latest = [""] * len(prompts)

    def step(what: str, requests: list[Request], stops: Sequence[str]) -> list[str]:
        """Texts for the conversations that go on; one that gets no text ends here."""
        texts = [""] * len(prompts)
        written = writer.write(requests, stops) if requests else []
        for i, one in zip(list(active), written, strict=True):
            texts[i], records[i]["ended"] = one.text, one.ended
            if one.problem or not one.text.strip():
                records[i]["skipped"] = f"{what} {one.problem or 'empty'}"
                active.remove(i)
        return texts

    for i, text in enumerate(step("answer", [opening(p, chat) for p in prompts], ())):
        records[i]["answer"] = latest[i] = text
    stops = () if chat else STOPS
    for number in range(max(map(len, rules))):
        own = [each[number] for each in rules]
        asked = [critique_request(prompts[i], latest[i], own[i], chat, shots) for i in active]
        critiques = step("critique", asked, stops)
        for i in active:
            records[i]["rounds"].append({"rule": own[i].name, "critique": critiques[i].strip(), "revision": ""})
        asked = [revision_request(prompts[i], latest[i], own[i], critiques[i], chat, shots) for i in active]
        revisions = step("revision", asked, stops)
        for i in active:
            records[i]["rounds"][-1]["revision"] = latest[i] = revisions[i].strip()
    return records


def example_of(prompt: Prompt, record: dict[str, Any], drop_unfinished: bool) -> dict[str, Any] | None:
    """SFT data of a conversation that reached its last revision, else None; keeps the answer's leading space."""
    if "skipped" in record or (drop_unfinished and not record["ended"]):
        return None
    answer = record["answer"]
    return prompt.example(answer[: len(answer) - len(answer.lstrip())] + record["rounds"][-1]["revision"])


def statistics(transcripts: Sequence[dict[str, Any]], examples: int, drop_unfinished: bool) -> dict[str, Any]:
    """What came of the conversations; shares and words are of those that reached their last revision."""
    whole = [record for record in transcripts if "skipped" not in record]
    left_out = Counter(record["skipped"] for record in transcripts if "skipped" in record)
    if drop_unfinished and (unfinished := sum(not record["ended"] for record in whole)):
        left_out["revision unfinished"] = unfinished
    pairs = [(record["answer"].strip(), record["rounds"][-1]["revision"]) for record in whole]
    count = max(len(whole), 1)
    return {
        "conversations": len(transcripts),
        "examples": examples,
        "left_out": dict(left_out),
        "changed": sum(answer != revision for answer, revision in pairs) / count,
        "ended": sum(record["ended"] for record in whole) / count,
        "words_before": sum(len(answer.split()) for answer, _ in pairs) / count,
        "words_after": sum(len(revision.split()) for _, revision in pairs) / count,
        "rules": dict(Counter(one["rule"] for record in transcripts for one in record["rounds"])),
    }


def write_files(
    path: Path,
    examples: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    transcripts: Sequence[dict[str, Any]],
    figures: dict[str, Any],
) -> None:
    write_text(path.with_suffix(".report.json"), dumps(figures, indent=2) + "\n")
    shown = [transcript_html(i, *both) for i, both in enumerate(zip(prompts, transcripts, strict=True), start=1)][
        :SHOWN
    ]
    counts = f"<p>{figures['examples']} examples from {len(transcripts)} answers"
    counts += (
        f"; the first {SHOWN} are here, all of them in the .jsonl file</p>" if len(transcripts) > SHOWN else "</p>"
    )
    write_page(path.with_suffix(".transcripts.html"), "Answers, critiques and revisions", [counts, *shown])
    if examples:
        write_jsonl(path, examples)


def transcript_html(number: int, prompt: Prompt, record: dict[str, Any]) -> str:
    """A conversation that opens at a click."""
    parts = [("Prompt", prompt.shown), ("Answer", record["answer"])]
    for one in record["rounds"]:
        parts += [(f"Critique by {one['rule']}", one["critique"]), ("Revision", one["revision"])]
    if "skipped" in record:
        parts.append(("Left out", record["skipped"]))
    body = "".join(
        f'<h3>{html.escape(name)}</h3><p class="pre">{html.escape(text.strip())}</p>' for name, text in parts
    )
    first = html.escape(" ".join(prompt.shown.split())[:120])
    return f"<details><summary>{number}. {first}</summary>{body}</details>"
