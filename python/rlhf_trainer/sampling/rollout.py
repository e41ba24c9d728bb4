"""Rollouts: sample a response for every prompt with the policy's own distribution, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_kernels import sample_tokens
from rlhf_trainer.base.distributed import distributed_context
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.encoding import completion_text, continue_text, encode_text, end_ids, padding_id
from rlhf_trainer.data.rows import encode_prompt, left_pad
from rlhf_trainer.models import seq2seq
from rlhf_trainer.models.decoding import IncrementalDecoder, decoder_for
from rlhf_trainer.models.loading import context_length
from rlhf_trainer.models.sharding import LockstepForward, all_weights_gathered
from rlhf_trainer.sampling.agreement import check_rollout


@dataclass
class Rollout:
    """B prompts, left-padded to P tokens, and their responses, right-padded to R tokens."""

    ids: Tensor  # [B, P + R] int64
    mask: Tensor  # [B, P + R] bool, true at real tokens
    prompt_length: int  # P
    ended: Tensor  # [B] bool, true where EOS or a stop token was sampled
    prompts: list[str]
    completions: list[str]  # text of the responses, without EOS and stop token

    def token_rows(self, rows: slice) -> list[tuple[list[int], list[int]]]:
        """(prompt's ids, response's ids) of some rows, without padding and the token that ended the response."""
        found, start = [], self.prompt_length
        some = self.ids[rows].cpu(), self.mask[rows].cpu(), self.ended[rows].tolist()
        for ids, real, ended in zip(*some, strict=True):
            prompt, response = ids[:start][real[:start]].tolist(), ids[start:][real[start:]].tolist()
            found.append((prompt, response[:-1] if ended else response))
        return found

    @property
    def responses(self) -> Tensor:
        """[B, R] ids of the sampled tokens."""
        return self.ids[:, self.prompt_length :]

    @property
    def response_mask(self) -> Tensor:
        """[B, R] bool, true at sampled tokens, EOS included. By length: PAD may be any id."""
        return self.mask[:, self.prompt_length :]


def encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Ids of every prompt. UserError for none at all, or one that is empty or leaves no room for the response."""
    if not prompts:
        raise UserError("no prompts were given; at least one is needed")
    limit = context_length(model)
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        row = encode_prompt(tokenizer, prompt)
        if not prompt.strip() or not row:
            raise UserError(f"prompt {number} of {len(prompts)} is empty; every prompt needs at least one character")
        longest = max(len(row) + 1, max_new_tokens) if seq2seq.is_encoder_decoder(model) else len(row) + max_new_tokens
        if limit is not None and longest > limit:
            raise UserError(
                f"prompt {number} of {len(prompts)} has {len(row)} tokens; with --max_new_tokens {max_new_tokens} "
                f"that is longer than the model's context of {limit}: {prompt[:60]!r}"
            )
        rows.append(row)
    return rows


def sample(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of logits [B, V] from softmax(logits / temperature), by uniform [B], and its logprob.

    No top-k, no top-p. The logprob tells of logits that are no distribution: NaN. Training takes none from here: its
    old logprobs come from its own forward pass, so that the first ratio is 1 to the bit.
    """
    return sample_tokens(logits, temperature=temperature, uniform=uniform)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    stop_token: str | None = None,
    batch_size: int | None = None,
    group_size: int = 1,
    gather: bool = True,
) -> Rollout:
    """Sample responses of at most `max_new_tokens` tokens, each ending at one of `stop_ids`, with a KV cache.

    With `batch_size` that many at a time, prompts of similar length together; the result is in the order of `prompts`.
    All random numbers are drawn at the beginning, one for each row and step: a row's tokens depend on no other row.
    Of several ranks each samples its share of the rows (groups of `group_size` are never split) and receives all rows.
    gather: a policy sharded over the ranks is gathered as a whole for the sampling, else layer by layer.
    """
    device = next(model.parameters()).device
    shape = (max_new_tokens, len(prompts))
    uniform = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
    encoded = encode_prompts(model, tokenizer, prompts, max_new_tokens)
    stops = stop_ids(model, tokenizer, stop_token)
    longest, pad_id = max(map(len, encoded)), padding_id(tokenizer)
    check_rollout(model, encoded, pad_id, max_new_tokens)
    ids = torch.full((len(prompts), longest + max_new_tokens), pad_id, device=device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    shard = distributed_context().contiguous_shard(len(prompts), group_size)
    one = ids[:1, :1], torch.ones(1, 1, dtype=torch.bool, device=device)
    lockstep = LockstepForward(model, lambda: IncrementalDecoder(model, *one).next_logits(*one), gather)
    with all_weights_gathered(model, gather):
        for part in batches_by_length(encoded[shard], batch_size):
            rows = [shard.start + row for row in part]
            padded, real = left_pad([encoded[row] for row in rows], pad_id)
            place = slice(longest - padded.shape[1], None)
            ids[rows, place], mask[rows, place], ended[rows] = decode_batch(
                model,
                padded.to(device),
                real.to(device),
                uniform[:, rows],
                ends=torch.tensor(stops, device=device),
                pad_id=pad_id,
                temperature=temperature,
                prompts=[prompts[row] for row in rows],
                lockstep=lockstep,
            )
        lockstep.drain()
    ids, mask, ended = (
        distributed_context().all_gather_rows(shard, x[shard], len(prompts)) for x in (ids, mask, ended)
    )
    length = longest + int(mask[:, longest:].sum(-1).max())
    ids, mask = ids[:, :length].contiguous(), mask[:, :length].contiguous()
    return Rollout(ids, mask, longest, ended, list(prompts), decode(tokenizer, ids, mask, longest, stops))


def check_logprobs(logprobs: Tensor, prompts: Sequence[str], running: Tensor) -> None:
    """UserError where the logprob of a running row's token is NaN."""
    bad = logprobs.isnan()
    if bool(bad.any()):
        prompt = prompts[int(running[bad][0])]
        raise UserError(f"the policy's logits are not finite after prompt {prompt[:60]!r}: its weights diverged")


def batches_by_length(encoded: Sequence[Sequence[int]], size: int | None) -> list[list[int]]:
    """Row numbers in batches of at most `size`; if there are several batches, rows of similar length come together."""
    order = list(range(len(encoded)))
    if size is None or size >= len(order):
        return [order]
    order.sort(key=lambda row: len(encoded[row]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def decode_batch(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    uniform: Tensor,
    *,
    ends: Tensor,
    pad_id: int,
    temperature: float,
    prompts: Sequence[str],
    lockstep: LockstepForward,
) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded prompts ids, mask [B, P], uniform [T, B] -> ids, mask [B, P + T], ended [B].

    Once half of the running rows have ended, they leave the batch; each such copy of the cache halves it.
    """
    (count, prompt_length), longest = ids.shape, len(uniform)
    decoder = decoder_for(model, ids, mask)
    ids, mask = pad(ids, (0, longest), value=pad_id), pad(mask, (0, longest))
    ended = torch.zeros(count, dtype=torch.bool, device=ids.device)
    running = torch.arange(count, device=ids.device)
    for step, end in enumerate(range(prompt_length, prompt_length + longest)):
        logits = lockstep.run(partial(decoder.next_logits, ids[running, :end], mask[running, :end]))
        token, logprob = sample(logits, temperature, uniform[step, running])
        check_logprobs(logprob, prompts, running)
        going = ~ended[running]
        ids[running, end] = torch.where(going, token, pad_id)
        mask[running, end] = going
        going = going & ~torch.isin(token, ends)
        ended[running] = ~going
        left = going.nonzero().squeeze(-1)
        if not len(left):
            break
        if len(left) <= len(running) // 2:
            decoder.select_rows(left)
            running = running[left]
    return ids, mask, ended


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token: str | None) -> list[int]:
    """The ids that end a response: every EOS that tokenizer, model and generation config name, and the stop token."""
    return [*end_ids(tokenizer, model), *([] if stop_token is None else [stop_token_id(tokenizer, stop_token)])]


def stop_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a stop token; UserError unless the text is exactly one token."""
    # In the middle of a text, as it is written: a tokenizer may begin a text with a token of its own.
    _, ids = continue_text(tokenizer, "a", encode_text(tokenizer, "a"), text)
    if len(ids) != 1:
        ids = encode_text(tokenizer, text)
    if len(ids) != 1:
        raise UserError(f"--stop_token {text!r} is {len(ids)} tokens of this tokenizer; it must be exactly one")
    return ids[0]


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor, prompt_length: int, stops: list[int]
) -> list[str]:
    """The text that every response adds to its prompt, without EOS, PAD and stop tokens: all else was written."""
    dropped = {*stops, tokenizer.pad_token_id}
    texts: list[str] = []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        halves = zip(row, real, strict=True)
        tokens = [(place, token) for place, (token, counted) in enumerate(halves) if counted]
        prompt = [token for place, token in tokens if place < prompt_length]
        response = [token for place, token in tokens if place >= prompt_length]
        texts.append(completion_text(tokenizer, prompt, response, dropped))
    return texts
