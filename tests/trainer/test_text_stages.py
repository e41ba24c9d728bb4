"""Text and tokens through whole stages: padding, terminators, what the saved folder says."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_folder
from support.tokenizers import CHATML
from transformers import AutoTokenizer, GenerationConfig

from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.dpo import DPOConfig, train_dpo
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.onpolicy.config import PPOConfig
from rlhf_trainer.ppo import train_ppo
from rlhf_trainer.reward import RewardConfig, train_reward
from rlhf_trainer.sampling.rollout import generate
from rlhf_trainer.sft import SFTConfig, train_sft

DATA = [
    {"prompt": "one two three", "completion": " yes", "chosen": " yes", "rejected": " no thanks"},
    {"prompt": "a", "completion": " good day", "chosen": " good day", "rejected": " bad"},
]
SHORT = {"batch_size": 2, "device": "cpu", "report_to": []}


def ppo(folder, out):
    cfg = PPOConfig(model=folder, output_dir=out, updates=1, max_new_tokens=4, **SHORT)
    train_ppo(cfg, reward=lambda prompts, texts: [float(len(text)) for text in texts], prompts=["one", "a good day"])


def supervised(train, config):
    def stage(folder, out):
        data = write_jsonl(out.parent / "data.jsonl", DATA)
        unused = ["completion", "chosen", "rejected"]
        train(config(model=folder, output_dir=str(out), data=str(data), heldout=0, ignore_fields=unused, **SHORT))

    return stage


STAGES = {
    "sft": supervised(train_sft, SFTConfig),
    "dpo": supervised(train_dpo, DPOConfig),
    "reward": supervised(train_reward, RewardConfig),
    "ppo": lambda folder, out: ppo(folder, str(out)),
}


@pytest.mark.parametrize("pad", [None, "<eos>"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_pad_token_is_needed_and_the_saved_folder_says_what_the_loaded_one_said(stage, pad, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    STAGES[stage](folder, tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.pad_token == pad
    assert saved.get_vocab() == tokenizer.get_vocab()


def test_sft_trains_the_end_at_which_rollouts_stop(tmp_path):
    """The template ends turns with <|im_end|>, which only the generation config says to be an EOS."""
    folder = tiny_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = load_causal(folder, tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.save_pretrained(folder)
    assert end in GenerationConfig.from_pretrained(folder).eos_token_id
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": chat}])
    out = tmp_path / "out"
    train_sft(SFTConfig(model=folder, output_dir=str(out), data=str(data), heldout=0, epochs=60, lr=2e-2, **SHORT))
    trained, reader = load_causal(out).eval(), load_tokenizer(out)
    prompt = reader.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    rollout = generate(trained, reader, [prompt], max_new_tokens=12, generator=torch.Generator(), temperature=0.01)
    assert rollout.completions == ["yes"]
    assert rollout.responses[0, -1] == end
    assert rollout.ended.all()
