"""The formats of preference records: pairs, transcripts, chats, rankings, scores; each recognises its own records.

A parser turns one record into `Pair`s, `RankedPrompt`s or `Score`s; exports.py holds those of labelling tools.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.rankings import RankedPrompt, Ranking, ranked_of
from rlhf_trainer.data.records import (
    HH_TURN,
    Pair,
    chat_turn,
    instruction_prompt,
    is_finite,
    messages_of,
    number_field,
    text_field,
    transcript_prompt,
)

# Where an answer begins in transcripts that have no field for the prompt.
MARKERS = (
    HH_TURN,
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|assistant|>\n",
    "<start_of_turn>model\n",
    "[/INST]",
    "### Assistant:",
    "### Response:",
)
# Our name of a column -> names that others give it. Case, spaces and hyphens do not count.
NAMES = {
    "prompt": ("prompt", "question", "query", "input_text", "context"),
    "chosen": ("chosen", "chosen_response", "response_chosen", "preferred", "preferred_response", "better"),
    "rejected": ("rejected", "rejected_response", "response_rejected", "dispreferred", "other_response", "worse"),
    "completion": ("completion", "response", "answer", "output"),
    "score": ("score", "label", "thumb", "thumbs", "rating", "reward", "vote"),
    "labeller": ("labeller", "labeler", "annotator", "rater", "user", "user_id", "worker_id", "completed_by"),
    "completions": ("completions", "responses", "answers", "candidates"),
}
UP = {"up", "true", "yes", "good", "like", "thumbs_up", "👍"}
DOWN = {"down", "false", "no", "bad", "dislike", "thumbs_down", "👎"}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant"}


@dataclass(frozen=True)
class Options:
    """How to read records: the model's tokenizer (for chats), --columns (our name -> theirs), --answer_marker."""

    tokenizer: PreTrainedTokenizerBase | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    markers: Sequence[str] = MARKERS


@dataclass(frozen=True)
class Score:
    """What one labeller thinks of one completion, higher being better; in 0 and 1, a thumb."""

    prompt: str
    completion: str
    labeller: str
    value: float
    line: int


Item = Pair | RankedPrompt | Score
Record = dict[str, Any]


@dataclass(frozen=True)
class Format:
    name: str
    what: str
    fits: Callable[[Record], bool]  # is the first record of a file of this kind?
    parse: Callable[[Record, str, int, Options], Iterable[Item]]


def plain_name(name: str) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def our_names(record: Record, columns: Mapping[str, str], where: str) -> Record:
    """The record with columns under our names: those of --columns first, then what NAMES knows. None is left out."""
    record = {key: value for key, value in record.items() if value is not None}
    named = {}
    for ours, theirs in columns.items():
        parts = theirs.split(",") if ours == "completions" else [theirs]
        missing = [part for part in parts if part not in record]
        if missing:
            raise UserError(f"{where}: no column {missing[0]!r}; the columns are {', '.join(record) or 'none'}")
        named[ours] = [record.pop(part) for part in parts] if len(parts) > 1 else record.pop(parts[0])
    plain = {plain_name(key): value for key, value in record.items()}
    for ours, names in NAMES.items():
        known = next((name for name in names if name in plain), None)
        if ours not in named and known is not None:
            named[ours] = plain[known]
    return {**plain, **named}


def messages(value: Any, key: str, where: str) -> list[dict[str, str]]:
    """A chat: [{"role", "content"}, ...], or with "from" and "value", or a single such message."""
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list):
        value = [
            {"role": ROLES.get(m["from"], m["from"]), "content": m["value"]}
            if isinstance(m, dict) and "from" in m and "value" in m
            else m
            for m in value
        ]
    return messages_of(value, key, where)


def turn(prompt: Any, completion: Any, where: str, options: Options) -> tuple[str, str]:
    """Prompt and completion as text. Where either is a chat, both are written by the model's chat template.

    `completion` may repeat the messages of the prompt, as many data sets have it.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return (
            text_field({"prompt": prompt}, "prompt", where),
            text_field({"completion": completion}, "completion", where),
        )
    for key, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, (str, list, dict)) and not (key == "prompt" and value is None):
            raise UserError(f"{where}: the {key} is {type(value).__name__}, expected text or chat messages")
    if options.tokenizer is None:
        raise UserError(f"{where}: chat messages are written by a model's chat template; name the model with --model")
    answer = (
        [{"role": "assistant", "content": completion}]
        if isinstance(completion, str)
        else messages(completion, "completion", where)
    )
    context = [] if prompt is None else [{"role": "user", "content": prompt}]
    if prompt is not None and not isinstance(prompt, str):
        context = messages(prompt, "prompt", where)
    if answer[: len(context)] == context or (isinstance(prompt, str) and answer[0]["role"] != "assistant"):
        context = []
    chat = context + answer
    if len(chat) < 2:
        raise UserError(f"{where}: a chat of one message has no prompt")
    if chat[-1]["role"] in ("user", "system"):
        raise UserError(f"{where}: the last message is of role {chat[-1]['role']!r}, not an answer")
    example = chat_turn(chat, len(chat) - 1, options.tokenizer, where)
    return example.prompt, example.completion


def prompt_of(record: Record, where: str) -> Any:
    """The prompt under our name for it, or made of an instruction and its input; None if there is none."""
    if "prompt" in record:
        return record["prompt"]
    if "instruction" in record:
        return instruction_prompt(record, where)
    return None


def _number_of_cell(value: Any) -> Any:
    """The number that a table's cell holds; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_pair(record: Record, where: str, line: int, options: Options) -> Pair:
    """The pair of a record in any of the formats that have both answers in one record."""
    record = our_names(record, options.columns, where)
    numbers = {key: _number_of_cell(record[key]) for key in ("label", "margin") if record.get(key, "") != ""}
    label = number_field(numbers, "label", where, 1.0, 0.0, 1.0)
    margin = number_field(numbers, "margin", where, 0.0, -math.inf, math.inf)
    for key in ("chosen", "rejected"):
        if not isinstance(record.get(key), (list, dict)):
            text_field(record, key, where)
    prompt, chosen, rejected = prompt_of(record, where), record["chosen"], record["rejected"]
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        shared = transcript_prompt(chosen, rejected, where, options.markers)
        return Pair(shared, chosen[len(shared) :], rejected[len(shared) :], label, margin, line)
    (one, chosen), (other, rejected) = (turn(prompt, side, where, options) for side in (chosen, rejected))
    if one != other:
        raise UserError(f"{where}: 'chosen' and 'rejected' differ before their last message")
    return Pair(one, chosen, rejected, label, margin, line)


def _pair(record: Record, where: str, line: int, options: Options) -> Iterable[Item]:
    yield read_pair(record, where, line, options)


def _ranked(record: Record, where: str, line: int, options: Options) -> Iterable[Item]:
    record = our_names(record, options.columns, where)
    if isinstance(record.get("prompt"), list) and isinstance(record.get("completions"), list):
        turns = [turn(record["prompt"], completion, where, options) for completion in record["completions"]]
        record = {**record, "prompt": turns[0][0], "completions": [completion for _, completion in turns]}
    yield ranked_of(record, where, line)


def score_value(value: Any, where: str) -> float:
    """A number, a truth value, or a thumb in words."""
    if isinstance(value, bool) or is_finite(value):
        return float(value)
    if isinstance(value, str):
        number = _number_of_cell(value)
        if is_finite(number):
            return float(number)
        if plain_name(value) in UP | DOWN:
            return float(plain_name(value) in UP)
    raise UserError(f"{where}: {value!r} is neither a number nor a thumb such as up, down, true, false")


def _score(record: Record, where: str, line: int, options: Options) -> Iterable[Item]:
    record = our_names(record, options.columns, where)
    for key in ("completion", "score"):
        if key not in record:
            raise UserError(f"{where}: no column {key!r}; the columns are {', '.join(record) or 'none'}")
    prompt = prompt_of(record, where)
    if prompt is None and isinstance(record["completion"], str):
        raise UserError(f"{where}: no column 'prompt'; the columns are {', '.join(record)}")
    prompt, completion = turn(prompt, record["completion"], where, options)
    labeller = text_field({"labeller": str(record.get("labeller", "unnamed"))}, "labeller", where)
    yield Score(prompt, completion, labeller, score_value(record["score"], where), line)


def ranked_by_prompt(scores: Iterable[tuple[Score, Any]]) -> list[RankedPrompt]:
    """All completions of a prompt with their scores side by side, per labeller.

    Each score comes with its file's report. The same labeller's second score of the same completion does not
    count; the report says so.
    """
    prompts: dict[str, dict[tuple[str, str], Score]] = {}
    for score, report in scores:
        known = prompts.setdefault(score.prompt, {})
        first = known.setdefault((score.labeller, score.completion), score)
        if first is not score:
            same = first.value == score.value
            report.warn("duplicate" if same else "contradicts an earlier score, not counted", score.line)
    found = []
    for prompt, known in prompts.items():
        completions = tuple(dict.fromkeys(completion for _, completion in known))
        labellers = dict.fromkeys(labeller for labeller, _ in known)
        rankings = []
        for labeller in labellers:
            given = [known.get((labeller, completion)) for completion in completions]
            rankings.append(Ranking(labeller, tuple(None if score is None else -score.value for score in given)))
        line = next(iter(known.values())).line
        found.append(RankedPrompt(prompt, completions, tuple(rankings), scored=True, line=line))
    return found


def _has(*names: str) -> Callable[[Record], bool]:
    return lambda record: all(name in our_names(record, {}, "") for name in names)


def _is_pair(kind: type | tuple[type, ...], with_prompt: bool | None) -> Callable[[Record], bool]:
    def fits(record: Record) -> bool:
        named = our_names(record, {}, "")
        prompted = bool({"prompt", "instruction"} & set(named))
        sides = isinstance(named.get("chosen"), kind) and isinstance(named.get("rejected"), kind)
        return sides and (with_prompt is None or prompted == with_prompt)

    return fits


RECORDS = (
    Format(
        "rankings",
        '{"prompt", "completions", "rankings": [{"labeller", "ranks"}]}, or "scores" in place of rankings',
        lambda record: _has("completions")(record) and bool({"rankings", "scores"} & set(record)),
        _ranked,
    ),
    Format(
        "chat",
        "chosen and rejected are chat messages, with or without a prompt; needs --model for the chat template",
        _is_pair((list, dict), None),
        _pair,
    ),
    Format("hh", "chosen and rejected are whole transcripts, such as HH-RLHF's", _is_pair(str, False), _pair),
    Format(
        "pairs",
        "prompt (or instruction and input), chosen, rejected: JSON lines or a table",
        _is_pair(str, True),
        _pair,
    ),
    Format(
        "scores",
        "a completion a record, with a thumb, a 0 or 1, or a score; optionally the labeller",
        _has("completion", "score"),
        _score,
    ),
)
