"""Chats -> text by the tokenizer's template: its control tokens are control, those that a message names are text."""

from __future__ import annotations

import re
from itertools import count
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.encoding import Text, special_tokens

Messages = list[dict[str, Any]]
PRIVATE = 0xF0000  # the first of the code points that mean nothing to anybody


def _hide_names(messages: Messages, names: re.Pattern[str] | None) -> tuple[Messages, dict[str, str]]:
    """The messages with a private character for each special token that they name, and what each stands for.

    So the template cannot take them for its own, and they are found again in what it writes.
    """
    hidden: dict[str, str] = {}
    if names is None or not any(names.search(str(message["content"])) for message in messages):
        return messages, hidden
    used = {character for message in messages for character in str(message["content"])}
    free = (chr(code) for code in count(PRIVATE) if chr(code) not in used)
    stands_for: dict[str, str] = {}

    def hide(found: re.Match[str]) -> str:
        name = found.group()
        if name not in stands_for:
            stands_for[name] = next(free)
            hidden[stands_for[name]] = name
        return stands_for[name]

    return [message | {"content": names.sub(hide, message["content"])} for message in messages], hidden


def _show_names(text: str, hidden: dict[str, str]) -> Text:
    """The text with the names in place of the private characters, marked as text."""
    made = Text("")
    for piece in re.split(f"([{''.join(hidden)}])", text) if hidden else [text]:
        name = hidden.get(piece)
        made += piece if name is None else Text(name, [(0, len(name))])
    return made


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase | None, where: str, answer: bool) -> Text:
    """Text of a chat by the tokenizer's template; with `answer`, up to where the assistant begins to speak."""
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(f"{where}: chat messages need a tokenizer with a chat template, and this one has none")
    shown, hidden = _hide_names(messages, special_tokens(tokenizer))
    try:
        text = str(tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=answer))
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template is the user's program
        raise UserError(f"{where}: the tokenizer's chat template failed: {error}") from None
    return _show_names(text, hidden)


def render_prompt(messages: Messages, tokenizer: PreTrainedTokenizerBase | None, where: str) -> Text:
    """Text of a chat up to where the assistant begins to speak."""
    return render(messages, tokenizer, where, answer=True)


def render_turn(
    messages: Messages, end: int, tokenizer: PreTrainedTokenizerBase | None, where: str
) -> tuple[Text, Text]:
    """Message `end` as (prompt, completion), without the EOS that training and scoring append themselves."""
    prompt = render(messages[:end], tokenizer, where, answer=True)
    whole = render(messages[: end + 1], tokenizer, where, answer=False)
    if not whole.startswith(prompt):
        raise UserError(f"{where}: with this chat template an answer does not continue its prompt")
    completion, eos = whole.part(len(prompt)), tokenizer.eos_token if tokenizer else None
    return prompt, completion.without_suffix(str(eos)) if eos else completion


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token, if any, that the chat template writes after an answer."""
    if not tokenizer.chat_template:
        return []
    probe = "an answer"
    asked = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": probe}]
    try:
        text = render(asked, tokenizer, "", answer=False)
    except UserError:  # such as a template that wants a system message
        return []
    names = special_tokens(tokenizer)
    found = names.search(text, text.rfind(probe)) if names is not None else None
    return [] if found is None else [tokenizer.get_vocab()[found.group()]]
