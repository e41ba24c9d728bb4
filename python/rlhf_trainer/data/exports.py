"""Records as Argilla and Label Studio export them -> rankings, one labeller per annotator.

Argilla: the JSON of `dataset.records.to_json()` or `to_list()` (nested or flattened), that of FeedbackDataset, and both
as Hugging Face data sets; ranking questions, and label questions whose answer names a field. Label Studio: its JSON
export with Pairwise, Ranker, Rating or Choices results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.formats import NAMES, Format, Item, Options, Record, plain_name, turn
from rlhf_trainer.data.rankings import Rank, RankedPrompt, Ranking
from rlhf_trainer.data.records import text_field

TIES = {"tie", "equal", "same", "both", "neither", "draw", "none"}
LEFT_RIGHT = ("left", "right")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _field_named(value: Any, names: Sequence[str]) -> str | None:
    """The field that an answer names: exactly, or up to case and punctuation, or by a unique ending ("B", "2")."""
    if value in names:
        return str(value)
    wanted = _letters(value)
    for match in (lambda name: _letters(name) == wanted, lambda name: wanted and _letters(name).endswith(wanted)):
        found = [name for name in names if match(name)]
        if len(found) == 1:
            return found[0]
    return None


def _split(fields: Record, named: Sequence[str], where: str, options: Options) -> tuple[Any, dict[str, Any]]:
    """The prompt, and the completions by their field's name: as --columns says, or all other fields of text or chat.

    `named`: what the answers call completions; where each of them names a field, those are the completions.
    """
    fields = {key: value for key, value in fields.items() if isinstance(value, (str, list, dict))}
    prompt = options.columns.get("prompt") or next(
        (key for name in (*NAMES["prompt"], "instruction") for key in fields if plain_name(key) == name), None
    )
    if prompt is None or prompt not in fields:
        raise UserError(
            f"{where}: which field is the prompt? --columns prompt=NAME; the fields are {', '.join(fields) or 'none'}"
        )
    rest = [key for key in fields if key != prompt]
    if "completions" in options.columns:
        rest = options.columns["completions"].split(",")
        missing = [key for key in rest if key not in fields]
        if missing:
            raise UserError(f"{where}: no field {missing[0]!r}; the fields are {', '.join(fields)}")
    else:
        asked = {_field_named(value, rest) for value in named}
        if named and None not in asked and len(asked) > 1:
            rest = [key for key in rest if key in asked]
        elif len(rest) > 2:
            rest = _numbered(rest)
    one_list = len(rest) == 1 and isinstance(fields[rest[0]], list)
    completions = _items(fields[rest[0]], where) if one_list else {key: fields[key] for key in rest}
    if len(completions) < 2:
        only = ", ".join(completions) or "none"
        raise UserError(f"{where}: fewer than two completions ({only}); --columns completions=A,B names them")
    return fields[prompt], completions


def _numbered(names: Sequence[str]) -> list[str]:
    """Those that differ in a last number or letter only (answer1, answer2), if there is one such group; else all."""
    stems = [re.fullmatch(r"(.+?)(?:[-_ ]?[0-9]+|[-_ ][A-Za-z])", name) for name in names]
    groups: dict[str, list[str]] = {}
    for name, stem in zip(names, stems, strict=True):
        groups.setdefault(stem[1] if stem else "", []).append(name)
    several = [group for stem, group in groups.items() if stem and len(group) > 1]
    return several[0] if len(several) == 1 else list(names)


def _items(items: list[Any], where: str) -> dict[str, Any]:
    """A list of completions, texts or {"id", "body" | "text" | "html"}, by id or number."""
    found = {}
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict) and "role" not in item:
            text = next((item[key] for key in ("body", "text", "value", "html", "content") if key in item), None)
            if text is None:
                raise UserError(f"{where}: completion {number} of the list has no text; its keys are {', '.join(item)}")
            found[str(item.get("id", number))] = text
        else:
            found[str(number)] = item
    return found


def _ranked(
    prompt: Any, completions: Mapping[str, Any], rankings: Iterable[Ranking], where: str, line: int, options: Options
) -> Iterator[Item]:
    """One RankedPrompt with chats written as text; of several rankings by one labeller the last one counts."""
    own = {text_field({"labeller": r.labeller}, "labeller", where): r for r in rankings}
    turns = [turn(prompt, completion, where, options) for completion in completions.values()]
    yield RankedPrompt(turns[0][0], tuple(text for _, text in turns), tuple(own.values()), line=line)


# Argilla


def _is_argilla(record: Record) -> bool:
    nested = isinstance(record.get("fields"), dict) and "responses" in record
    flat = any(str(key).endswith(".responses") for key in record)
    return nested or flat or any(_is_answer_list(value) for value in record.values())


def _is_answer_list(value: Any) -> bool:
    """A question's column in a FeedbackDataset that became a Hugging Face data set."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, dict) and {"user_id", "value"} <= set(v) for v in value)
    )


def _argilla_answers(record: Record) -> Iterator[tuple[str, str, str | None, Any]]:
    """(question, labeller, status, value) of every response, whatever the version."""
    responses = record.get("responses")
    if isinstance(responses, dict):  # Argilla 2: question -> answers
        for question, answers in responses.items():
            for answer in answers or []:
                yield question, str(answer.get("user_id", "unnamed")), answer.get("status"), answer.get("value")
    elif isinstance(responses, list):  # FeedbackDataset: one response a labeller
        for response in responses:
            for question, answer in (response.get("values") or {}).items():
                value = answer.get("value") if isinstance(answer, dict) else answer
                yield question, str(response.get("user_id", "unnamed")), response.get("status"), value
    for key, values in record.items():
        if key.endswith(".responses"):  # Argilla 2, flattened
            question = key.removesuffix(".responses")
            values = values or []
            users = record.get(f"{key}.users") or ["unnamed"] * len(values)
            states = record.get(f"{key}.status") or [None] * len(values)
            for user, status, value in zip(users, states, values, strict=True):
                yield question, str(user), status, value
        elif key not in ("fields", "responses") and _is_answer_list(values):
            for answer in values:
                yield key, str(answer["user_id"]), answer.get("status"), answer["value"]


def _ranks_by_name(value: Any) -> dict[str, float] | None:
    """What a ranking question's answer says, field name -> rank; None if it is the answer to another question."""
    if isinstance(value, dict) and isinstance(value.get("rank"), list):  # columns of a Hugging Face data set
        names = value.get("value") or value.get("text")
        return {str(name): float(rank) for name, rank in zip(names, value["rank"], strict=True)} if names else None
    if isinstance(value, list) and value and all(isinstance(v, dict) and {"rank", "value"} <= set(v) for v in value):
        return {str(entry["value"]): float(entry["rank"]) for entry in value}
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return {name: float(rank) for rank, name in enumerate(value, start=1)}
    return None


def _argilla(record: Record, where: str, line: int, options: Options) -> Iterator[Item]:
    answers = [
        (question, labeller, value)
        for question, labeller, status, value in _argilla_answers(record)
        if status in (None, "submitted") and value is not None
    ]
    if not answers:
        return
    fields = record["fields"] if isinstance(record.get("fields"), dict) else _argilla_fields(record)
    asked = options.columns.get("question")
    answers = [answer for answer in answers if asked in (None, answer[0])]
    ranked = [(labeller, ranks) for _, labeller, value in answers if (ranks := _ranks_by_name(value)) is not None]
    labels = [(labeller, value) for _, labeller, value in answers if isinstance(value, str)]
    questions = list(dict.fromkeys(question for question, _, value in answers if _ranks_by_name(value) is not None))
    if len(questions) > 1:
        raise UserError(f"{where}: several rankings; --columns question=NAME picks one of {', '.join(questions)}")
    named = list(dict.fromkeys(name for _, ranks in ranked for name in ranks))
    prompt, completions = _split(fields, named, where, options)
    names = list(completions)
    rankings = [Ranking(labeller, _by_field(ranks, names, where)) for labeller, ranks in ranked]
    if not ranked:
        rankings = [Ranking(who, best) for who, value in labels if (best := _preferred(value, names)) is not None]
    if not rankings:
        raise UserError(f"{where}: no ranking, and no answer that names one of the fields {', '.join(names)}")
    yield from _ranked(prompt, completions, rankings, where, line, options)


def _argilla_fields(record: Record) -> Record:
    """The fields of a flattened record: all that is not an answer, a suggestion or Argilla's own."""
    own = ("id", "status", "_server_id", "external_id", "metadata", "vectors", "inserted_at", "updated_at")
    return {
        key: value
        for key, value in record.items()
        if key not in own and not re.search(r"[.-](responses|suggestion)\b", key) and not _is_answer_list(value)
    }


def _by_field(ranks: Mapping[str, float], names: Sequence[str], where: str) -> tuple[Rank, ...]:
    found: dict[str, float] = {}
    for name, rank in ranks.items():
        known = _field_named(name, names)
        if known is None:
            raise UserError(f"{where}: {name!r} is ranked, but no such completion is there: {', '.join(names)}")
        found[known] = rank
    return tuple(found.get(name) for name in names)


def _preferred(value: Any, names: Sequence[str]) -> tuple[Rank, ...] | None:
    """Ranks that "this one is best" (or a tie) stands for; None if `value` is no such answer."""
    if _letters(value) in TIES:
        return (1.0,) * len(names)
    known = _field_named(value, names)
    if known is None and len(names) == 2 and _letters(value) in LEFT_RIGHT:
        known = names[LEFT_RIGHT.index(_letters(value))]
    return None if known is None else tuple(1.0 if name == known else 2.0 for name in names)


# Label Studio


def _labeller_of(annotation: Record) -> str:
    who = annotation.get("completed_by", "unnamed")
    if isinstance(who, dict):
        who = next((who[key] for key in ("email", "username", "id") if who.get(key)), "unnamed")
    return str(who)


def _label_studio(record: Record, where: str, line: int, options: Options) -> Iterator[Item]:
    done = [a for a in record["annotations"] if isinstance(a, dict) and not a.get("was_cancelled") and a.get("result")]
    if not done:
        return
    prompt, completions = _split(record["data"], [], where, options)
    names = list(completions)
    rankings = [Ranking(_labeller_of(a), _label_studio_ranks(a["result"], names, where)) for a in done]
    yield from _ranked(prompt, completions, rankings, where, line, options)


def _ranked_bucket(order: Any, where: str) -> Any:
    """The list of a Ranker that is in order: without buckets the only one, else the one bucket that holds anything.

    "_" is the pool from which items are moved into buckets; what is left there nobody ranked.
    """
    if not isinstance(order, dict) or len(order) == 1:
        return next(iter(order.values())) if isinstance(order, dict) else order
    filled = {name: items for name, items in order.items() if items and name != "_"}
    if len(filled) != 1:
        found = ", ".join(filled) or "none"
        raise UserError(f"{where}: a Ranker of several buckets, filled: {found}; a ranking is one bucket in order")
    return next(iter(filled.values()))


def _label_studio_ranks(results: Sequence[Any], names: Sequence[str], where: str) -> tuple[Rank, ...]:
    ratings: dict[str, float] = {}
    for result in results:
        kind, value = result.get("type"), result.get("value") or {}
        if kind == "pairwise" and len(names) == 2:
            selected = value.get("selected")
            if selected in LEFT_RIGHT:
                return (1.0, 2.0) if selected == "left" else (2.0, 1.0)
            return (1.0, 1.0)  # neither side selected
        if kind == "ranker":
            ranks = _ranks_by_name(_ranked_bucket(value.get("ranker"), where))
            if ranks is not None:
                return _by_field(ranks, names, where)
        if kind == "choices" and len(value.get("choices", [])) == 1:
            preferred = _preferred(value["choices"][0], names)
            if preferred is not None:
                return preferred
        if kind == "rating":
            known = _field_named(result.get("to_name"), names)
            if known is not None:
                ratings[known] = -float(value["rating"])
    if len(ratings) < 2:
        raise UserError(
            f"{where}: no Pairwise, Ranker, Rating or Choices result that compares {' and '.join(names)}; "
            f"--columns completions=A,B says which fields are compared, in the order shown"
        )
    return tuple(ratings.get(name) for name in names)


EXPORTS = (
    Format("argilla", "an Argilla export: JSON of its records, or as a data set", _is_argilla, _argilla),
    Format(
        "labelstudio",
        "a Label Studio JSON export of Pairwise, Ranker, Rating or Choices results",
        lambda record: isinstance(record.get("data"), dict) and isinstance(record.get("annotations"), list),
        _label_studio,
    ),
)
