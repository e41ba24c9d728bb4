"""Text <-> token ids, the same in every stage: the tokens of an example decode to the text that was written.

Prompt and completion meet between two tokens. The prompt's tokens are those of the prompt alone, which a rollout starts
from as well; the completion's continue them, so that the decoded whole is prompt + completion. Where a tokenizer cannot
write that, the token that crosses the border, and all after it, belong to the completion.

The name of a special token is control where a template or a prepared string wrote it, and text in a message's content
or in an answer (`Text`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, SupportsIndex
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", "a", "0", ".")  # what may stand before a text to keep a tokenizer from beginning it as a new one


class Text(str):
    """Text with spans (start, end) in which the names of special tokens are text; elsewhere they are control."""

    plain: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, plain: Sequence[tuple[int, int]] = ()) -> Text:
        made = super().__new__(cls, text)
        made.plain = tuple(plain)
        return made

    def __add__(self, other: str) -> Text:
        shifted = [(start + len(self), end + len(self)) for start, end in getattr(other, "plain", ())]
        return Text(str(self) + str(other), [*self.plain, *shifted])

    def part(self, start: int, end: SupportsIndex | None = None) -> Text:
        """The text from `start` to `end`, neither negative, with its spans."""
        text = str(self)[start:end]
        moved = [(max(low - start, 0), min(high - start, len(text))) for low, high in self.plain]
        return Text(text, [(low, high) for low, high in moved if low < high])

    def without_suffix(self, suffix: str) -> Text:
        """Without the control token `suffix` and the white space after it, if it ends so."""
        end = len(self.rstrip())
        start = end - len(suffix)
        if not self.rstrip().endswith(suffix) or any(low < end and high > start for low, high in self.plain):
            return self
        return self.part(0, start)


def plain_text(text: str) -> Text:
    """Text without control: a message's content, or what somebody answered."""
    return Text(text, [(0, len(text))])


@dataclass(frozen=True)
class _Conventions:
    """What a tokenizer puts around a text by itself; the names of its special tokens (None: there are none) and ids."""

    prefix: list[int]
    suffix: list[int]
    special: re.Pattern[str] | None
    special_ids: frozenset[int]


_KNOWN: WeakKeyDictionary[Any, tuple[Any, _Conventions]] = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches the names of the special tokens, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {token.content for token in added.values() if token.special} - {""}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def _affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer's own post-processing puts before and after a text."""
    for probe in ("a", "0", ".", "\n"):  # the first that it has a token for
        inner, whole = tokenizer(probe, add_special_tokens=False)["input_ids"], tokenizer(probe)["input_ids"]
        for start in range(len(whole)) if inner else ():
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
    return [], []


def _conventions(tokenizer: PreTrainedTokenizerBase) -> _Conventions:
    names = ("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id")
    state = (len(tokenizer), *(getattr(tokenizer, name, None) for name in names))
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
        made = _Conventions(*_affixes(tokenizer), special_tokens(tokenizer), frozenset(ids))
        _KNOWN[tokenizer] = known = (state, made)
    return known[1]


def _parts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, bool]]:
    """The text in parts; True where the names of special tokens in it are text, else they are control."""
    pattern, plain = _conventions(tokenizer).special, getattr(text, "plain", ())
    found = list(pattern.finditer(text)) if pattern is not None and plain else []
    written = [m for m in found if any(low < m.end() and high > m.start() for low, high in plain)]
    if not written:
        return [(str(text), False)]
    control = [m.span() for m in found if m not in written]
    parts: list[tuple[str, bool]] = []
    borders = [0, *(place for span in control for place in span), len(text)]
    for start, end in pairwise(borders):
        is_plain = any(start <= m.start() < end for m in written)
        if is_plain:
            inside = [m.start() + 1 for m in written if start <= m.start() < end]
            parts += [(part, True) for part in _without_names(tokenizer, str(text), start, end, inside)]
        elif start < end and parts and not parts[-1][1]:
            parts[-1] = (parts[-1][0] + str(text)[start:end], False)
        elif start < end:
            parts.append((str(text)[start:end], False))
    return parts


def _without_names(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, inside: Sequence[int]
) -> list[str]:
    """text[start:end], in one piece if the tokenizer then writes no special token; else cut at the places `inside`.

    A Unigram vocabulary holds the names of special tokens as ordinary pieces, the likeliest of all.
    """
    if _conventions(tokenizer).special_ids.isdisjoint(_ids(tokenizer, text[start:end], plain=True)):
        return [text[start:end]]
    return [text[low:high] for low, high in pairwise([start, *inside, end])]


def holds_control(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a prepared string names special tokens; a template's own are expected, and not counted."""
    pattern = _conventions(tokenizer).special
    return pattern is not None and not isinstance(text, Text) and pattern.search(text) is not None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool) -> list[int]:
    options = {"split_special_tokens": True} if plain else {}
    ids: list[int] = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids, special tokens by their names."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, with nothing before or after it."""
    ids: list[int] = []
    done = ""
    for part, plain in _parts(tokenizer, text):
        if not done:
            ids = _ids(tokenizer, part, plain)
        else:
            wanted = decode(tokenizer, ids) + part
            ids = ids + _following(tokenizer, ids, part, plain=plain, after=done[-1], wanted=wanted)[0]
        done += part
    return ids


def _candidates(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool, after: str) -> Iterator[list[int]]:
    """Ways to write a text in the middle of another, `after` its last character."""
    yield _ids(tokenizer, text, plain)
    for anchor in dict.fromkeys([after, *ANCHORS]):
        start, both = _ids(tokenizer, anchor, True), _ids(tokenizer, anchor + text, plain)
        if start and both[: len(start)] == start:
            yield both[len(start) :]


def _following(
    tokenizer: PreTrainedTokenizerBase, head: list[int], text: str, *, plain: bool, after: str, wanted: str
) -> tuple[list[int], bool]:
    """(ids of `text` after `head`, whether both decode to `wanted`); if none do, the ids of the text alone."""
    for ids in _candidates(tokenizer, text, plain, after):
        if ids and decode(tokenizer, head + ids) == wanted:  # none: an unknown word took the text in
            return ids, True
    return _ids(tokenizer, text, plain), False


def continue_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, head: list[int], completion: str
) -> tuple[int, list[int]]:
    """(how many of the prompt's ids `head` stay, the ids that follow them for `completion`).

    All stay, except where no tokens of the completion's own decode to prompt + completion.
    """
    whole_text = Text(prompt, getattr(prompt, "plain", ())) + completion
    parts = _parts(tokenizer, whole_text)
    if len(parts) == 1:  # one call writes the whole as the tokenizer itself does
        whole = _ids(tokenizer, *parts[0])
        if whole[: len(head)] == head and (len(whole) > len(head) or not completion):
            return len(head), whole[len(head) :]
        wanted = decode(tokenizer, whole)
        after = str(prompt)[-1:] or ANCHORS[0]
        ids, found = _following(tokenizer, head, completion, plain=parts[0][1], after=after, wanted=wanted)
        same = next(
            (i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole))
        )
        if found or same == len(whole):  # an unknown word took the completion in
            return len(head), ids
        return same, whole[same:]
    ids, done = [], str(prompt)
    for part, plain in _parts(tokenizer, completion):
        before = head + ids
        wanted = decode(tokenizer, before) + part
        after = done[-1:] or ANCHORS[0]
        ids = ids + _following(tokenizer, before, part, plain=plain, after=after, wanted=wanted)[0]
        done += part
    return len(head), ids


def prompt_affixes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], list[int]]:
    """What the tokenizer begins a text of these ids with (BOS, if it uses one and the text has none), and what it puts
    after a text, without the EOS there: an answer follows."""
    conventions = _conventions(tokenizer)
    prefix, suffix = conventions.prefix, conventions.suffix
    if prefix and ids[: len(prefix)] == prefix:
        prefix = []
    return prefix, suffix[:-1] if suffix[-1:] == [tokenizer.eos_token_id] else suffix


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> list[int]:
    """Every token that ends an answer: the tokenizer's EOS, the model's, and those of its generation config."""
    found = [tokenizer.eos_token_id]
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        found += eos if isinstance(eos, list) else [eos]
    return list(dict.fromkeys(token for token in found if token is not None))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are filled up with. Which id it is does not matter, for masks go by length."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def close(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: Collection[int], always_eos: bool) -> list[int]:
    """A completion's ids up to the one of `ends` that closes it; EOS is appended where it has none.

    What stands after a closing token without being text (a template's line end) is left out: no rollout goes so far.
    always_eos: the closing token is replaced by EOS, as a reward model reads every answer.
    """
    last = None
    for place in reversed([i for i, token in enumerate(ids) if token in ends]):
        rest = tokenizer.decode(ids[place + 1 :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if str(rest).strip():
            break
        last = place
    if last is None:
        return [*ids, tokenizer.eos_token_id]
    return [*ids[:last], tokenizer.eos_token_id if always_eos else ids[last]]


def completion_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int], dropped: Collection[int]
) -> str:
    """The text that ids add to their prompt's: decode(all) minus decode(prompt), without the tokens `dropped`."""
    kept = [token for token in ids if token not in dropped]
    before, whole = decode(tokenizer, prompt), decode(tokenizer, [*prompt, *kept])
    # The first token may change how the prompt's last one reads, such as the bytes of one character.
    return whole[len(before) :] if whole.startswith(before) else decode(tokenizer, kept)
