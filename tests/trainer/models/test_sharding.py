"""FSDP 2 in one process of a group of its own: what is gathered, where it goes, and what is let go of."""

from __future__ import annotations

import gc
import weakref
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.tiny import tiny_folder

from rlhf_trainer import PPOConfig
from rlhf_trainer.base import distributed
from rlhf_trainer.base.distributed import ProcessGroupInfo
from rlhf_trainer.models import fingerprint, sharding
from rlhf_trainer.models.adapters import MAIN, add_adapter, parameters_of
from rlhf_trainer.models.fingerprint import weights_digest
from rlhf_trainer.models.loading import load_causal, load_tokenizer, save_folder
from rlhf_trainer.models.sharding import all_weights_gathered, is_dtensor, is_sharded, prepare_model
from rlhf_trainer.training.checkpoint import Checkpoints

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("sharding") / "base")


@pytest.fixture
def sharded(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(distributed, "_context", ProcessGroupInfo(sharded=True))
    yield
    dist.destroy_process_group()


def with_adapter(folder):
    cfg = PPOConfig(lora_r=4, lora_targets=["q_proj"])
    return prepare_model(add_adapter(load_causal(folder), cfg.lora), CPU, dtype="bfloat16")


def one_at_a_time(monkeypatch, module):
    """Every whole tensor that `module` asks for must be let go of before the next; returns their number of elements."""
    right, seen, sizes = sharding.unsharded_tensor, [], []

    def full(tensor):
        assert not any(reference() is not None for reference in seen)
        found = right(tensor).clone()
        seen.append(weakref.ref(found))
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(module, "unsharded_tensor", full)
    return sizes


@pytest.mark.usefixtures("sharded")
def test_a_sharded_model_is_freed_when_nobody_holds_it(folder):
    model = prepare_model(load_causal(folder), CPU)
    assert is_sharded(model)
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None


@pytest.mark.usefixtures("sharded")
def test_gathering_for_a_rollout_makes_no_mesh_anew(folder, monkeypatch):
    model = prepare_model(load_causal(folder), CPU)
    monkeypatch.setattr(sharding, "_options", lambda *_: pytest.fail("settings and mesh are made once, by place"))
    with all_weights_gathered(model):
        assert not any(is_dtensor(parameter) for parameter in model.parameters())
    assert all(is_dtensor(parameter) for parameter in model.parameters())


@pytest.mark.usefixtures("sharded")
def test_rank_0_saves_the_whole_model_and_the_others_keep_nothing_of_it(folder, tmp_path, monkeypatch):
    model, tokenizer = prepare_model(load_causal(folder), CPU), load_tokenizer(folder)
    save_folder(tmp_path / "first", model, tokenizer)
    saved, base = (load_file(f"{place}/model.safetensors") for place in (tmp_path / "first", folder))
    assert saved.keys() == base.keys()
    assert all(torch.equal(saved[name], base[name]) for name in base)
    monkeypatch.setattr(distributed, "_context", ProcessGroupInfo(rank=1, sharded=True))
    sizes = one_at_a_time(monkeypatch, sharding)
    save_folder(tmp_path / "other", model, tokenizer)
    assert sum(sizes) >= sum(parameter.numel() for parameter in model.parameters())  # it took part
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("way", ["one process", "FSDP 2"])
def test_checkpoints_copy_what_is_trained_and_read_the_base_one_weight_at_a_time(
    folder, tmp_path, monkeypatch, way, request
):
    if way == "FSDP 2":
        request.getfixturevalue("sharded")
    model = with_adapter(folder)
    trained = list(parameters_of(model, MAIN).values())
    optimizer = torch.optim.Adam(trained)
    read = one_at_a_time(monkeypatch, fingerprint)
    cfg = PPOConfig(output_dir=str(tmp_path))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    checkpoints = Checkpoints(asdict(cfg), {"policy": model}, optimizer, scheduler, torch.Generator())
    assert sum(read) == sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    copied = []
    right = sharding.unsharded_tensor
    monkeypatch.setattr(sharding, "unsharded_tensor", lambda tensor: copied.append(tensor.numel()) or right(tensor))
    checkpoints.save(1)
    assert sum(copied) == sum(parameter.numel() for parameter in trained)
    kept = load_file(tmp_path / "checkpoints" / "step-00000001" / "policy.safetensors")
    assert kept.keys() == parameters_of(model, MAIN).keys()


def test_a_base_in_bfloat16_has_one_digest_in_one_process_and_in_shards(folder, request):
    digest = weights_digest(with_adapter(folder), frozen=True)
    request.getfixturevalue("sharded")
    assert weights_digest(with_adapter(folder), frozen=True) == digest
