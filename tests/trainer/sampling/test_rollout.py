"""Rollouts: padding changes nothing, each row stops by itself, masks go by length."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.tiny import tiny_folder
from support.tokenizers import family

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.rows import encode_prompt, tokenize_example
from rlhf_trainer.models.from_scratch import build_model
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.ppo import token_outputs
from rlhf_trainer.sampling import rollout as rollout_module
from rlhf_trainer.sampling.rollout import encode_prompts, generate, stop_token_id
from rlhf_trainer.worlds.exact import make_model, make_tokenizer

PROMPTS = ["a", "dcba", "bc", "abc"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer, 0)


def run(model, tokenizer, prompts=PROMPTS, seed=0, **options):
    options = {"max_new_tokens": 6, **options}
    return generate(model, tokenizer, prompts, generator=torch.Generator().manual_seed(seed), **options)


def scripted(tokens):
    """A `sample` that says the same token in every row, one of `tokens` after the other."""
    return lambda logits, *_: (torch.full((len(logits),), next(tokens)), torch.zeros(len(logits)))


def test_a_batch_gives_what_each_prompt_gives_alone(model, tokenizer, monkeypatch):
    monkeypatch.setattr(rollout_module, "sample", lambda logits, *_: logits.max(-1)[::-1])
    together = run(model, tokenizer)
    assert together.completions == [run(model, tokenizer, [prompt]).completions[0] for prompt in PROMPTS]
    assert any(together.completions)


def test_cached_sampling_equals_the_full_forward(model, tokenizer, monkeypatch):
    """The logprob under which each token was sampled, against the training forward."""
    sampled, batches, step = torch.zeros(32, 6), [], itertools.count()

    def recording(logprobs, prompts, running):
        sampled[running, next(step)] = logprobs
        batches.append(len(running))

    monkeypatch.setattr(rollout_module, "check_logprobs", recording)
    result = run(model, tokenizer, PROMPTS * 8, temperature=0.7)
    assert batches[0] == 32 > 2 * batches[-1] > 0  # rows that ended have left the batch
    with torch.no_grad():
        logprobs, _, _ = token_outputs(model, None, result, torch.arange(32), 0.7)
    width = result.response_mask.shape[1]
    torch.testing.assert_close(logprobs, sampled[:, :width].where(result.response_mask, 0), atol=1e-5, rtol=1e-5)


def test_batches_of_similar_length_give_the_same_responses(model, tokenizer):
    together = run(model, tokenizer, PROMPTS * 8)
    apart = run(model, tokenizer, PROMPTS * 8, batch_size=5)
    assert rollout_module.batches_by_length([[1], [1, 2, 3], [1], [1, 2]], 3) == [[0, 2, 3], [1]]
    assert apart.prompts == together.prompts == PROMPTS * 8
    assert apart.completions == together.completions
    assert all(torch.equal(getattr(apart, name), getattr(together, name)) for name in ("ids", "mask", "ended"))


def test_each_row_ends_at_its_eos(model, tokenizer):
    result = run(model, tokenizer, PROMPTS * 16)
    assert 0 < int(result.ended.sum()) < 64
    for ids, mask, ended, text in zip(
        result.responses.tolist(), result.response_mask.tolist(), result.ended.tolist(), result.completions, strict=True
    ):
        tokens = [token for token, real in zip(ids, mask, strict=True) if real]
        assert mask == [True] * len(tokens) + [False] * (len(mask) - len(tokens))
        assert ids[len(tokens) :] == [tokenizer.pad_token_id] * (len(ids) - len(tokens))
        assert ended == (tokens[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in tokens[:-1]
        assert text == tokenizer.decode(tokens[: len(tokens) - ended])


def test_a_sampled_pad_token_counts(model, tokenizer, monkeypatch):
    """Masks go by length: a PAD that the policy itself said is a token like any other."""
    script = iter([3, 0, 4, 1])
    monkeypatch.setattr(rollout_module, "sample", scripted(script))
    result = run(model, tokenizer, ["a", "bc"])
    assert result.responses.tolist() == [[3, 0, 4, 1]] * 2
    assert result.response_mask.all()
    assert result.ended.all()


def test_a_stop_token_ends_as_eos_does(model, tokenizer, monkeypatch):
    monkeypatch.setattr(rollout_module, "sample", scripted(itertools.repeat(5)))
    result = run(model, tokenizer, ["a"], stop_token="c")
    assert result.responses.tolist() == [[5]]
    assert result.ended.tolist() == [True]
    assert result.completions == [""]
    with pytest.raises(UserError, match="is 2 tokens of this tokenizer; it must be exactly one"):
        stop_token_id(tokenizer, "ab")


def test_seeds_reproduce(model, tokenizer):
    first, again, other = (run(model, tokenizer, PROMPTS * 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert first.completions != other.completions


def test_sampling_draws_from_the_whole_tempered_distribution():
    logits = torch.tensor([2.0, 0.0, -3.0, float("-inf")]).expand(200_000, 4)
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn, logprobs = rollout_module.sample(logits, 0.5, uniform)
    torch.testing.assert_close(logprobs, (logits / 0.5).log_softmax(-1).gather(-1, drawn[:, None])[:, 0])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=2e-3, rtol=0)
    assert shares[2] > 0  # 4.5e-5: no top-k, no top-p
    assert shares[3] == 0


def test_prompts_that_cannot_be_answered(model, tokenizer):
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        encode_prompts(model, tokenizer, ["a", "  "], 4)
    with pytest.raises(UserError, match=r"prompt 1 of 1 has 29 tokens; .* longer than the model's context of 32"):
        encode_prompts(model, tokenizer, ["abcd" * 7], 4)
    assert len(encode_prompts(model, tokenizer, ["abcd" * 7], 3)[0]) == 29


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_real_architectures(arch, tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "m", arch)
    tokenizer = load_tokenizer(folder)
    model = load_causal(folder, tokenizer).eval()
    monkeypatch.setattr(rollout_module, "sample", lambda logits, *_: logits.max(-1)[::-1])
    prompts = ["a", "one two three red blue"]
    together = run(model, tokenizer, prompts)
    for prompt, mine in zip(prompts, together.responses.tolist(), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        theirs = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert mine[: len(theirs)] == theirs.tolist()


@pytest.fixture(scope="module")
def chat_parts():
    """A model whose generation config ends answers with <|im_end|> as well, as Gemma, Phi and Llama 3 do."""
    tokenizer = family("byte_level")
    model = build_model("llama", tokenizer, seed=0, hidden_size=32, layers=1, heads=2, max_length=64).eval()
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    return model, tokenizer


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_a_response_ends_at_each_eos_that_tokenizer_or_model_names(chat_parts, monkeypatch, end):
    model, tokenizer = chat_parts
    said = tokenizer(f" yes{end}", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(rollout_module, "sample", scripted(itertools.cycle(said)))
    result = run(model, tokenizer, ["a day"], max_new_tokens=20)
    assert result.responses.tolist() == [said]
    assert result.ended.all()
    assert result.completions == [" yes"]


def test_only_eos_pad_and_stop_tokens_are_taken_out_of_a_completion(chat_parts, monkeypatch):
    model, tokenizer = chat_parts
    said = tokenizer("<s><|im_start|>no blue</s>", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(rollout_module, "sample", scripted(iter(said)))
    result = run(model, tokenizer, ["a day"], max_new_tokens=20)
    assert result.completions == ["<s><|im_start|>no blue"]
    assert result.token_rows(slice(0, 1)) == [(encode_prompt(tokenizer, "a day"), said[:-1])]


@pytest.mark.parametrize("name", ["byte_fallback_dummy_prefix", "metaspace_first", "unigram_always", "word_piece"])
def test_a_completion_is_the_text_that_its_tokens_add_to_the_prompt(name, monkeypatch):
    """Alone, ` thanks` is decoded without the space that stands between prompt and completion."""
    tokenizer = family(name)
    model = build_model("llama", tokenizer, seed=0, hidden_size=32, layers=1, heads=2, max_length=64).eval()
    row, _ = tokenize_example(tokenizer, "a good day", " thanks", 100)
    monkeypatch.setattr(rollout_module, "sample", scripted(iter(row.ids[row.prompt_length :])))
    assert run(model, tokenizer, ["a good day"], max_new_tokens=20).completions == [" thanks"]
