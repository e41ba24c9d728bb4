"""What is trained: float32 weights, nothing random, in every stage; an object comes back as it came."""

from __future__ import annotations

import copy

import pytest
import torch
from support.stages import STAGES, train_stage
from support.tiny import tiny_folder
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_trainer.models import adapters, precision
from rlhf_trainer.models.adapters import LoraOptions, add_adapter
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.models.modes import train_mode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("modes") / "m")


def load(stage, folder, dtype):
    if stage == "reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture
def optimised(monkeypatch):
    """The dtypes of all parameters that an optimizer was given."""
    seen = set()
    original = torch.optim.Optimizer.add_param_group

    def recording(self, group):
        seen.update(parameter.dtype for parameter in group["params"])
        original(self, group)

    monkeypatch.setattr(torch.optim.Optimizer, "add_param_group", recording)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_a_16_bit_object_is_trained_as_its_float32_copy_and_comes_back_in_16_bits(stage, dtype, folder, optimised):
    tokenizer, given = load_tokenizer(folder), load(stage, folder, dtype)
    wide = train_stage(stage, copy.deepcopy(given).float(), tokenizer)
    optimised.clear()
    trained = train_stage(stage, given, tokenizer)
    assert trained is given
    assert optimised == {torch.float32}
    for (name, parameter), other in zip(given.named_parameters(), wide.parameters(), strict=True):
        assert parameter.dtype == dtype, name
        assert torch.equal(parameter, other.to(dtype)), name


@pytest.mark.parametrize("mixed", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_on_a_16_bit_base_is_float32_and_the_base_keeps_its_bits(stage, dtype, mixed, folder, optimised):
    given = load(stage, folder, dtype)
    before = {name: x.clone() for name, x in given.named_parameters() if "score" not in name}
    train_stage(stage, given, load_tokenizer(folder), lora_r=2, lora_targets=["q_proj"], dtype=mixed)
    assert optimised == {torch.float32}
    after = {name.replace(".base_layer", ""): x for name, x in given.named_parameters()}
    assert all(after[name].dtype == dtype and torch.equal(after[name], x) for name, x in before.items())
    assert {x.dtype for x in adapters.parameters_of(given, adapters.MAIN).values()} == {torch.float32}


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_16_bit_reference_comes_back_as_it_came(stage, folder, monkeypatch):
    from support import stages

    reference, policy = load(stage, folder, torch.bfloat16), load(stage, folder, torch.bfloat16)
    name = f"train_{stage}"
    original = getattr(stages, name)
    monkeypatch.setattr(stages, name, lambda *args, **kwargs: original(*args, ref_model=reference, **kwargs))
    before = copy.deepcopy(reference.state_dict())
    train_stage(stage, policy, load_tokenizer(folder))
    assert all(
        torch.equal(x, before[key]) and x.dtype == before[key].dtype for key, x in reference.state_dict().items()
    )


def test_a_model_that_was_cast_since_an_aborted_stage_keeps_its_dtype(folder):
    model = load("sft", folder, torch.float16)
    precision.widen(model, "float32")
    model.float()
    precision.widen(model, "float32")
    precision.narrow(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class Jitter(nn.Module):
    """Random in training mode under a name that no config knows."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        out = self.layer(*args, **kwargs)
        return out + torch.rand_like(out) if self.training else out


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_random_in_training_mode_is_off_in_every_stage(stage, folder):
    tokenizer, found = load_tokenizer(folder), []
    for wrapped in (False, True):
        model = load(stage, folder, torch.float32)
        if stage == "reward":
            nn.init.ones_(model.score.weight)
        if wrapped:
            model.base_model.layers[0].mlp = Jitter(model.base_model.layers[0].mlp)
        found.append([x.clone() for x in train_stage(stage, model.train(), tokenizer).parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_lora_dropout_alone_is_random(folder):
    model = add_adapter(load_causal(folder), LoraOptions(2, 16, ["q_proj"], 0.5))
    precision.enable_checkpointing(model)
    train_mode(model)
    training = {name for name, module in model.named_modules() if module.training}
    layers = {f"model.layers.{i}" for i in range(2)}
    assert layers <= training
    assert all("lora_dropout" in name for name in training - layers)
    assert any("lora_dropout" in name for name in training)
