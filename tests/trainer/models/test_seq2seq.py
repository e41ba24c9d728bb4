"""Encoder-decoder models: logprobs against the model's own logits, rollouts, SFT, and PPO with its invariants."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.seq2seq import CONFIGS, make_folder
from support.tiny import WORDS
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_trainer import PPOConfig, RewardConfig, ppo, sft, train_ppo, train_reward
from rlhf_trainer.base.config import parse_config
from rlhf_trainer.cli import main
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.rows import encode_prompt, left_pad, tokenize_example
from rlhf_trainer.judging.rewards import load_reward
from rlhf_trainer.models import logprobs
from rlhf_trainer.models.forward import head_inputs
from rlhf_trainer.models.loading import load_causal, load_tokenizer, save_folder, suppress_transformers_warnings
from rlhf_trainer.models.scoring import load_normalisation
from rlhf_trainer.models.seq2seq import close_prompts, inputs
from rlhf_trainer.sampling import rollout as rollout_module
from rlhf_trainer.sampling.rollout import generate

PROMPTS = ["a good day", "one two three red blue yes", "no thanks", "night"]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp(request.param) / "base", request.param)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("t5") / "base")


@pytest.fixture
def parts(folder):
    tokenizer = load_tokenizer(folder)
    return load_causal(folder, tokenizer).eval(), tokenizer


def test_prompts_are_closed_and_padded_on_the_right(parts):
    model, _ = parts
    ids, mask = close_prompts(model, torch.tensor([[0, 0, 7], [5, 6, 7]]), torch.tensor([[0, 0, 1], [1, 1, 1]]).bool())
    assert ids.tolist() == [[7, 2, 0, 0], [5, 6, 7, 2]]
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_rollout_logprobs_are_the_models_own(parts):
    """Each row alone and unpadded through the model's whole forward, against the padded batch of the trainer."""
    model, tokenizer = parts
    generator = torch.Generator().manual_seed(0)
    rollout = generate(model, tokenizer, PROMPTS * 4, max_new_tokens=6, generator=generator, temperature=0.7)
    with torch.no_grad():
        logprobs, entropy, _ = ppo.token_outputs(model, None, rollout, torch.arange(16), 0.7)
        for row, text in enumerate(rollout.prompts):
            answer = rollout.responses[row][rollout.response_mask[row]]
            start = model.config.decoder_start_token_id
            logits = model(
                input_ids=torch.tensor([[*encode_prompt(tokenizer, text), tokenizer.eos_token_id]]),
                decoder_input_ids=torch.tensor([[start, *answer[:-1].tolist()]]),
            ).logits[0]
            every = (logits.double() / 0.7).log_softmax(-1)
            expected = every.gather(1, answer[:, None])[:, 0]
            torch.testing.assert_close(logprobs[row][: len(answer)].double(), expected, atol=1e-5, rtol=1e-5)
            entropies = -(every.exp() * every).sum(-1)
            torch.testing.assert_close(entropy[row][: len(answer)].double(), entropies, atol=1e-5, rtol=1e-5)


def test_the_cache_gives_the_training_forwards_distribution(parts, monkeypatch):
    model, tokenizer = parts
    seen, running, sample = [], [], rollout_module.sample

    def ending(logits, *rest):
        tokens, logprobs = sample(logits, *rest)
        tokens[: 9 if len(seen) == 1 else 0] = tokenizer.eos_token_id
        seen.append(logits)
        return tokens, logprobs

    monkeypatch.setattr(rollout_module, "sample", ending)
    monkeypatch.setattr(rollout_module, "check_logprobs", lambda logprobs, prompts, rows: running.append(rows))
    generator = torch.Generator().manual_seed(1)
    rollout = generate(model, tokenizer, PROMPTS * 4, max_new_tokens=5, generator=generator)
    assert len(running[-1]) <= 7  # rows that ended have left the batch
    with torch.no_grad():
        logits = model(**inputs(model, rollout.ids, rollout.mask, rollout.prompt_length)).logits
    for step, (stepped, rows) in enumerate(zip(seen, running, strict=True)):
        real = rollout.response_mask[rows, step]
        torch.testing.assert_close(stepped[real], logits[rows, step][real], atol=1e-5, rtol=1e-5)


def test_sft_loss_is_that_of_the_models_own_labels(parts):
    model, tokenizer = parts
    rows = [tokenize_example(tokenizer, p, f" {c} yes", 64)[0] for p, c in zip(PROMPTS, WORDS.split(), strict=False)]
    losses = logprobs.completion_losses(model, rows, tokenizer.pad_token_id)
    for row, loss in zip(rows, losses, strict=True):
        prompt, answer = row.ids[: row.prompt_length], torch.tensor([row.ids[row.prompt_length :]])
        closed = torch.tensor([[*prompt, tokenizer.eos_token_id]])
        mean = model(input_ids=closed, labels=answer).loss
        torch.testing.assert_close(loss, mean * answer.shape[1], atol=1e-4, rtol=1e-5)


def test_left_padding_changes_no_response_state(parts):
    model, tokenizer = parts
    rows = [encode_prompt(tokenizer, text) for text in PROMPTS]
    prompts, mask = left_pad(rows, tokenizer.pad_token_id)
    answer = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        ids = torch.cat([prompts, answer.expand(4, 3)], 1)
        mask = torch.cat([mask, torch.ones(4, 3).bool()], 1)
        together = head_inputs(model, ids, mask, prompts.shape[1])["hidden"]
        for row, states in zip(rows, together, strict=True):
            alone = torch.cat([torch.tensor([row]), answer], 1)
            apart = head_inputs(model, alone, torch.ones_like(alone).bool(), len(row))["hidden"][0]
            torch.testing.assert_close(apart, states, atol=1e-5, rtol=1e-5)


def sft_then_ppo(folder, tmp_path, **lora):
    data = str(write_jsonl(tmp_path / "examples.jsonl", [{"prompt": p, "completion": f" {p} yes"} for p in PROMPTS]))
    fit = {"heldout": 0, "batch_size": 4, "epochs": 2, "lr": 1e-2, "device": "cpu"}
    sft.run(sft.Config(model=folder, data=data, output_dir=str(tmp_path / "sft"), **fit, **lora))
    options = {"updates": 2, "batch_size": 8, "epochs": 1, "max_new_tokens": 5, "lr": 1e-2, "device": "cpu"}
    cfg = PPOConfig(model=str(tmp_path / "sft"), output_dir=str(tmp_path / "ppo"), **options)
    return train_ppo(cfg, reward=lambda prompts, texts: [float(len(text)) for text in texts], prompts=PROMPTS)


def test_sft_then_ppo(folder, tmp_path):
    result = sft_then_ppo(folder, tmp_path)
    assert result.metrics[0]["objective/kl"] == 0.0
    assert result.metrics[1]["objective/kl"] != 0.0
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ppo").config.is_encoder_decoder


def test_sft_then_ppo_with_lora(t5, tmp_path):
    result = sft_then_ppo(t5, tmp_path, lora_r=4)
    assert result.metrics[0]["objective/kl"] == 0.0
    assert result.metrics[1]["objective/kl"] != 0.0
    config = json.loads((tmp_path / "ppo" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    plain = AutoModelForSeq2SeqLM.from_pretrained(t5)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "ppo").eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 2]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, result.policy(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_sft_learns_to_copy(t5, tmp_path):
    examples = [{"prompt": word, "completion": f" {word}"} for word in ("red", "blue", "day", "night")]
    data = str(write_jsonl(tmp_path / "examples.jsonl", examples))
    fit = {"heldout": 0, "batch_size": 4, "epochs": 80, "lr": 1e-2, "device": "cpu"}
    metrics = sft.run(sft.Config(model=t5, data=data, output_dir=str(tmp_path / "sft"), **fit))
    assert metrics["loss"] < 0.1
    model, tokenizer = load_causal(tmp_path / "sft").eval(), load_tokenizer(tmp_path / "sft")
    prompts = [example["prompt"] for example in examples]
    rollout = generate(
        model, tokenizer, prompts, max_new_tokens=6, generator=torch.Generator().manual_seed(0), temperature=0.1
    )
    assert rollout.completions == [example["completion"] for example in examples]
    assert bool(rollout.ended.all())


def test_the_detoxify_config(t5, tmp_path):
    """The well-known lab at toy size: a hate-speech classifier's `nothate` logit moves a T5 through LoRA."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(t5)
    torch.manual_seed(0)
    labels = {"id2label": {0: "nothate", 1: "hate"}, "label2id": {"nothate": 0, "hate": 1}}
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    save_folder(tmp_path / "judge", BertForSequenceClassification(BertConfig(**size, **shape, **labels)), tokenizer)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    own = ["--model", t5, "--reward", f"{tmp_path}/judge"]
    own += ["--prompts", f"{tmp_path}/prompts.txt", "--output_dir", f"{tmp_path}/out", "--updates", "2"]
    own += ["--batch_size", "8", "--max_new_tokens", "5", "--device", "cpu"]
    cfg = parse_config(PPOConfig, ["--config", "configs/detoxify_t5.yaml", *own])
    assert cfg.lora_r > 0
    assert cfg.reward_label == "nothate"
    result = train_ppo(cfg)
    assert result.metrics[0]["objective/kl"] == 0.0
    trained = sum(p.numel() for p in result.policy.parameters() if p.requires_grad)
    assert 0 < trained < 0.5 * sum(p.numel() for p in result.policy.parameters())


def test_reward_model(folder, tmp_path):
    train_and_compare_reward(folder, tmp_path)


def test_reward_model_with_lora(t5, tmp_path):
    train_and_compare_reward(t5, tmp_path, lora_r=4, lora_targets=["all-linear"])


def train_and_compare_reward(folder, tmp_path, **lora):
    """The folder's own class scores a text as we do; the reward prefers what the labellers did."""
    pairs = [{"prompt": prompt, "chosen": " thanks yes", "rejected": " fool"} for prompt in PROMPTS]
    data, out = str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), tmp_path / "reward"
    options = {"heldout": 1, "batch_size": 4, "epochs": 8, "lr": 1e-2, "device": "cpu", **lora}
    result = train_reward(RewardConfig(model=folder, data=data, output_dir=str(out), **options))
    assert result.figures["heldout"]["accuracy"] == 1.0
    score = load_reward(str(out))
    good, bad = score(PROMPTS, [" thanks yes"] * 4), score(PROMPTS, [" fool"] * 4)
    assert min(good) > max(bad)
    assert result.score(PROMPTS, [" fool"] * 4) == pytest.approx(bad, abs=1e-4)
    tokenizer = load_tokenizer(folder)
    with torch.no_grad(), suppress_transformers_warnings():
        theirs = AutoModelForSequenceClassification.from_pretrained(folder if lora else out, num_labels=1)
        theirs = (PeftModel.from_pretrained(theirs, out) if lora else theirs).eval()
        ids = torch.tensor([[*encode_prompt(tokenizer, PROMPTS[1] + " fool"), tokenizer.eos_token_id]])
        raw = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    mean, std = load_normalisation(out)
    assert bad[1] == pytest.approx((raw - mean) / std, abs=1e-3)


def test_dpo_generate_and_eval(t5, tmp_path):
    pairs = [{"prompt": prompt, "chosen": " yes", "rejected": " fool"} for prompt in PROMPTS]
    data = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    prompts = str(write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]))
    out = str(tmp_path / "dpo")
    fit = ["--heldout", "0", "--epochs", "8", "--lr", "0.01", "--device", "cpu"]
    assert main(["dpo", "--model", t5, "--data", data, "--output_dir", out, *fit]) == 0
    rows = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["rewards/margins"] > 0.5
    texts = str(tmp_path / "texts.jsonl")
    options = ["--prompts", prompts, "--max_new_tokens", "4", "--device", "cpu"]
    assert main(["generate", "--model", out, "--output", texts, "--n", "2", *options]) == 0
    written = [json.loads(line) for line in Path(texts).read_text().splitlines()]
    assert [len(row["completions"]) for row in written] == [2] * 4
    report = ["--output_dir", str(tmp_path / "eval"), "--reward", f"{__file__}:short"]
    assert main(["eval", "--before", t5, "--after", out, *report, *options]) == 0
    assert (tmp_path / "eval" / "report.html").is_file()


def short(prompts, completions):
    return [-float(len(text)) for text in completions]
