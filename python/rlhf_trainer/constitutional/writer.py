"""The model that writes for `rlhf cai`, in this process or behind a server, and the options its commands share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.config import option, refuse_overwriting, require
from rlhf_trainer.base.distributed import resolve_device
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.writing import write_text
from rlhf_trainer.constitutional.constitution import Constitution, load_constitution
from rlhf_trainer.constitutional.dialogue import Prompt, Request, read_dialogues
from rlhf_trainer.data.chats import render_prompt
from rlhf_trainer.judging.client import ServerClient, TooLongError
from rlhf_trainer.judging.shots import Rule, WorkedExample
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.sampling.options import Sampling, SamplingConfig
from rlhf_trainer.sampling.rollout import encode_prompts, generate, stop_token_id


@dataclass
class CAIConfig(SamplingConfig):
    """Options that `rlhf cai revise` and `rlhf cai label` share."""

    model: str = option("", "folder or hub name of the model that writes, a causal or encoder-decoder one")
    server: str | None = option(
        None, "OpenAI-compatible server that writes in place of --model: http://127.0.0.1:8000/v1, or URL#MODEL"
    )
    constitution: str | None = option(None, "YAML file with the rules; none: the default, see rlhf cai constitution")
    rules: list[str] = option([], "names of the rules to use; none: all of them")
    principles: Literal["sample", "all"] = option(
        "sample", "rules for a prompt: drawn by their weights and the seed, or all of them"
    )
    format: Literal["auto", "chat", "plain"] = option(
        "auto", "talk by the tokenizer's chat template, or in plain text for a base model; auto: chat where it can"
    )
    shots: int = option(0, "worked examples of the constitution shown before each task; base models need them")
    batch_size: int = option(32, "texts written at once")
    timeout: float = option(120.0, "seconds to wait for a reply of the server")
    retries: int = option(3, "further tries when the server does not reply or is busy")
    parallel: int = option(8, "requests to the server at once")

    def validate(self, *given: str) -> None:
        """UserError for options that cannot work; `given`: names of what was passed as an object."""
        needed = ["prompts", *([] if self.server else ["model"])]
        require(self, *(name for name in needed if name not in given))
        self.validate_numbers()
        refuse_overwriting("output", self.output, self.prompts, self.constitution, getattr(self, "completions", None))
        for name, low in (("shots", 0), ("retries", 0), ("parallel", 1)):
            if getattr(self, name) < low:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {low}")
        if not self.timeout > 0:
            raise UserError(f"--timeout {self.timeout}: must be more than 0")

    def load_rules(self, constitution: Constitution | None) -> tuple[Constitution, tuple[WorkedExample, ...]]:
        """`choose_rules` with these options, from the constitution passed or the one that they name."""
        found = load_constitution(self.constitution) if constitution is None else constitution
        return choose_rules(found, self.rules, self.shots, begun=self.output if self.resume else "")

    def load_writer(self, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None) -> Writer:
        """The server's model, or the one passed, or the one of --model; and whether it is talked to in chats."""
        if self.server:
            server = ServerClient(self.server, timeout=self.timeout, retries=self.retries, parallel=self.parallel)
            return ServerWriter(server, self.format != "plain", self.sampling)
        if tokenizer is None:
            tokenizer = load_tokenizer(self.model, self.pad_token, self.trust_remote_code)
        chat = self.format == "chat" or (self.format == "auto" and bool(tokenizer.chat_template))
        if chat and not tokenizer.chat_template:
            raise UserError(f"--format chat: the tokenizer of {self.model} has no chat template")
        found: Any = model
        if model is None:
            found = load_causal(self.model, tokenizer, trust_remote_code=self.trust_remote_code)
        return LocalWriter(found.to(resolve_device(self.device)).eval(), tokenizer, chat, self.sampling)


@dataclass(frozen=True)
class Written:
    """text: with its white space; ended: whether it came to an end by itself; problem: why there is none, or ""."""

    text: str
    ended: bool = True
    problem: str = ""


class LocalWriter:
    """Writes with a model in this process; what follows `seed` is decided by its number."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool, sampling: Sampling
    ) -> None:
        self.model, self.tokenizer, self.chat, self.sampling = model, tokenizer, chat, sampling
        self.generator = torch.Generator(next(model.parameters()).device)
        if sampling.stop_token is not None:
            stop_token_id(tokenizer, sampling.stop_token)

    def seed(self, number: int) -> None:
        self.generator.manual_seed(number)

    def write(self, requests: Sequence[Request], stops: Sequence[str] = ()) -> list[Written]:
        """One text for each request, cut where one of `stops` begins."""
        texts = [r if isinstance(r, str) else render_prompt(r, self.tokenizer, "a prompt") for r in requests]
        found = [Written("", False, self._problem(text)) for text in texts]
        fitting = [i for i, written in enumerate(found) if not written.problem]
        if fitting:
            rollout = generate(
                self.model,
                self.tokenizer,
                [texts[i] for i in fitting],
                max_new_tokens=self.sampling.max_new_tokens,
                generator=self.generator,
                temperature=self.sampling.temperature,
                stop_token=self.sampling.stop_token,
            )
            for i, text, ended in zip(fitting, rollout.completions, rollout.ended.tolist(), strict=True):
                found[i] = truncate_at_stop(text, ended, stops)
        return found

    def _problem(self, text: str) -> str:
        try:
            encode_prompts(self.model, self.tokenizer, [text], self.sampling.max_new_tokens)
        except UserError:
            return "too long for the model's context"
        return ""


class ServerWriter:
    """Writes with a server's model; each request has a seed, which not every server respects."""

    def __init__(self, server: ServerClient, chat: bool, sampling: Sampling) -> None:
        self.server, self.chat, self.sampling = server, chat, sampling
        self.random = random.Random(sampling.seed)

    def seed(self, number: int) -> None:
        self.random.seed(number)

    def write(self, requests: Sequence[Request], stops: Sequence[str] = ()) -> list[Written]:
        seeds = [self.random.getrandbits(31) for _ in requests]

        def one(item: tuple[Request, int]) -> Written:
            request, seed = item
            options: dict[str, Any] = {
                "max_tokens": self.sampling.max_new_tokens,
                "temperature": self.sampling.temperature,
            }
            if stops and isinstance(request, str):
                options["stop"] = list(stops[:4])  # as many as these servers take
            try:
                choice = self.server.choice(request, **options, seed=seed)
            except TooLongError:
                return Written("", False, "too long for the model's context")
            return truncate_at_stop(choice["text"], choice.get("finish_reason") != "length", stops)

        return self.server.map(one, list(zip(requests, seeds, strict=True)))


Writer = LocalWriter | ServerWriter


def truncate_at_stop(text: str, ended: bool, stops: Sequence[str]) -> Written:
    """The text up to the first of the stops; a text that is cut there counts as ended."""
    place = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    return Written(text[:place], ended or place < len(text))


def choose_rules(
    constitution: Constitution, names: Sequence[str], shots: int, begun: str
) -> tuple[Constitution, tuple[WorkedExample, ...]]:
    """The constitution with the named rules alone, all without names, and its first `shots` worked examples.

    begun: the output of the run that is resumed, "" for a new run. Its constitution is kept beside that file.

    Raises:
        UserError: an unknown rule, too few examples, or another constitution than the resumed run was begun with.
    """
    if shots > len(constitution.shots):
        raise UserError(f"--shots {shots}: the constitution has {len(constitution.shots)} examples")
    kept = Path(begun).with_suffix(".constitution.yaml") if begun else None
    if kept is not None and kept.exists() and kept.read_text(encoding="utf-8") != constitution.text:
        raise UserError(f"--resume: {begun} was begun with the constitution in {kept}, which is another one")
    return constitution.only(names), constitution.shots[:shots]


def keep_rules(output: str, constitution: Constitution) -> None:
    """Copy the constitution's text beside the output, where `choose_rules` looks for it; nothing for output ""."""
    if output and constitution.text:  # rules made in Python have none
        path = Path(output).with_suffix(".constitution.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, constitution.text)


def rules_for(constitution: Constitution, principles: str, count: int, *key: int) -> list[Rule]:
    """The rules for one prompt: all of them for principles "all", else `count` drawn ones; `key` decides the draw."""
    return list(constitution.rules) if principles == "all" else constitution.draw(count, *key)


def read_requests(
    path: str, writer: Writer, prompts: Sequence[Request] | None, max_prompts: int | None
) -> list[Prompt]:
    """The first `max_prompts` of the prompts given, or of the file. UserError if the model cannot answer one."""
    own = writer.tokenizer if isinstance(writer, LocalWriter) else None
    read = read_dialogues(path, prompts, own, writer.chat)[:max_prompts]
    if isinstance(writer, LocalWriter):
        texts = [str(prompt.data) for prompt in read]
        encode_prompts(writer.model, writer.tokenizer, texts, writer.sampling.max_new_tokens)
    return read
