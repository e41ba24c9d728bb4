"""The rollout's forward is the training forward, of every architecture that samples; else a sentence."""

from __future__ import annotations

import pytest
import torch
from support.zoo import MODELS, zoo_model, zoo_tokenizer

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.models import checks
from rlhf_trainer.models.decoding import IncrementalDecoder
from rlhf_trainer.sampling import agreement, rollout
from rlhf_trainer.sampling.responses import token_outputs
from rlhf_trainer.sampling.rollout import generate

PROMPTS = ["a good day", "one two three red blue yes no thanks", "no"] * 2
REFUSED = ("recurrent_gemma", "rwkv", "xlnet")  # padding, or tokens that come later, change what they give
QUICK = ("llama", "gemma2", "openai-gpt", "bloom", "mamba", "falcon_mamba", "recurrent_gemma", "bart")


def sampled(model, tokenizer, monkeypatch):
    """(rollout, logprobs under which its tokens were drawn)."""
    steps = []
    monkeypatch.setattr(rollout, "check_logprobs", lambda logprobs, _, running: steps.append((running, logprobs)))
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=6, generator=torch.Generator().manual_seed(1))
    logprobs = torch.zeros(len(PROMPTS), len(steps))
    for step, (running, values) in enumerate(steps):
        logprobs[running, step] = values
    return found, logprobs.where(found.response_mask, 0)


def check_architecture(name, monkeypatch):
    tokenizer = zoo_tokenizer()
    model = zoo_model(name, tokenizer).eval()
    if name in REFUSED:
        with pytest.raises(UserError, match="sampled tokens differ from the training forward's"):
            sampled(model, tokenizer, monkeypatch)
        return
    found, logprobs = sampled(model, tokenizer, monkeypatch)
    with torch.no_grad():
        trained, _, _ = token_outputs(model, None, found, torch.arange(len(PROMPTS)), 1.0)
    assert found.response_mask.sum() > len(PROMPTS)
    torch.testing.assert_close(logprobs, trained, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", QUICK)
def test_sampled_from_what_is_trained(name, monkeypatch):
    check_architecture(name, monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(QUICK)))
def test_sampled_from_what_is_trained_elsewhere(name, monkeypatch):
    check_architecture(name, monkeypatch)


def test_a_model_without_cache_reads_all_tokens_again(monkeypatch):
    tokenizer = zoo_tokenizer()
    ids = torch.tensor([tokenizer("a good day")["input_ids"]])
    decoders = {name: IncrementalDecoder(zoo_model(name, tokenizer), ids, ids > 0) for name in ("openai-gpt", "mamba")}
    for decoder in decoders.values():
        decoder.next_logits(ids, ids > 0)
    assert {name: decoder.cached for name, decoder in decoders.items()} == {"openai-gpt": False, "mamba": True}


class ForgetsItsCache(IncrementalDecoder):
    """What a keyword that `**kwargs` swallows makes of a rollout."""

    def next_logits(self, ids, mask):
        return super().next_logits(ids, mask) if self.cached is None else self.model(ids[:, -1:]).logits[:, -1]


class DoesNotSelect(IncrementalDecoder):
    def select_rows(self, rows):
        pass


@pytest.mark.parametrize("decoder", [ForgetsItsCache, DoesNotSelect])
def test_a_faulty_cache_is_found_before_the_rollout(decoder, monkeypatch):
    tokenizer = zoo_tokenizer()
    model = zoo_model("llama", tokenizer).eval()
    monkeypatch.setattr(agreement, "decoder_for", decoder)
    with pytest.raises(UserError, match="sampled tokens differ"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=6, generator=torch.Generator())


def test_the_check_draws_nothing_from_the_run_and_is_made_once(monkeypatch):
    tokenizer = zoo_tokenizer()
    model, made = zoo_model("llama", tokenizer).eval(), []
    original = agreement._sample_with_cache
    monkeypatch.setattr(agreement, "_sample_with_cache", lambda *args: made.append(1) or original(*args))
    before = torch.get_rng_state()
    texts = [
        generate(model, tokenizer, PROMPTS, max_new_tokens=4, generator=torch.Generator().manual_seed(3)).completions
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1]
    assert made == [1]


def test_rows_of_one_length_are_still_padded():
    row = checks.TokenizedExample([5, 6, 7, 8], 2)
    first, second = checks.two_lengths([row, row])
    assert (first.ids, first.prompt_length, second) == ([6, 7, 8], 1, row)
