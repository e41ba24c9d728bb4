"""Models and tokenizers as folders: pad tokens, resizing, dropout, writing whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer import DPOConfig, PPOConfig, RewardConfig, load_reward, train_dpo, train_ppo, train_reward
from rlhf_trainer.base.distributed import resolve_device
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.data.records import Pair
from rlhf_trainer.data.rows import encode_completion, encode_prompt, left_pad
from rlhf_trainer.models import loading as models
from rlhf_trainer.models.forward import decoder_inputs
from rlhf_trainer.models.from_scratch import ARCHITECTURES
from rlhf_trainer.models.loading import check_vocabulary, load_causal, load_tokenizer, same_weights, save_folder


def save_tokenizer_with(folder, **special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in special.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def test_a_pad_token_can_be_added(tmp_path):
    folder = tiny_folder(tmp_path / "m")
    save_tokenizer_with(folder, pad_token=None)
    tokenizer = load_tokenizer(folder, pad_token="<extra>")
    before = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    model = load_causal(folder, tokenizer)
    assert tokenizer.pad_token == "<extra>"
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == before.shape[0] + 1
    torch.testing.assert_close(model.get_input_embeddings().weight[:-1], before)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_tokenizer_without_a_pad_token_of_its_own_is_taken_as_it_is(tmp_path, pad):
    folder = tiny_folder(tmp_path / "m")
    save_tokenizer_with(folder, pad_token=pad)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == pad
    model = load_causal(folder, tokenizer)
    assert model.config.pad_token_id == load_causal(folder).config.pad_token_id
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_left_padding_changes_no_logit(arch, tmp_path):
    folder = tiny_folder(tmp_path / "m", arch)
    model, tokenizer = load_causal(folder).eval(), load_tokenizer(folder)
    rows = [encode_prompt(tokenizer, "a good day"), encode_prompt(tokenizer, "one two three red blue yes")]
    ids, mask = left_pad(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        padded = model(**decoder_inputs(model, ids, mask)).logits
        for row, out in zip(rows, padded, strict=True):
            torch.testing.assert_close(out[-len(row) :], model(torch.tensor([row])).logits[0], atol=1e-5, rtol=1e-5)


def test_prompts_never_end_with_eos_and_completions_do(tmp_path):
    tokenizer = load_tokenizer(tiny_folder(tmp_path / "m"))
    ids = encode_prompt(tokenizer, "a good day")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert encode_completion(tokenizer, " night")[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in encode_completion(tokenizer, " night")
    assert tokenizer.decode(encode_completion(tokenizer, " night", eos=False)) == " night"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    tokenizer, model = load_tokenizer(tiny_folder(tmp_path / "m")), load_causal(tmp_path / "m")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_folder(tmp_path / "new", model, tokenizer, tensors={"head.safetensors": {"w": torch.ones(1)}})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_saving_beside_logs_keeps_them(tmp_path):
    tokenizer, model = load_tokenizer(tiny_folder(tmp_path / "m")), load_causal(tmp_path / "m")
    (tmp_path / "m" / "metrics.jsonl").write_text("{}\n")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    save_folder(tmp_path / "m", model, tokenizer)
    assert (tmp_path / "m" / "metrics.jsonl").exists()
    assert same_weights(load_causal(tmp_path / "m"), model)


def test_bad_folders_and_devices(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        load_causal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load a model from it"):
        load_causal(tmp_path / "empty")
    with pytest.raises(UserError, match="not a device"):
        resolve_device("tpu9")


def test_init_writes_a_folder_that_transformers_loads(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("a good day\na bad night\n" * 20)
    arguments = ["init", "--text", str(text), "--vocab_size", "270", "--hidden_size", "32", "--layers", "1"]
    assert main([*arguments, "--output_dir", str(tmp_path / "m"), "--arch", "qwen2"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert model.config.model_type == "qwen2"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    assert tokenizer.decode(tokenizer("a good dæy")["input_ids"], skip_special_tokens=True) == "a good dæy"
    assert main([*arguments, "--output_dir", str(tmp_path / "x"), "--arch", "rnn"]) == 2
    assert main([*arguments, "--output_dir", str(tmp_path / "x"), "--heads", "5"]) == 2
    assert main(["init", "--text", str(tmp_path / "no.txt"), "--output_dir", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
    assert "no.txt" in capsys.readouterr().err


def test_init_replaces_its_own_model_alone(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("a good day\n" * 20)
    folder = tmp_path / "m"
    sizes = ["--vocab_size", "260", "--hidden_size", "16", "--heads", "1"]
    arguments = ["init", "--text", str(tmp_path / "t.txt"), *sizes]
    assert main([*arguments, "--output_dir", str(folder), "--layers", "1"]) == 0
    assert main([*arguments, "--output_dir", str(folder), "--layers", "2"]) == 0
    assert load_causal(folder).config.num_hidden_layers == 2
    for other in (lambda f: f.write_text("model: runs/base\n"), lambda f: f.unlink()):  # of another stage; nobody's
        other(folder / "config_resolved.yaml")
        assert main([*arguments, "--output_dir", str(folder), "--layers", "1"]) == 2
        assert "did not make" in capsys.readouterr().err
        assert load_causal(folder).config.num_hidden_layers == 2


def test_a_reward_model_is_no_policy_and_a_language_model_no_reward(tmp_path):
    folder = tiny_folder(tmp_path / "lm")
    cfg = RewardConfig(model=folder, heldout=0, device="cpu")
    pairs = [Pair("one", " yes", " no")]
    train_reward(replace(cfg, output_dir=str(tmp_path / "reward")), pairs=pairs)
    train_reward(replace(cfg, output_dir=str(tmp_path / "adapter"), lora_r=2), pairs=pairs)
    with pytest.raises(UserError, match="reward: a reward model or another classifier; a language model is needed"):
        load_causal(tmp_path / "reward")
    with pytest.raises(UserError, match="adapter: the adapter of a reward model; a language model is needed"):
        load_causal(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"lm: no trained classifier \(score.weight would be random\)"):
        load_reward(folder, label="0")
    assert len(load_reward(str(tmp_path / "adapter"))(["one"], [" yes"])) == 1


def test_a_reference_of_another_vocabulary_is_refused(tmp_path):
    folder, other = tiny_folder(tmp_path / "policy"), tiny_folder(tmp_path / "other", text="quite other words here")
    more = load_tokenizer(folder, pad_token="<more>")
    save_folder(tmp_path / "more", load_causal(folder, more), more)
    check_vocabulary(tmp_path / "more", load_tokenizer(folder))
    check_vocabulary(folder, more)
    pairs, said = [Pair("one", " yes", " no")], "other: its vocabulary is another than the policy's"
    with pytest.raises(UserError, match=said):
        train_dpo(DPOConfig(model=folder, ref_model=other, heldout=0, device="cpu"), pairs=pairs)
    with pytest.raises(UserError, match=said):
        train_ppo(PPOConfig(model=folder, ref_model=other, device="cpu"), reward=lambda _, c: [0.0], prompts=["one"])
