"""What the stages read: prompts, examples and pairs, each by the same reader wherever they are wanted.

A field that a reader does not use is counted, and an error under --strict, unless --ignore_fields names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.chats import render_prompt
from rlhf_trainer.data.files import read_lines
from rlhf_trainer.data.formats import NAMES, Options, messages, plain_name, read_pair, turn
from rlhf_trainer.data.records import (
    DataReport,
    Example,
    Pair,
    chat_turn,
    check_pairs,
    instruction_prompt,
    shown_prompt,
    text_field,
)
from rlhf_trainer.data.sources import Record, is_text, read_records

INSTRUCTION = ("instruction", "input")
# What the stages' own outputs hold besides: they need no word when another stage reads them.
OUTPUTS = ("score", "scores", "ended", "rule")
ANSWERS = ("output", "completion", "completions", "chosen", "rejected", "label", "margin")
SPOKEN = ("role", "content", "from", "value")


def count_unused(record: Record, used: Iterable[str], report: DataReport, line: int) -> None:
    """Count each field of the record, or of a message in it, that is not among those `used`."""
    known = {*used, *OUTPUTS, *report.ignored}
    unused = [key for key, value in record.items() if value is not None and key not in known]
    for key, value in record.items():
        turns = value if isinstance(value, list) and key in known else []
        marks = {str(mark) for one in turns if isinstance(one, dict) for mark in one} - {*SPOKEN, *report.ignored}
        unused += [f"{key}[].{mark}" for mark in sorted(marks)]
    for key in unused:
        report.warn(f"field {key!r} is not used, --ignore_fields {key.split('.')[-1]} lets it pass", line)


def with_system(record: Record, key: str, where: str) -> list[dict[str, str]]:
    """The messages of a record after its `system` text, if it has one beside them."""
    chat = messages(record[key], key, where)
    if not record.get("system"):
        return chat
    if chat[0]["role"] == "system":
        raise UserError(f"{where}: field 'system' beside a system message; one of them must go")
    return [{"role": "system", "content": text_field(record, "system", where)}, *chat]


# Prompts


def _prompt_of(record: Record, where: str) -> tuple[str | list[dict[str, str]], list[str]]:
    """(the prompt as text or chat, the fields that it was made of)."""
    key = "messages" if "messages" in record else "prompt"
    if isinstance(record.get(key), list):
        chat = with_system(record, key, where)
        if key == "messages" and chat[-1]["role"] == "assistant":  # sft's data: the answer is no prompt
            chat = chat[:-1]
        if not chat:
            raise UserError(f"{where}: no message to answer")
        return chat, [key, "system"]
    if key not in record and "instruction" in record:
        return instruction_prompt(record, where), [*INSTRUCTION]
    return text_field(record, key, where), [key]


def prompt_records(
    path: str | Path, ignore_fields: Sequence[str] = ()
) -> Iterator[tuple[str, str | list[dict[str, str]]]]:
    """("file:line", prompt as text or chat messages): one a line of a text file, or records with "prompt" (text, or
    chat messages), "messages" (without the assistant's last one) or "instruction" and "input".

    The fields of answers are no part of a prompt; any other that is not used is said at the end.

    Raises:
        UserError: an unreadable file, a malformed line, an empty prompt.
    """
    if is_text(path):
        for number, line in read_lines(path):
            if not line.strip():
                raise UserError(f"{path}:{number}: empty prompt")
            yield f"{path}:{number}", line
        return
    report, count = DataReport(path, ignore_fields=ignore_fields), 0
    for number, record in read_records(str(path)):
        where = f"{path}:{number}"
        prompt, used = _prompt_of(record, where)
        if isinstance(prompt, str) and not prompt.strip():
            raise UserError(f"{where}: empty prompt")
        count_unused(record, [*used, *ANSWERS], report, number)
        count += 1
        yield where, prompt
    if report.lines:
        say(report.summary(count, "prompts"))


def read_prompts(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The prompts of a file (see prompt_records) as text, chats written by the tokenizer's template.

    Raises:
        UserError: an unreadable file, a malformed line, an empty prompt, or no prompt at all.
    """
    return [text for text, _ in read_shown_prompts(path, tokenizer)]


def read_shown_prompts(path: str | Path, tokenizer: PreTrainedTokenizerBase | None) -> list[tuple[str, str]]:
    """(text, `shown_prompt`) of each prompt: what a model and what a person reads. Raises as `read_prompts`."""
    prompts = []
    for where, prompt in prompt_records(path):
        text = prompt if isinstance(prompt, str) else render_prompt(prompt, tokenizer, where)
        if not text.strip():
            raise UserError(f"{where}: empty prompt")
        prompts.append((text, shown_prompt(prompt)))
    if not prompts:
        raise UserError(f"{path}: no prompt in it")
    return prompts


# Examples


def _examples_of(
    record: Record, tokenizer: PreTrainedTokenizerBase | None, where: str
) -> tuple[list[Example], list[str]]:
    """(the examples of a record, the fields that they were made of)."""
    if "messages" in record:
        chat = with_system(record, "messages", where)
        turns = [i for i, message in enumerate(chat) if message["role"] == "assistant" and i > 0]
        if not turns:
            raise UserError(f"{where}: no assistant message to learn from")
        return [chat_turn(chat, place, tokenizer, where) for place in turns], ["messages", "system"]
    if "instruction" in record:
        example = Example(instruction_prompt(record, where), text_field(record, "output", where))
        return [example], [*INSTRUCTION, "output"]
    used = ["prompt", "completion"]
    if isinstance(record.get("prompt"), list):
        record, used = {**record, "prompt": with_system(record, "prompt", where)}, [*used, "system"]
    for key in ("prompt", "completion"):
        if not isinstance(record.get(key), list):
            text_field(record, key, where)
    return [Example(*turn(record["prompt"], record["completion"], where, Options(tokenizer)))], used


def read_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    strict: bool = False,
    ignore_fields: Sequence[str] = (),
) -> tuple[list[Example], DataReport]:
    """SFT examples from records of {"prompt", "completion"}, {"instruction", "input", "output"} or {"messages"}.

    A chat gives one example for each assistant message. An empty completion is dropped; an empty prompt and a
    duplicate are kept and counted. A text file gives one example a line, with an empty prompt.
    """
    report, examples, seen = DataReport(path, strict, ignore_fields), [], set()
    for number, found in _example_records(path, tokenizer, report):
        for example in found:
            if not example.completion.strip():
                report.warn("empty completion, dropped", number)
                continue
            if not is_text(path) and not example.prompt.strip():
                report.warn("empty prompt", number)
            if example in seen:
                report.warn("duplicate", number)
            seen.add(example)
            examples.append(replace(example, line=number))
    if not examples:
        raise UserError(f"{path}: no example in it")
    return examples, report


def _example_records(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None, report: DataReport
) -> Iterator[tuple[int, list[Example]]]:
    if is_text(path):
        yield from ((number, [Example("", line)]) for number, line in read_lines(path))
        return
    for number, record in read_records(str(path)):
        found, used = _examples_of(record, tokenizer, f"{path}:{number}")
        count_unused(record, used, report, number)
        yield number, found


# Pairs


def _pair_of(record: Record, options: Options, report: DataReport, where: str, line: int) -> Pair:
    prompts = [name for name in record if plain_name(name) in NAMES["prompt"]]
    used: list[str] = [*INSTRUCTION] if not prompts else prompts[:1]
    for side in ("chosen", "rejected"):
        used += [name for name in record if plain_name(name) in NAMES[side]][:1]
    given: dict[str, Any] = dict(record)
    if prompts and isinstance(record[prompts[0]], list):
        given[prompts[0]] = with_system(record, prompts[0], where)
        used.append("system")
    count_unused(record, [*used, "label", "margin"], report, line)
    return replace(read_pair(given, where, line, options), line=line)


def read_pairs(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    strict: bool = False,
    ignore_fields: Sequence[str] = (),
) -> tuple[list[Pair], DataReport]:
    """Preference pairs: {"prompt", "chosen", "rejected"}, HH-RLHF transcripts without "prompt", or chats.

    Optional fields: "label" (probability that chosen is better) and "margin". What check_pairs finds odd is counted.
    `rlhf prefs` turns every other format into this one.
    """
    report, options = DataReport(path, strict, ignore_fields), Options(tokenizer)
    found = (
        (_pair_of(record, options, report, f"{path}:{line}", line), report) for line, record in read_records(str(path))
    )
    pairs = check_pairs(found)
    if not pairs:
        raise UserError(f"{path}: no pair in it")
    return pairs, report
