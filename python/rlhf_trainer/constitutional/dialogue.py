"""The requests of `rlhf cai` to a model, as a chat or as text to continue: to answer, to criticise, to revise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.chats import render_prompt
from rlhf_trainer.data.encoding import plain_text
from rlhf_trainer.data.records import shown_prompt
from rlhf_trainer.data.stages import prompt_records
from rlhf_trainer.judging.judges import EXAMPLE_SEPARATOR
from rlhf_trainer.judging.shots import Rule, WorkedExample

Messages = list[dict[str, str]]
Request = str | Messages  # text to continue, or a chat to answer
HEADINGS = ("Prompt", "Answer", "Critique request", "Critique", "Revision request", "Revision")
STOPS = ("\n\n---", *(f"\n{heading}:" for heading in HEADINGS))  # where a base model begins something else
ONLY = "Write the new answer alone, without a word about the changes."


@dataclass(frozen=True)
class Prompt:
    """data: as the training data has it, text or chat messages; messages: as a chat; shown: as a person reads it."""

    data: Request
    messages: Messages
    shown: str

    def example(self, completion: str) -> dict[str, object]:
        """A line of SFT data."""
        if isinstance(self.data, str):
            return {"prompt": self.data, "completion": completion}
        return {"messages": [*self.data, {"role": "assistant", "content": completion}]}

    def pair(self, chosen: str, rejected: str) -> dict[str, object]:
        """A line of preference data."""
        if isinstance(self.data, str):
            return {"prompt": self.data, "chosen": chosen, "rejected": rejected}
        sides = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        return {"prompt": self.data, **dict(zip(("chosen", "rejected"), sides, strict=True))}


def make_prompt(record: Request, tokenizer: PreTrainedTokenizerBase | None, chat: bool, where: str) -> Prompt:
    """tokenizer: its chat template writes chats as text; None: they stay chats, for a server."""
    messages = [{"role": "user", "content": record}] if isinstance(record, str) else record
    data: Request = record
    if tokenizer is not None and (chat or not isinstance(record, str)):
        data = render_prompt(messages, tokenizer, where)
    elif not chat and not isinstance(record, str):
        raise UserError(f"{where}: chat messages cannot be sent as plain text; use --format chat")
    return Prompt(data, messages, shown_prompt(messages))


def read_dialogues(
    path: str, given: Sequence[Request] | None, tokenizer: PreTrainedTokenizerBase | None, chat: bool
) -> list[Prompt]:
    """The prompts given, or those of a file as `rlhf generate` reads it, for a chat or as plain text."""
    if given is not None:
        return [make_prompt(record, tokenizer, chat, f"prompt {i}") for i, record in enumerate(given, start=1)]
    found = [make_prompt(record, tokenizer, chat, where) for where, record in prompt_records(path)]
    if not found:
        raise UserError(f"{path}: no prompt in it")
    return found


def opening(prompt: Prompt, chat: bool) -> Request:
    """The request for the first answer: exactly what the trained policy will read."""
    return prompt.messages if chat else prompt.data


def critique_request(prompt: Prompt, answer: str, rule: Rule, chat: bool, shots: Sequence[WorkedExample]) -> Request:
    if chat:
        return [*_talk(prompt, answer, shots), _user(rule.critique)]
    parts = {"Prompt": prompt.shown, "Answer": answer, "Critique request": rule.critique}
    return _written(shots, {**parts, "Critique": ""})


def revision_request(
    prompt: Prompt, answer: str, rule: Rule, critique: str, chat: bool, shots: Sequence[WorkedExample]
) -> Request:
    if chat:
        asked = [_user(rule.critique), _assistant(critique), _user(f"{rule.revision} {ONLY}")]
        return [*_talk(prompt, answer, shots), *asked]
    parts = {"Prompt": prompt.shown, "Answer": answer, "Critique request": rule.critique, "Critique": critique}
    return _written(shots, {**parts, "Revision request": rule.revision, "Revision": ""})


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _talk(prompt: Prompt, answer: str, shots: Sequence[WorkedExample]) -> Messages:
    """The chat up to its answer, after the worked examples, which come after a system message."""
    system = sum(1 for message in prompt.messages if message["role"] == "system")
    examples: Messages = []
    for shot in shots:
        examples += [_user(shot.prompt), _assistant(shot.answer), _user(shot.rule.critique), _assistant(shot.critique)]
        examples += [_user(f"{shot.rule.revision} {ONLY}"), _assistant(shot.revision)]
    return [*prompt.messages[:system], *examples, *prompt.messages[system:], _assistant(answer)]


def _written(shots: Sequence[WorkedExample], parts: dict[str, str]) -> str:
    """Headings and texts, after the worked examples; the last one is left open. No special token in it is control."""
    texts = []
    for shot in shots:
        requests = (shot.rule.critique, shot.critique, shot.rule.revision, shot.revision)
        texts.append(_section(dict(zip(HEADINGS, (shot.prompt, shot.answer, *requests), strict=True))))
    return plain_text(EXAMPLE_SEPARATOR.join([*texts, _section(parts)]))


def _section(parts: dict[str, str]) -> str:
    return "\n\n".join(f"{heading}: {text.strip()}".strip() for heading, text in parts.items())
