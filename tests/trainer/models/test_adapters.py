"""LoRA: peft's folders, every stage from an adapter, PPO on one base with many adapters, bits after a resume."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trainer import PPOConfig, dpo, reward, sft, train_ppo
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import write_jsonl
from rlhf_trainer.data.rows import encode_prompt
from rlhf_trainer.judging.rewards import load_reward
from rlhf_trainer.models import adapters
from rlhf_trainer.models.adapters import MAIN, REFERENCE, Adapter, use_adapter
from rlhf_trainer.models.loading import load_causal, load_tokenizer
from rlhf_trainer.onpolicy.value_head import load_value_head

WORDS = ("one", "two", "red", "blue")
EXAMPLES = [{"prompt": f"{a} {b}", "completion": f" {b} {a}"} for a in WORDS for b in ("day", "good")]
PAIRS = [{"prompt": f"{a} {b}", "chosen": " thanks yes", "rejected": " fool no"} for a in WORDS for b in WORDS]
PROMPTS = [f"{a} {b}" for a in WORDS for b in WORDS]
TIMES = ("eps", "tokens_per_second", "seconds/rollout", "seconds/scoring", "seconds/update")
LORA = {"lora_r": 4, "lora_targets": ["all-linear"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("lora") / "base")


def run_sft(model, output, **options):
    data = str(write_jsonl(output.parent / "examples.jsonl", EXAMPLES))
    defaults = {"model": str(model), "data": data, "heldout": 0, "batch_size": 4, "lr": 1e-2, "device": "cpu"}
    sft.run(sft.Config(**{**defaults, "output_dir": str(output), **options}))
    return output


def run_reward(model, output, **options):
    data = str(write_jsonl(output.parent / "pairs.jsonl", PAIRS))
    defaults = {"model": str(model), "data": data, "heldout": 0, "batch_size": 4, "lr": 1e-2, "device": "cpu"}
    reward.run(reward.Config(**{**defaults, "output_dir": str(output), **options}))
    return output


@pytest.fixture(scope="module")
def sft_adapter(base, tmp_path_factory):
    return run_sft(base, tmp_path_factory.mktemp("sft") / "adapter", **LORA)


@pytest.fixture(scope="module")
def reward_adapter(base, tmp_path_factory):
    return run_reward(base, tmp_path_factory.mktemp("reward") / "adapter", **LORA)


def letters(prompts, completions):
    return [float(text.count("e")) for text in completions]


def ppo(model, output="", function=letters, on_update=None, **options):
    defaults = {"updates": 2, "batch_size": 8, "max_new_tokens": 6, "lr": 1e-2, "kl_coef": 0.1, "device": "cpu"}
    cfg = PPOConfig(**{**defaults, "model": str(model), "output_dir": str(output), **options})
    return train_ppo(cfg, reward=function, prompts=PROMPTS, on_update=on_update)


def logits(model, folder):
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([encode_prompt(tokenizer, "one red day")])
    with torch.no_grad():
        return model.eval()(ids).logits


# Folders


def test_sft_leaves_a_folder_that_peft_and_transformers_load(base, sft_adapter):
    names = {path.name for path in sft_adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    ours = logits(load_causal(sft_adapter), sft_adapter)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(ours, logits(plain, base), atol=1e-2)
    assert torch.equal(ours, logits(PeftModel.from_pretrained(plain, sft_adapter), base))
    assert torch.equal(ours, logits(AutoModelForCausalLM.from_pretrained(sft_adapter), base))


def test_only_the_adapter_is_trained(base, sft_adapter):
    before = load_file(f"{base}/model.safetensors")
    model = load_causal(sft_adapter)
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name and name != "lm_head.weight":
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_merging_writes_an_ordinary_folder(base, sft_adapter, tmp_path):
    merged = run_sft(base, tmp_path / "merged", merge=True, **LORA)
    assert not (merged / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not adapters.has_adapter(plain)
    torch.testing.assert_close(logits(plain, merged), logits(load_causal(sft_adapter), base), atol=1e-5, rtol=1e-5)


def test_a_whole_model_written_over_an_adapter_replaces_it(base, tmp_path):
    out = run_sft(base, tmp_path / "out", **LORA)
    run_sft(base, out, overwrite=True)
    assert not (out / "adapter_config.json").exists()
    assert not adapters.has_adapter(load_causal(out))


@pytest.mark.parametrize("arch", ["gpt2", "qwen2"])
def test_peft_chooses_the_targets_of_an_architecture(arch, tmp_path):
    folder = tiny_folder(tmp_path / arch, arch)
    out = run_sft(folder, tmp_path / "adapter", lora_r=2)
    targets = set(json.loads((out / "adapter_config.json").read_text())["target_modules"])
    assert targets == {"gpt2": {"c_attn"}, "qwen2": {"q_proj", "v_proj"}}[arch]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(load_causal(out), out), logits(PeftModel.from_pretrained(plain, out), out))


def test_an_added_pad_token_comes_back_with_the_adapter(base, tmp_path):
    folder = tiny_folder(tmp_path / "nopad")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    result = ppo(folder, tmp_path / "out", pad_token="<extra>", updates=1, **LORA)
    again = load_tokenizer(tmp_path / "out")
    assert again.pad_token == "<extra>"
    loaded = load_causal(tmp_path / "out", again)
    assert torch.equal(logits(loaded, tmp_path / "out"), logits(result.policy, tmp_path / "out"))


def test_training_goes_on_from_an_adapter(base, sft_adapter, tmp_path):
    more = run_sft(sft_adapter, tmp_path / "more")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (sft_adapter, more))
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((more / "adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_dropout_is_for_training_alone(base, tmp_path):
    """Held-out loss of a model that cannot move (lr tiny) is the same at every evaluation, whatever the dropout."""
    options = {"heldout": 4, "evals": 2, "lr": 1e-30, "lora_dropout": 0.5, "epochs": 2}
    out = run_sft(base, tmp_path / "out", **options, **LORA)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["heldout/loss"] for row in rows if "heldout/loss" in row]
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_reward_adapter_scores_as_it_was_trained(base, reward_adapter):
    figures = json.loads((reward_adapter / "reward.json").read_text())
    scores = load_reward(str(reward_adapter))
    chosen = scores([p["prompt"] for p in PAIRS], [p["chosen"] for p in PAIRS])
    rejected = scores([p["prompt"] for p in PAIRS], [p["rejected"] for p in PAIRS])
    assert all(a > b for a, b in zip(chosen, rejected, strict=True))
    assert sum(chosen + rejected) / (2 * len(PAIRS)) == pytest.approx(0, abs=1e-4)  # normalised on these pairs
    assert figures["reference_std"] > 0
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = PeftModel.from_pretrained(plain, reward_adapter)
    head = load_file(reward_adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(theirs.base_model.model.score.modules_to_save["default"].weight, head)


def test_a_reward_model_starts_from_an_sft_adapter(sft_adapter, base, tmp_path):
    out = run_reward(sft_adapter, tmp_path / "reward")
    tensors = load_file(out / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in tensors
    before = load_file(sft_adapter / "adapter_model.safetensors")
    assert before.keys() == tensors.keys() - {"base_model.model.score.weight"}
    assert len(load_reward(str(out))(PROMPTS, PROMPTS)) == len(PROMPTS)


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_dpo_trains_an_adapter_against_its_own_start(start, base, sft_adapter, tmp_path):
    data = str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))
    model = {"model": base, **LORA} if start == "base" else {"model": str(sft_adapter)}
    options = {"data": data, "output_dir": str(tmp_path / "out"), "heldout": 0, "batch_size": 4, "lr": 1e-2}
    dpo.run(dpo.Config(**model, **options, device="cpu"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)  # policy and reference are the same at first
    assert rows[-1]["rewards/margins"] > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


# PPO


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_kl_is_zero_at_step_1_and_the_base_never_moves(start, base, sft_adapter):
    result = ppo(**({"model": base, **LORA} if start == "base" else {"model": sft_adapter}))
    assert result.metrics[0]["objective/kl"] == 0.0
    assert result.metrics[1]["objective/kl"] != 0.0
    before = load_file(f"{base}/model.safetensors")
    moved = 0
    for name, parameter in result.policy.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
            assert not parameter.requires_grad
        moved += f".{MAIN}." in name and ".lora_B." in name and bool(parameter.any())
    assert moved > 0
    if start == "adapter":  # the reference is the adapter that training began with
        kept = adapters.parameters_of(result.policy, REFERENCE)
        saved = load_file(sft_adapter / "adapter_model.safetensors")
        assert kept
        for name, parameter in kept.items():
            assert torch.equal(parameter, saved["base_model.model." + name.replace(f".{REFERENCE}.", ".")])


def test_the_reference_is_a_model_of_its_own_to_the_bit(base):
    """Adapters off against a separate copy of the base: every metric of every update is the same."""
    shared = ppo(base, updates=3, **LORA)
    separate = train_ppo(
        PPOConfig(updates=3, batch_size=8, max_new_tokens=6, lr=1e-2, kl_coef=0.1, device="cpu", model=base, **LORA),
        ref_model=load_causal(base),
        reward=letters,
        prompts=PROMPTS,
    )
    for one, other in zip(shared.metrics, separate.metrics, strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}


def test_policy_reference_and_reward_share_one_base(base, reward_adapter, monkeypatch):
    loads = []
    right = AutoModelForCausalLM.from_pretrained.__func__

    def counted(cls, *arguments, **options):
        loads.append(arguments)
        return right(cls, *arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(counted))
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)  # must not be needed
    result = ppo(base, function=None, reward=str(reward_adapter), **LORA)
    assert len(loads) == 1
    assert set(result.policy.peft_config) == {MAIN, adapters.REWARD}
    assert result.metrics[0]["objective/kl"] == 0.0


def test_a_shared_reward_scores_as_a_separate_one(base, sft_adapter, reward_adapter):
    policy = load_causal(sft_adapter).eval()
    shared = load_reward(str(reward_adapter), base=policy)
    before = logits(policy, base)
    completions = [f" {word} yes" for word in WORDS]
    assert shared(PROMPTS[:4], completions) == load_reward(str(reward_adapter))(PROMPTS[:4], completions)
    assert torch.equal(logits(policy, base), before)  # the policy's own adapter is on again


def test_switching_changes_no_requires_grad(sft_adapter, base):
    model = load_causal(sft_adapter)
    reference = adapters.copy_adapter(model, MAIN, REFERENCE)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name for name, flag in flags.items() if flag} == adapters.parameters_of(model, MAIN).keys()
    plain = logits(load_causal(base), base)
    for view in (reference, Adapter(model, None)):
        with use_adapter(view) as inside:
            assert {name: parameter.requires_grad for name, parameter in inside.named_parameters()} == flags
            assert torch.equal(logits(inside, base), plain) == (view.name is None)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_resumed_to_the_bit(start, base, sft_adapter, reward_adapter, tmp_path):
    options = {"model": base, **LORA} if start == "base" else {"model": sft_adapter}
    options |= {"function": None, "reward": str(reward_adapter), "updates": 4, "save_every": 2}
    whole = ppo(output=tmp_path / "whole", **options)

    def killed(done, policy):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ppo(output=tmp_path / "cut", on_update=killed, **options)
    saved = load_file(tmp_path / "cut" / "checkpoints" / "step-00000002" / "policy.safetensors")
    assert saved.keys() == adapters.parameters_of(whole.policy, MAIN).keys()  # nothing of the base
    ppo(output=tmp_path / "cut", resume=True, **options)
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_changed_base_is_not_resumed(tmp_path):
    folder = tiny_folder(tmp_path / "base")
    ppo(folder, tmp_path / "out", save_every=1, updates=2, **LORA)
    tiny_folder(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match=r"the model changed \(weights\)"):
        ppo(folder, tmp_path / "out", save_every=1, updates=2, resume=True, **LORA)


def test_merged_policy_is_an_ordinary_folder(base, tmp_path):
    result = ppo(base, tmp_path / "out", merge=True, **LORA)
    assert not adapters.has_adapter(result.policy)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain, base), logits(result.policy, base))


# The value's own adapter


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_the_value_has_an_adapter_of_its_own(start, base, sft_adapter, tmp_path):
    options = {"model": base, **LORA} if start == "base" else {"model": sft_adapter}
    result = ppo(output=tmp_path / "out", value_adapter=True, vf_coef=0.5, **options)
    assert result.metrics[0]["objective/kl"] == 0.0
    main, value = (adapters.parameters_of(result.policy, name) for name in (MAIN, adapters.VALUE))
    assert len(main) == len(value)
    assert not adapters.same_adapters(result.policy, MAIN, adapters.VALUE)
    assert any(bool(p.any()) for name, p in value.items() if ".lora_B." in name)
    before = load_file(f"{base}/model.safetensors")
    for name, parameter in result.policy.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
    # peft's folder holds the policy alone, and the next run goes on with the value that this one ended with
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == len(main)
    again = ppo(tmp_path / "out", value_adapter=True, updates=1, lr=1e-9, value_lr=1e-9)
    for name, parameter in adapters.parameters_of(again.policy, adapters.VALUE).items():
        torch.testing.assert_close(parameter, value[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(again.value_head.linear.weight, result.value_head.linear.weight, rtol=0, atol=1e-6)
    other = ppo(tmp_path / "out", updates=1, lr=1e-9, value_lr=1e-9)  # the head of other states is not taken over
    assert not torch.allclose(other.value_head.linear.weight, result.value_head.linear.weight, atol=1e-3)


def test_the_value_loss_moves_the_values_adapter_and_not_the_policys(base):
    policy = adapters.add_adapter(load_causal(base), PPOConfig(model=base, **LORA).lora)
    head = load_value_head(policy, torch.device("cpu"), folder="", own_adapter=True)
    torch.nn.init.ones_(head.linear.weight)  # of zeros no gradient reaches the states
    ids = torch.tensor([[5, 6, 7, 8]])
    head.values(policy, torch.empty(0), ids, torch.ones_like(ids).bool(), 2).sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved
    assert moved <= adapters.parameters_of(policy, adapters.VALUE).keys()
    hidden = torch.randn(1, 2, 32)
    plain = load_value_head(policy, torch.device("cpu"), folder="")
    torch.testing.assert_close(plain.values(policy, hidden, ids, ids > 0, 2), plain(hidden))


def test_a_run_with_a_value_adapter_is_resumed_to_the_bit(base, tmp_path):
    options = {"model": base, "value_adapter": True, "updates": 3, "save_every": 1, **LORA}
    ppo(output=tmp_path / "whole", **options)

    def killed(done, policy):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ppo(output=tmp_path / "cut", on_update=killed, **options)
    ppo(output=tmp_path / "cut", resume=True, **options)
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--value_adapter needs a policy that is an adapter"),
        ({**LORA, "advantage": "rloo", "group_size": 2}, "--advantage rloo has no value function"),
        ({**LORA, "gradient_checkpointing": True}, "--gradient_checkpointing does not go with --value_adapter"),
    ],
)
def test_a_value_adapter_that_cannot_be(base, options, message):
    with pytest.raises(UserError, match=message):
        ppo(base, value_adapter=True, **options)


def test_a_named_reference_over_the_same_base_is_no_copy(base, sft_adapter):
    result = ppo(sft_adapter, ref_model=base)  # the SFT adapter is away from its base
    assert result.metrics[0]["objective/kl"] != 0.0
    assert set(result.policy.peft_config) == {MAIN}
    result = ppo(base, ref_model=str(sft_adapter), **LORA)
    assert set(result.policy.peft_config) == {MAIN, REFERENCE}


# What is refused


def broken(folder, tmp_path, **changes):
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "/gone/away"}, "its base model /gone/away is gone"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"peft_type": "IA3"}, "only LoRA is supported"),
        ({"modules_to_save": ["lm_head"]}, "merge it with peft first"),
        ({"r": 2}, "the adapter does not fit its base"),
    ],
)
def test_bad_adapters(changes, message, sft_adapter, tmp_path):
    if changes.get("peft_type") == "IA3":
        changes |= {"r": None}
    with pytest.raises(UserError, match=message):
        load_causal(broken(sft_adapter, tmp_path, **changes))


def test_an_adapter_without_all_its_tensors(sft_adapter, tmp_path):
    folder = broken(sft_adapter, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the adapter does not fit its base"):
        load_causal(folder)


def test_an_sft_adapter_is_no_reward_model(sft_adapter, base):
    with pytest.raises(UserError, match="has no `score` head, so that it is no reward model"):
        load_reward(str(sft_adapter))
    with pytest.raises(UserError, match="has no `score` head, so that it is no reward model"):
        load_reward(str(sft_adapter), base=load_causal(sft_adapter))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": -1}, "--lora_r -1: must be at least 0"),
        ({"lora_r": 4, "lora_alpha": 0}, "--lora_alpha 0: must be at least 1"),
        ({"lora_r": 4, "lora_dropout": 1.0}, "--lora_dropout 1.0: must be"),
        ({"lora_r": 4, "lora_targets": ["no_such"]}, "--lora_targets: .*no_such.* not found"),
    ],
)
def test_bad_options(options, message, base, tmp_path):
    with pytest.raises(UserError, match=message):
        run_sft(base, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_lora_on_an_adapter_or_into_its_base_is_refused(base, sft_adapter, tmp_path):
    with pytest.raises(UserError, match="--lora_r 4: the model is an adapter already"):
        run_sft(sft_adapter, tmp_path / "out", **LORA)
    with pytest.raises(UserError, match="the adapter needs its base, which lies there"):
        ppo(base, base, **LORA)
