"""What is saved is the model that was trained: folders as a set, tied weights, every kind of LoRA target."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.stages import STAGES, train_stage
from support.tiny import tiny_folder
from support.zoo import zoo_folder, zoo_model, zoo_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.models import adapters, logprobs
from rlhf_trainer.models.adapters import LoraOptions, add_adapter
from rlhf_trainer.models.loading import context_length, load_causal, load_reward_model, load_tokenizer, save_folder
from rlhf_trainer.models.scoring import classifier_outputs

IDS = torch.tensor([[1, 67, 286, 70, 284]])  # "a good day", so that the rows of these tokens are trained


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("saved") / "tied")


def logits(model):
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=IDS, decoder_input_ids=IDS).logits
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def plain(stage, folder, base):
    """The folder as transformers and peft load it, without this trainer."""
    if not (folder / adapters.CONFIG).exists():
        loader = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
        return loader.from_pretrained(folder).eval()
    if stage != "reward":
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = 0
    return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
@pytest.mark.parametrize("stage", STAGES)
def test_plain_libraries_load_what_every_stage_saves(stage, kind, tied, tmp_path):
    lora = {} if kind == "full" else {"lora_r": 2, "merge": kind == "merged"}
    trained = train_stage(
        stage, None, load_tokenizer(tied), model_name=tied, output_dir=str(tmp_path / "out"), **lora
    ).eval()
    found = logits(plain(stage, tmp_path / "out", tied))
    assert not torch.allclose(found, logits(AutoModelForCausalLM.from_pretrained(tied))[..., :1])
    torch.testing.assert_close(found, logits(trained), atol=0 if kind == "full" else 1e-6, rtol=0)


def test_a_seq2seq_folder_loads_in_transformers_and_keeps_its_settings(tmp_path):
    folder = zoo_folder(tmp_path / "bart", "bart")
    trained = train_stage("sft", None, load_tokenizer(folder), model_name=folder, output_dir=str(tmp_path / "out"))
    found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(found), logits(trained.eval()))
    assert found.config.dropout == AutoModelForSeq2SeqLM.from_pretrained(folder).config.dropout == 0.1
    assert found.generation_config.forced_bos_token_id == 1


@pytest.mark.parametrize("order", [("full", "adapter"), ("adapter", "full")])
def test_a_second_run_into_a_folder_leaves_nothing_of_the_first(order, tied, tmp_path):
    out, tokenizer = tmp_path / "out", load_tokenizer(tied)
    for kind in order:
        model = load_causal(tied)
        if kind == "adapter":
            add_adapter(model, LoraOptions(2, 16, []))
        else:
            with torch.no_grad():
                model.get_input_embeddings().weight.add_(1)
        save_folder(out, model, tokenizer)
        for name in ("metrics.jsonl", "model-00001-of-00002.safetensors", "value_head.safetensors", "vocab.json"):
            (out / name).write_text("{}")
    save_folder(out, model, tokenizer)
    names = {path.name for path in out.iterdir()}
    assert "metrics.jsonl" in names
    assert not names & {"model-00001-of-00002.safetensors", "value_head.safetensors", "vocab.json"}
    assert ("adapter_config.json" in names) != ("config.json" in names)
    assert ("adapter_model.safetensors" in names) != ("model.safetensors" in names)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


def test_an_adapter_never_replaces_its_own_base(tied, tmp_path):
    save_folder(tmp_path / "base", load_causal(tied), load_tokenizer(tied))
    model = add_adapter(load_causal(tmp_path / "base"), LoraOptions(2, 16, []))
    save_folder(tmp_path / "adapter", model, load_tokenizer(tied))
    with pytest.raises(UserError, match="the adapter needs its base, which lies there"):
        train_stage(
            "sft",
            None,
            load_tokenizer(tied),
            model_name=str(tmp_path / "adapter"),
            output_dir=str(tmp_path / "base"),
        )
    assert (tmp_path / "base" / "model.safetensors").exists()


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_merging_into_a_shared_weight_changes_its_layer_alone(targets, tied, tmp_path):
    tokenizer = load_tokenizer(tied)
    model = train_stage("sft", load_causal(tied), tokenizer, lora_r=2, lora_targets=targets)
    before = logits(model.eval())
    assert not torch.equal(before, logits(load_causal(tied)))
    adapters.merge(model)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    save_folder(tmp_path / "out", model, tokenizer)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "down_proj"], ["all-linear"]])
def test_what_is_trained_is_what_peft_says(targets, tied):
    model = add_adapter(load_causal(tied), LoraOptions(2, 16, targets))
    wanted = targets[0] if targets == ["all-linear"] else targets
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tied), LoraConfig(r=2, target_modules=wanted, task_type="CAUSAL_LM")
    )
    expected = {name.removeprefix(adapters.PREFIX) for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert adapters.is_zero(model, adapters.MAIN)


def test_a_shared_weight_of_an_encoder_decoder_takes_no_adapter():
    with pytest.raises(UserError, match="whose weight encoder, decoder and head share"):
        add_adapter(zoo_model("bart", zoo_tokenizer()), LoraOptions(2, 16, ["lm_head"]))


def test_an_adapter_that_trains_biases_is_refused(tied, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tied), LoraConfig(r=2, bias="all", task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(UserError, match="trains biases of the base"):
        load_causal(tmp_path / "biased")


def test_rows_of_new_tokens_under_lora_are_named(tied, capsys):
    tokenizer = load_tokenizer(tied)
    tokenizer.add_tokens(["<think>", "</think>"])
    add_adapter(load_causal(tied, tokenizer), LoraOptions(2, 16, []))
    assert "has 2 tokens that the base" in capsys.readouterr().err.replace("\n", " ")


def test_trained_labels_agree_with_the_bos_that_generate_forces(tmp_path):
    folder = zoo_folder(tmp_path / "bart", "bart")
    tokenizer, model = load_tokenizer(folder), load_causal(folder).eval()
    row = logprobs.TokenizedExample([5, 6, 7, 8, 2], 2)
    loss = logprobs.completion_losses(model, [row], tokenizer.pad_token_id)
    closed = torch.tensor([[5, 6, tokenizer.eos_token_id]])
    logprob = model(input_ids=closed, decoder_input_ids=torch.tensor([[2, 1, 7, 8]])).logits.log_softmax(-1)[0, 1:]
    torch.testing.assert_close(loss, -logprob[range(3), [7, 8, 2]].sum()[None])
    made = model.generate(closed, max_new_tokens=3, do_sample=False, num_beams=1)
    assert made[0, :2].tolist() == [2, 1]


def test_a_roberta_like_classifier_takes_fewer_tokens_than_its_table(tmp_path):
    tokenizer = zoo_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        pad_token_id=0,
        num_labels=1,
    )
    save_folder(tmp_path / "r", RobertaForSequenceClassification(config), tokenizer)
    model = load_reward_model(tmp_path / "r").eval()
    assert context_length(model) == 19
    classifier_outputs(model, load_tokenizer(tmp_path / "r"), ["a good day " * 20], ["yes"])
    assert json.loads((tmp_path / "r" / "config.json").read_text())["max_position_embeddings"] == 20
