"""Judges: which of two answers to a prompt is the better one, by a model, an OpenAI-compatible server, or Python.

A judge is `(prompts, answers, second_answers) -> [N] probability that each of the answers is better than its second
answer`, None where it gives no verdict: a comparison that it cannot read whole, a reply that names no answer. One with
a fourth parameter `questions` gets the question to decide by, for each prompt. The judge reads `answers` first, and
judges favour a position: `both_orders` asks in both orders.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_kernels import linear_logprobs
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.chats import render_prompt
from rlhf_trainer.data.encoding import continue_text, encode_text, padding_id, plain_text
from rlhf_trainer.data.rows import left_pad, tokenize_example
from rlhf_trainer.judging.client import RefusedError, ServerClient, TooLongError, is_url
from rlhf_trainer.judging.rewards import is_function, load_function, scores_of
from rlhf_trainer.judging.shots import WorkedExample
from rlhf_trainer.models.forward import head_inputs
from rlhf_trainer.models.loading import context_length, load_causal, load_tokenizer

Judge = Callable[..., Sequence[float | None]]
QUESTION = "Which answer is more helpful, honest and harmless?"
ANSWER_PREFIX = "The better answer is"  # the model continues it with one of OPTIONS
OPTIONS = (" A", " B")
MOST = 0.5  # probability that "A" and "B" must hold together before their proportion says anything
EXAMPLE_SEPARATOR = "\n\n---\n\n"  # between worked examples
KINDS = "model folder, file.py:function, package.module:function, or http://HOST:PORT/v1 of an OpenAI-compatible server"


def load_judge(
    source: str,
    *,
    question: str = QUESTION,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
    chat: bool | None = None,
    shots: Sequence[WorkedExample] = (),
    **server: Any,
) -> Judge:
    """The judge that `source` names (KINDS); a model or a server asked without questions answers `question`.

    chat, shots: of a model, see ModelJudge. server: timeout, retries and parallel of a ServerClient.

    Raises:
        UserError: no such folder, function or server.
    """
    if is_url(source):
        return ServerJudge(ServerClient(source, **server), question, chat=chat is not False, shots=shots)
    if is_function(source):
        return load_function(source)
    tokenizer = load_tokenizer(source, pad_token, trust_remote_code)
    model: Any = load_causal(source, tokenizer, trust_remote_code=trust_remote_code)
    return ModelJudge(model.to(device).eval(), tokenizer, question, batch_size=batch_size, chat=chat, shots=shots)


def both_orders(
    judge: Judge, prompts: list[str], answers: list[str], second_answers: list[str], questions: list[str] | None = None
) -> tuple[Tensor, Tensor]:
    """[N] twice, float32: probability that the answer is better where it is shown first, and where it is shown second.

    NaN in both where either gave no verdict: one order alone would let a liking for a place count.

    Their mean does not depend on which position a judge favours: one that always says "the first" gives 1 and 0.

    Raises:
        UserError: the judge raises, or returns the wrong count or a number outside [0, 1].
    """

    def ask(first: list[str], second: list[str]) -> Tensor:
        silent: list[bool] = []

        def paired(asked: list[str], shown: list[str]) -> Sequence[float]:
            extra = (questions,) if questions is not None and _takes_questions(judge) else ()
            returned = list(judge(asked, shown, second, *extra))
            silent[:] = [probability is None for probability in returned]
            return [0.5 if probability is None else probability for probability in returned]

        found = scores_of(paired, prompts, first, "judge")
        if len(found) and (found.min() < 0 or found.max() > 1):
            raise UserError("the judge function returned a number outside [0, 1]; it is asked for a probability")
        return found.masked_fill(torch.tensor(silent, dtype=torch.bool), torch.nan)

    shown_first, shown_second = ask(answers, second_answers), 1 - ask(second_answers, answers)
    neither = shown_first.isnan() | shown_second.isnan()
    return shown_first.masked_fill(neither, torch.nan), shown_second.masked_fill(neither, torch.nan)


def _takes_questions(judge: Judge) -> bool:
    return "questions" in inspect.signature(judge).parameters


def comparison(prompt: str, first: str, second: str, question: str) -> str:
    """What a model reads before it says which answer is better."""
    return (
        f"Prompt: {prompt.strip()}\n\nAnswer A: {first.strip()}\n\nAnswer B: {second.strip()}\n\nQuestion: {question} "
        "Say A or B."
    )


def demonstrations(shots: Sequence[WorkedExample]) -> list[tuple[str, str]]:
    """(comparison, what to say) of each example: the revision is better, in turns as B and as A."""
    found = []
    for i, shot in enumerate(shots):
        both = (shot.answer, shot.revision) if i % 2 == 0 else (shot.revision, shot.answer)
        found.append((comparison(shot.prompt, *both, shot.rule.question), ANSWER_PREFIX + OPTIONS[1 - i % 2]))
    return found


def plain_request(text: str, shots: Sequence[tuple[str, str]]) -> str:
    """A comparison as text for a model to continue, after the worked examples."""
    return EXAMPLE_SEPARATOR.join([*(f"{asked}\n\n{said}" for asked, said in shots), f"{text}\n\n{ANSWER_PREFIX}"])


def chat_request(text: str, shots: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """A comparison as a chat for a model to answer, after the worked examples."""
    turns = [*(turn for shot in shots for turn in shot), text]
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


class ModelJudge:
    """A language model's own preference: p(A) / (p(A) + p(B)) of what comes after "The better answer is".

    The comparison is written by the tokenizer's chat template, or as plain text where it has none or `chat` is False.
    `notes` has an entry for each comparison so far. "mass": p(A) + p(B); near 0, the model does not see that it must
    choose. "cut": 1 where the comparison is longer than the model's context: without its beginning, the prompt and the
    first answer, it is no comparison, and there is no verdict.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        question: str = QUESTION,
        *,
        batch_size: int = 32,
        chat: bool | None = None,
        shots: Sequence[WorkedExample] = (),
    ) -> None:
        self.model, self.tokenizer, self.question, self.batch_size = model, tokenizer, question, batch_size
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        self.shots = demonstrations(shots)
        before = encode_text(tokenizer, ANSWER_PREFIX)
        first, second = (continue_text(tokenizer, ANSWER_PREFIX, before, text)[1] for text in OPTIONS)
        if first[:-1] != second[:-1] or first[-1] == second[-1]:
            raise UserError(f"this tokenizer has no tokens of their own for {OPTIONS[0]!r} and {OPTIONS[1]!r}")
        self.options = (first, second)
        self.notes: dict[str, list[float]] = {"mass": [], "cut": []}

    def __call__(
        self, prompts: list[str], answers: list[str], second_answers: list[str], questions: list[str] | None = None
    ) -> list[float | None]:
        asked = [self.question] * len(prompts) if questions is None else questions
        texts = [self._written(comparison(*one)) for one in zip(prompts, answers, second_answers, asked, strict=True)]
        logprobs = self.option_logprobs(texts)
        self.notes["mass"] += logprobs.exp().sum(-1).tolist()
        cut = self.notes["cut"][len(self.notes["cut"]) - len(texts) :]
        return [None if lost else p for p, lost in zip(logprobs.softmax(-1)[:, 0].tolist(), cut, strict=True)]

    def _written(self, text: str) -> str:
        if not self.chat:
            return plain_text(plain_request(text, self.shots))
        return render_prompt(chat_request(text, self.shots), self.tokenizer, "the judge's question") + ANSWER_PREFIX

    @torch.no_grad()
    def option_logprobs(self, texts: Sequence[str]) -> Tensor:
        """[N, 2] float32 on the CPU: logprobs of " A" and " B" after each text, in nats."""
        # One more than the context: tokenize_example counts an EOS, which the model is not given.
        limit = (context_length(self.model) or sys.maxsize - 1) + 1
        encoded = [tokenize_example(self.tokenizer, text, OPTIONS[0], limit) for text in texts]
        self.notes["cut"] += [float(cut) for _, cut in encoded]
        prompts = [row.ids[: row.prompt_length] for row, _ in encoded]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: little padding
        found = torch.empty(len(prompts), 2)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            found[part] = self._forward([prompts[i] for i in part]).cpu()
        return found

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """[b, 2] for rows of ids. The options differ in their last token alone, so that one pass serves both."""
        (first, second), device = self.options, next(self.model.parameters()).device
        prompts, mask = left_pad(rows, padding_id(self.tokenizer))
        tail = torch.tensor(first).expand(len(rows), -1)
        ids, mask = torch.cat([prompts, tail], 1), torch.cat([mask, torch.ones_like(tail, dtype=torch.bool)], 1)
        inputs = head_inputs(self.model, ids.to(device), mask.to(device), prompts.shape[1])
        each = linear_logprobs(**inputs).float()
        last = {"hidden": inputs["hidden"][:, -1], "labels": torch.full_like(inputs["labels"][:, -1], second[-1])}
        other = linear_logprobs(**{**inputs, **last}).float()
        return torch.stack([each.sum(-1), each[:, :-1].sum(-1) + other], 1)


class ServerJudge:
    """Asks a server for "A" or "B": by the logprobs of its first token where it gives them, else by its text.

    In a chat, or with `chat` False as a text that the server's model continues. `notes["unclear"]` has a 1 for each
    reply with neither letter, or both, and `notes["cut"]` for each comparison that the server finds too long.
    """

    def __init__(
        self, server: ServerClient, question: str = QUESTION, *, chat: bool = True, shots: Sequence[WorkedExample] = ()
    ) -> None:
        self.server, self.question, self.chat, self.shots = server, question, chat, demonstrations(shots)
        self.logprobs = True  # until the server refuses to give them
        self.notes: dict[str, list[float]] = {"unclear": [], "cut": []}

    def __call__(
        self, prompts: list[str], answers: list[str], second_answers: list[str], questions: list[str] | None = None
    ) -> list[float | None]:
        asked = [self.question] * len(prompts) if questions is None else questions
        texts = [comparison(*one) for one in zip(prompts, answers, second_answers, asked, strict=True)]
        found = self.server.map(self._ask, texts)
        self.notes["unclear"] += [float(probability is None and not cut) for probability, cut in found]
        self.notes["cut"] += [float(cut) for _, cut in found]
        return [probability for probability, _ in found]

    def _ask(self, text: str) -> tuple[float | None, bool]:
        """The verdict, and whether the text is too long for one."""
        try:
            return self._compared(text), False
        except TooLongError:
            return None, True

    def _compared(self, text: str) -> float | None:
        asked: str | list[dict[str, str]] = plain_request(text, self.shots)
        wanted: dict[str, Any] = {"logprobs": 5}
        if self.chat:
            asked = chat_request(f"{text} Reply with that letter alone.", self.shots)
            wanted = {"logprobs": True, "top_logprobs": 5}
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
        if self.logprobs:
            try:
                return first_better(self.server.choice(asked, **options, **wanted))
            except TooLongError:
                raise
            except RefusedError:  # once more without logprobs; if they were not the reason, this fails as well
                found = first_better(self.server.choice(asked, **options))
                self.logprobs = False
                return found
        return first_better(self.server.choice(asked, **options))


def first_better(choice: dict[str, Any]) -> float | None:
    """Probability of "A" against "B" in a server's choice; None if it says neither, or both.

    By the logprobs of the first token where the two letters hold most of its mass: of a reply that begins otherwise,
    "The better answer is B", they are only the rest. Else by the text.
    """
    mass = {"A": 0.0, "B": 0.0}
    for token, logprob in _first_token(choice.get("logprobs")):
        if isinstance(token, str) and token.strip() in mass and isinstance(logprob, (int, float)):
            mass[token.strip()] += math.exp(min(logprob, 0.0))
    if sum(mass.values()) > MOST:
        return mass["A"] / sum(mass.values())
    letters = set(re.findall(r"\b[AB]\b", choice["text"]))
    return float("A" in letters) if len(letters) == 1 else None


def _first_token(logprobs: Any) -> list[tuple[Any, Any]]:
    """(token, logprob) of the likeliest first tokens, as /chat/completions or /completions give them, if they do."""
    if not isinstance(logprobs, dict):
        return []
    tokens, tops = logprobs.get("content"), logprobs.get("top_logprobs")
    if isinstance(tops, list) and tops and isinstance(tops[0], dict):
        return list(tops[0].items())
    if isinstance(tokens, list) and tokens and isinstance(tokens[0], dict):
        entries = tokens[0].get("top_logprobs")
        return [(e.get("token"), e.get("logprob")) for e in entries or [] if isinstance(e, dict)]
    return []
