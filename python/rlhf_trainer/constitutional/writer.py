"""Who writes in `rlhf cai`, a model here or a server's, and the options that its commands share."""

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
from rlhf_trainer.constitutional.constitution import Constitution, load_constitution
from rlhf_trainer.constitutional.dialogue import Prompt, Request, read_dialogues
from rlhf_trainer.data.records import render_prompt
from rlhf_trainer.judging.client import ServerClient, TooLongError
from rlhf_trainer.judging.shots import Rule, WorkedExample
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.sampling.options import SamplingConfig, validate_numbers
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


@dataclass(frozen=True)
class Written:
    """text: with the white space that it came with; ended: by itself; problem: why nothing could be written, or ""."""

    text: str
    ended: bool = True
    problem: str = ""


class LocalWriter:
    """Writes with a model in this process; after `seed` all that follows depends on that number."""

    def __init__(self, cfg: CAIConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
        self.cfg, self.model, self.tokenizer, self.chat = cfg, model, tokenizer, chat
        self.generator = torch.Generator(next(model.parameters()).device)
        if cfg.stop_token is not None:
            stop_token_id(tokenizer, cfg.stop_token)

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
                max_new_tokens=self.cfg.max_new_tokens,
                generator=self.generator,
                temperature=self.cfg.temperature,
                stop_token=self.cfg.stop_token,
            )
            for i, text, ended in zip(fitting, rollout.completions, rollout.ended.tolist(), strict=True):
                found[i] = truncate_at_stop(text, ended, stops)
        return found

    def _problem(self, text: str) -> str:
        try:
            encode_prompts(self.model, self.tokenizer, [text], self.cfg.max_new_tokens)
        except UserError:
            return "too long for the model's context"
        return ""


class ServerWriter:
    """Writes with a server's model; `seed` seeds it, as far as the server heeds seeds."""

    def __init__(self, cfg: CAIConfig, server: ServerClient, chat: bool) -> None:
        self.cfg, self.server, self.chat = cfg, server, chat
        self.random = random.Random(cfg.seed)

    def seed(self, number: int) -> None:
        self.random.seed(number)

    def write(self, requests: Sequence[Request], stops: Sequence[str] = ()) -> list[Written]:
        seeds = [self.random.getrandbits(31) for _ in requests]

        def one(item: tuple[Request, int]) -> Written:
            request, seed = item
            options: dict[str, Any] = {"max_tokens": self.cfg.max_new_tokens, "temperature": self.cfg.temperature}
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
    """The text up to the first of the stops; what is cut there has ended."""
    place = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    return Written(text[:place], ended or place < len(text))


def validate(cfg: CAIConfig, *given: str) -> None:
    """UserError for options that cannot work; `given`: what is passed as an object."""
    needed = ["prompts", *([] if cfg.server else ["model"])]
    require(cfg, *(name for name in needed if name not in given))
    validate_numbers(cfg)
    refuse_overwriting("output", cfg.output, cfg.prompts, cfg.constitution, getattr(cfg, "completions", None))
    for name, low in (("shots", 0), ("retries", 0), ("parallel", 1)):
        if getattr(cfg, name) < low:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least {low}")
    if not cfg.timeout > 0:
        raise UserError(f"--timeout {cfg.timeout}: must be more than 0")


def load_rules(
    cfg: CAIConfig, constitution: Constitution | None = None
) -> tuple[Constitution, tuple[WorkedExample, ...]]:
    """The constitution with the rules that cfg names, and the worked examples to show.

    On --resume it must be the one that the run was begun with; that is kept beside the output.
    """
    found = load_constitution(cfg.constitution) if constitution is None else constitution
    if cfg.shots > len(found.shots):
        raise UserError(f"--shots {cfg.shots}: the constitution has {len(found.shots)} examples")
    kept = Path(cfg.output).with_suffix(".constitution.yaml") if cfg.output else None
    if kept is not None and cfg.resume and kept.exists() and kept.read_text(encoding="utf-8") != found.text:
        raise UserError(f"--resume: {cfg.output} was begun with the constitution in {kept}, which is another one")
    return found.only(cfg.rules), found.shots[: cfg.shots]


def keep_rules(cfg: CAIConfig, constitution: Constitution) -> None:
    if cfg.output and constitution.text:  # rules made in Python have none
        path = Path(cfg.output).with_suffix(".constitution.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(constitution.text, encoding="utf-8")


def rules_for(cfg: CAIConfig, constitution: Constitution, number: int, count: int) -> list[Rule]:
    """The rules of prompt `number`: `count` drawn ones, or all."""
    return list(constitution.rules) if cfg.principles == "all" else constitution.draw(count, cfg.seed, number)


def read_requests(cfg: CAIConfig, writer: Writer, prompts: Sequence[Request] | None) -> list[Prompt]:
    """The first cfg.max_prompts of the prompts given, or of cfg.prompts. UserError if the model cannot answer one."""
    own = writer.tokenizer if isinstance(writer, LocalWriter) else None
    read = read_dialogues(cfg.prompts, prompts, own, writer.chat)[: cfg.max_prompts]
    if isinstance(writer, LocalWriter):
        encode_prompts(writer.model, writer.tokenizer, [str(p.data) for p in read], cfg.max_new_tokens)
    return read


def load_writer(
    cfg: CAIConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Writer:
    """The server's model or cfg.model, and whether to talk to it in chats."""
    if cfg.server:
        server = ServerClient(cfg.server, timeout=cfg.timeout, retries=cfg.retries, parallel=cfg.parallel)
        return ServerWriter(cfg, server, cfg.format != "plain")
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg.model, cfg.pad_token, cfg.trust_remote_code)
    chat = cfg.format == "chat" or (cfg.format == "auto" and bool(tokenizer.chat_template))
    if chat and not tokenizer.chat_template:
        raise UserError(f"--format chat: the tokenizer of {cfg.model} has no chat template")
    found: Any = model
    if model is None:
        found = load_causal(cfg.model, tokenizer, trust_remote_code=cfg.trust_remote_code)
    return LocalWriter(cfg, found.to(resolve_device(cfg.device)).eval(), tokenizer, chat)
