"""The options of every command that samples completions of prompts into a file: generate, bon and cai."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_trainer.base import shared
from rlhf_trainer.base.config import option
from rlhf_trainer.base.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: `n` of each prompt; the fields are explained at `SamplingConfig`."""

    n: int
    max_new_tokens: int
    temperature: float
    stop_token: str | None
    seed: int


@dataclass
class SamplingConfig:
    model: str = option("", "folder or hub name of the model that answers")
    prompts: str = shared.prompts()
    output: str = option("", "JSON-lines file to write; the options are kept beside it, in .config.yaml")
    n: int = shared.n(4)
    max_prompts: int | None = option(None, "how many prompts of the file are used, from its beginning; default all")
    max_new_tokens: int = option(128, "longest completion in tokens")
    temperature: float = option(1.0, "sampling temperature; there is no top-k and no top-p")
    stop_token: str | None = option(None, "a token that ends a completion as EOS does, such as a newline")
    batch_size: int = option(32, "completions sampled at once")
    seed: int = option(0, "seed of the sampling")
    resume: bool = option(False, "go on where an interrupted run with the same options stopped")
    device: str = shared.device()
    pad_token: str | None = shared.pad_token()
    trust_remote_code: bool = shared.trust_remote_code()

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.n, self.max_new_tokens, self.temperature, self.stop_token, self.seed)

    def validate_numbers(self) -> None:
        """UserError for a count below 1 or a temperature of 0 or less."""
        for name in ("n", "max_new_tokens", "batch_size", *(["max_prompts"] if self.max_prompts is not None else [])):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature}: must be more than 0")
