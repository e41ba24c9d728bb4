"""--gradient_checkpointing changes no bit of loss and gradient; --dtype bfloat16 keeps PPO's invariants to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from support.seq2seq import make_folder
from support.tiny import WORDS, tiny_folder
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_trainer import PPOConfig, dpo, reward, sft, train_ppo
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.records import Example, Pair
from rlhf_trainer.data.rows import tokenize_example
from rlhf_trainer.models import logprobs, precision
from rlhf_trainer.models.adapters import MAIN
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.models.modes import train_mode

PROMPTS = ["a good day", "one two three", "no thanks", "night"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("precision")
    return {
        "llama": tiny_folder(root / "llama"),
        "gpt2": tiny_folder(root / "gpt2", "gpt2"),
        "t5": make_folder(root / "t5"),
    }


def ppo_run(folder, **options):
    defaults = {"updates": 2, "batch_size": 8, "epochs": 1, "minibatches": 1, "max_new_tokens": 6, "lr": 1e-3}
    model, tokenizer = load_causal(folder), load_tokenizer(folder)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    cfg = PPOConfig(model=folder, device="cpu", **defaults | options)
    result = train_ppo(
        cfg, model=model, tokenizer=tokenizer, reward=lambda _, texts: list(map(len, texts)), prompts=PROMPTS
    )
    assert not any(layer.training for layer in layers)
    return result


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_checkpointing_gives_the_same_loss_and_gradient(folders, name):
    tokenizer = load_tokenizer(folders[name])
    rows = [tokenize_example(tokenizer, p, f" {c} yes", 64)[0] for p, c in zip(PROMPTS, WORDS.split(), strict=False)]
    found = []
    for checkpointing in (False, True):
        model = load_causal(folders[name], tokenizer)
        if checkpointing:
            precision.enable_checkpointing(model)
        train_mode(model)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = logprobs.completion_losses(model, rows, tokenizer.pad_token_id).sum()
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), sum(saved)))
    (loss, gradient, saved), (loss_again, gradient_again, saved_less) = found
    assert loss_again == loss
    assert torch.equal(gradient_again, gradient)
    assert saved_less < 0.7 * saved


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"lora_r": 4}])
def test_ppo_with_checkpointing_is_the_same_run(folders, options):
    plain, recomputed = (ppo_run(folders["llama"], gradient_checkpointing=on, **options) for on in (False, True))
    assert torch.equal(weights(plain.policy), weights(recomputed.policy))


def test_ppo_recomputes_activations_in_its_update(folders, monkeypatch):
    calls = []
    original = precision.checkpointing_in_eval_mode
    monkeypatch.setattr(
        precision, "checkpointing_in_eval_mode", lambda model: calls.append(len(counted(model))) or original(model)
    )

    def counted(model):
        return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]

    ppo_run(folders["llama"], gradient_checkpointing=True)
    assert calls
    assert min(calls) == 2  # layers


@pytest.mark.parametrize(
    "options", [{}, {"lora_r": 4, "lora_targets": ["all-linear"]}, {"name": "t5"}, {"name": "gpt2"}]
)
def test_ppo_in_bfloat16_starts_at_kl_0_and_ratio_1(folders, options):
    """check_first_ratio and check_first_kl raise otherwise; frozen linear layers are in bf16 meanwhile."""
    name = options.get("name", "llama")
    before = weights(load_causal(folders[name]))
    options = {key: value for key, value in options.items() if key != "name"}
    result = ppo_run(folders[name], dtype="bfloat16", **options)
    first, second = result.metrics
    assert first["objective/kl"] == 0.0
    assert first["val/ratio"] == 1.0
    assert second["objective/kl"] != 0.0
    assert all(p.dtype == torch.float32 for p in result.policy.parameters())
    if name == "llama" and not options:
        exact = ppo_run(folders[name])
        moved, moved_exact = weights(result.policy) - before, weights(exact.policy) - before
        assert torch.nn.functional.cosine_similarity(moved, moved_exact, dim=0) > 0.5
        assert not torch.equal(moved, moved_exact)


def test_halving_takes_frozen_linear_weights_alone(folders):
    model = load_causal(folders["llama"])
    precision.to_bf16(model, "float32", include_trainable=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    precision.to_bf16(model, "bfloat16")  # nothing is frozen
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.requires_grad_(False)
    precision.to_bf16(model, "bfloat16")
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding.weight:
            assert module.weight.dtype == torch.bfloat16
    assert embedding.weight.dtype == torch.float32
    precision.restore(model, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_restoring_gives_back_what_was_rounded_and_keeps_nothing_else(folders):
    model = load_causal(folders["llama"]).requires_grad_(False)
    first, second = (layer.self_attn.q_proj.weight for layer in model.model.layers)
    second.data = second.data.bfloat16().float()  # as a model that was published in bf16
    before = {name: p.clone() for name, p in model.named_parameters()}
    precision.to_bf16(model, "bfloat16", keep_fp32_copy=True)
    assert hasattr(first, precision.FP32_COPY)
    assert not hasattr(second, precision.FP32_COPY)
    precision.restore(model, "bfloat16")
    assert not hasattr(first, precision.FP32_COPY)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("again", ["in bfloat16", "in float32"])
def test_weights_loaded_after_an_aborted_stage_are_not_overwritten(folders, again):
    """An error left the rounded weights and what had been rounded away; then others were loaded into the model."""
    model = load_causal(folders["llama"]).requires_grad_(False)
    precision.to_bf16(model, "bfloat16", keep_fp32_copy=True)
    if again == "in float32":
        model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    precision.to_bf16(model, "bfloat16", keep_fp32_copy=True)
    precision.restore(model, "bfloat16")
    assert all(bool((p == 2).all()) and not hasattr(p, precision.FP32_COPY) for p in model.parameters())


@pytest.mark.parametrize(("merge", "passed", "kept"), [(False, False, 0), (True, False, 1), (False, True, 1)])
def test_only_what_somebody_will_ask_for_waits_in_memory(folders, merge, passed, kept, monkeypatch):
    seen = []
    right = precision.to_bf16

    def recording(*arguments, keep_fp32_copy=False, **options):
        seen.append(keep_fp32_copy)
        right(*arguments, keep_fp32_copy=keep_fp32_copy, **options)

    monkeypatch.setattr(precision, "to_bf16", recording)
    model = load_causal(folders["llama"]) if passed else None
    before = None if model is None else weights(model)
    options = {"model": folders["llama"], "heldout": 0, "batch_size": 4, "device": "cpu", "lora_r": 2}
    cfg = sft.SFTConfig(**options, dtype="bfloat16", merge=merge)
    examples = [Example(p, f" {p} yes") for p in WORDS.split()[:4]]
    result = sft.train_sft(cfg, model=model, tokenizer=load_tokenizer(folders["llama"]), examples=examples)
    assert seen == [bool(kept)]
    if passed:
        base = [p for n, p in result.model.named_parameters() if "lora_" not in n]
        assert torch.equal(torch.cat([p.flatten() for p in base]), before)


def test_what_does_not_fit_the_device_is_restored_on_the_cpu(folders, monkeypatch, capsys):
    model = load_causal(folders["llama"]).requires_grad_(False)
    before, moves = weights(model), []
    precision.to_bf16(model, "bfloat16", keep_fp32_copy=True)
    right = nn.Module.float

    def too_large(module):
        if not moves:
            raise torch.OutOfMemoryError("no room")
        return right(module)

    monkeypatch.setattr(nn.Module, "float", too_large)
    monkeypatch.setattr(type(model), "to", lambda model, device: moves.append(device) or model)
    precision.restore(model, "bfloat16")
    assert moves == ["cpu"]
    assert torch.equal(weights(model), before)
    assert "it is on the CPU now" in capsys.readouterr().err


ADAPTER = {"lora_r": 4, "lora_targets": ["q_proj"], "dtype": "bfloat16", "lr": 1e-2}
EXAMPLES = [Example(p, f" {p} yes") for p in WORDS.split()]
CHOICES = [Pair(p, " yes", " no no") for p in WORDS.split()]


def trained(stage, folder, **options):
    """The model after a stage in bfloat16 with LoRA."""
    if stage == "ppo":
        return ppo_run(folder, **ADAPTER, **options).policy
    options = ADAPTER | {"model": folder, "device": "cpu"} | options
    if stage == "sft":
        return sft.train_sft(sft.SFTConfig(**options), examples=EXAMPLES).model
    if stage == "reward":
        return reward.train_reward(reward.RewardConfig(**options), pairs=CHOICES).model
    return dpo.train_dpo(dpo.DPOConfig(**options), pairs=CHOICES).policy


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_merged_base_was_not_rounded(folders, stage, tmp_path):
    base = dict(load_causal(folders["llama"]).named_parameters())
    apart = trained(stage, folders["llama"])
    whole = trained(stage, folders["llama"], merge=True, output_dir=str(tmp_path))
    deltas = {n: m.get_delta_weight(MAIN) for n, m in apart.named_modules() if isinstance(m, BaseTunerLayer)}
    kept = {name.replace(".base_layer.", "."): p for name, p in apart.named_parameters() if ".lora_" not in name}
    saved, returned = load_file(tmp_path / "model.safetensors"), dict(whole.named_parameters())
    assert any(bool(delta.any()) for delta in deltas.values())
    for name in kept.keys() & base.keys():
        if stage == "ppo":  # the model was passed as an object, to be given back as it was
            assert torch.equal(kept[name], base[name])
        else:
            assert torch.equal(kept[name].bfloat16(), base[name].bfloat16())
        delta = deltas.get(name.removesuffix(".weight"), 0)
        assert torch.equal(saved[name], base[name] + delta), name
        assert torch.equal(returned[name], saved[name])


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_frozen_weights_are_rounded_before_they_go_to_the_device(folders, stage, monkeypatch):
    seen = []
    right = nn.Module.to

    def to(module, *arguments, **options):
        if isinstance(module, PreTrainedModel):
            seen.append({m.weight.dtype for n, m in module.named_modules() if n.endswith("o_proj")})
        return right(module, *arguments, **options)

    monkeypatch.setattr(nn.Module, "to", to)
    trained(stage, folders["llama"])
    assert seen
    assert seen == [{torch.bfloat16}] * len(seen)


def test_an_adapter_is_saved_before_memory_is_taken_for_float32(folders, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(precision, "restore", fail)
    with pytest.raises(MemoryError):
        trained("sft", folders["llama"], output_dir=str(tmp_path))
    assert any(bool(t.any()) for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_B" in n)


def test_sft_reward_and_dpo_take_both(folders, tmp_path):
    options = {"model": folders["llama"], "heldout": 2, "batch_size": 4, "evals": 1, "device": "cpu", "lr": 1e-3}
    options |= {"dtype": "bfloat16", "gradient_checkpointing": True}
    examples = [{"prompt": p, "completion": f" {p} yes"} for p in WORDS.split()]
    pairs = [{"prompt": p, "chosen": " yes", "rejected": " no no"} for p in WORDS.split()]
    data, pair_data = (str(write_jsonl(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate((examples, pairs)))
    metrics = sft.run(sft.Config(data=data, output_dir=str(tmp_path / "sft"), **options))
    assert math.isfinite(metrics["heldout/loss"])
    result = reward.run(reward.Config(data=pair_data, output_dir=str(tmp_path / "reward"), **options))
    assert result["heldout"]["pairs"] == 2
    answers = dpo.train_dpo(dpo.DPOConfig(data=pair_data, lora_r=4, output_dir=str(tmp_path / "dpo"), **options))
    assert all(p.dtype == torch.float32 for p in answers.policy.parameters())
    assert math.isfinite(answers.metrics["heldout/loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "--dtype float16: it takes float32, bfloat16"),
        (
            {"gradient_checkpointing": True, "value_adapter": True, "lora_r": 2},
            "--gradient_checkpointing does not go",
        ),
    ],
)
def test_options_that_cannot_work(folders, options, message):
    with pytest.raises(UserError, match=message):
        ppo_run(folders["llama"], **options)


@pytest.mark.parametrize(
    ("dtype", "fast", "warnings"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_slow_bf16_products_are_warned_of_once(folders, monkeypatch, capsys, dtype, fast, warnings):
    monkeypatch.setattr(precision, "fast_on_cpu", lambda: fast)
    ppo_run(folders["llama"], dtype=dtype, updates=1)
    assert capsys.readouterr().err.count("no fast bf16 products") == warnings
    cfg = sft.SFTConfig(model=folders["llama"], heldout=0, dtype=dtype, device="cpu")
    sft.train_sft(cfg, examples=[Example("one", " two")])
    assert capsys.readouterr().err.count("use float32 here") == warnings


def test_what_torch_says_of_this_cpu_is_asked():
    assert precision.fast_on_cpu() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
