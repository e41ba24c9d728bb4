"""The checks at the start of a stage: what is random, or sees its neighbours' padding, stops with a sentence."""

from __future__ import annotations

import pytest
import torch
from support.stages import STAGES, train_stage
from support.tiny import tiny_folder
from support.zoo import zoo_model, zoo_tokenizer
from torch import nn

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.models.loading import load_causal, load_reward_model, load_tokenizer

SUPERVISED = [stage for stage in STAGES if stage != "ppo"]  # ppo's rollout has a check of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("checks") / "m")


class Noise(nn.Module):
    """Random in evaluation mode too."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        out = self.layer(*args, **kwargs)
        return out + 0.1 * torch.rand_like(out)


def load(stage, folder):
    return load_reward_model(folder, num_labels=1) if stage == "reward" else load_causal(folder)


@pytest.mark.parametrize("stage", SUPERVISED)
def test_a_random_forward_is_refused(stage, folder):
    model = load(stage, folder)
    model.base_model.layers[0].mlp = Noise(model.base_model.layers[0].mlp)
    with pytest.raises(UserError, match="something in the model is random even in evaluation mode"):
        train_stage(stage, model, load_tokenizer(folder))


@pytest.mark.parametrize("stage", SUPERVISED)
def test_a_model_that_reads_its_padding_is_refused(stage, folder, monkeypatch):
    model = load(stage, folder)
    forward = model.base_model.forward

    def without_mask(*args, attention_mask=None, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", without_mask)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    with pytest.raises(UserError, match="ignores the attention mask, and cannot be trained in batches"):
        train_stage(stage, model, load_tokenizer(folder))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_router_jitter_is_off(stage):
    tokenizer = zoo_tokenizer()
    found = []
    for noise in (0.0, 0.3):
        model = zoo_model("mixtral", tokenizer)
        for module in model.modules():
            if hasattr(module, "jitter_noise"):
                module.jitter_noise = noise
        found.append([x.clone() for x in train_stage(stage, model, tokenizer, lr=1e-4).parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_rwkv_stops_with_a_sentence(stage):
    tokenizer = zoo_tokenizer()
    with pytest.raises(UserError, match="mask"):
        train_stage(stage, zoo_model("rwkv", tokenizer), tokenizer)
