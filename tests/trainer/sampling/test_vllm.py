"""The vLLM engine's adapter, with a fake that answers vLLM's calls on the CPU; vLLM itself needs a GPU."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM

from rlhf_trainer import PPOConfig, UserError, train_ppo
from rlhf_trainer.models import adapters
from rlhf_trainer.models.loading import load_causal, load_tokenizer, save_folder
from rlhf_trainer.onpolicy.checks import validate_options
from rlhf_trainer.sampling import vllm as rollout_vllm
from rlhf_trainer.sampling.vllm import VllmEngine, load_engine, merged_weights, to_rollout

PROMPTS = ["one", "two red blue day", "good night"]
OPTIONS = {"updates": 2, "batch_size": 6, "epochs": 1, "max_new_tokens": 5, "lr": 1e-2, "device": "cpu"}


class FakeLLM:
    """Samples with a transformers model of its own, loaded from the folder, from what vLLM would be sent."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.calls = []

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method == "reload_weights"
        own, given = dict(self.model.named_parameters()), dict(kwargs["weights_iterator"])
        assert own.keys() == given.keys()
        for name, tensor in given.items():
            own[name].data.copy_(tensor)
        self.calls.append("load")

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, prompts, sampling_params, use_tqdm=True):
        self.calls.append("generate")
        found = [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in found]

    @torch.no_grad()
    def _answer(self, prompt, params):
        assert (params.top_k, params.top_p, params.min_p, params.detokenize) == (-1, 1.0, 0.0, False)
        generator = torch.Generator().manual_seed(params.seed)
        answer = []
        while len(answer) < params.max_tokens and not (answer and answer[-1] in params.stop_token_ids):
            logits = self.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]
            answer.append(int(torch.multinomial((logits / params.temperature).softmax(-1), 1, generator=generator)))
        return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("vllm") / "base")


@pytest.fixture
def engine(folder, monkeypatch):
    """`--rollout_engine vllm` with the fake in vLLM's place."""
    made = []
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found" if name == "vllm" else found(name))
    monkeypatch.setattr(rollout_vllm, "sampling_params", SimpleNamespace)
    monkeypatch.setattr(rollout_vllm, "make_llm", lambda path, device, **_: made.append(FakeLLM(path)) or made[-1])
    monkeypatch.setattr(VllmEngine.__init__, "__defaults__", (SimpleNamespace,))
    return made


@pytest.mark.parametrize("lora", [{}, {"lora_r": 4, "lora_targets": ["all-linear"]}], ids=["whole", "lora"])
def test_ppo_samples_from_the_weights_as_they_are(folder, engine, lora):
    """The fake's model equals the policy at every rollout: KL is 0 at step 1, and its weights moved before step 2."""
    cfg = PPOConfig(model=folder, rollout_engine="vllm", **OPTIONS, **lora)
    policies = []

    def keep(done, policy):
        policies.append({name: tensor.clone() for name, tensor in merged_weights(policy)})

    result = train_ppo(cfg, reward=lambda p, c: [float(len(x)) for x in c], prompts=PROMPTS, on_update=keep)
    (llm,) = engine
    assert llm.calls == ["load", "reset", "generate"] * 2
    assert result.metrics[0]["objective/kl"] == 0.0
    for name, parameter in llm.model.named_parameters():  # what it sampled the second rollout with
        torch.testing.assert_close(parameter.data, policies[0][name], rtol=0, atol=0)
    assert any(not torch.equal(policies[0][name], policies[1][name]) for name in policies[0])


@pytest.mark.parametrize("wider", [False, True], ids=["alone", "beside one of more layers"])
def test_merged_weights_are_those_of_a_merged_model(folder, tmp_path, wider):
    targets = ["q_proj"] if wider else ["all-linear"]
    policy = adapters.add_adapter(load_causal(folder), PPOConfig(model=folder, lora_r=4, lora_targets=targets).lora)
    if wider:  # as a reward model's on the policy's base may be
        other = adapters.add_adapter(load_causal(folder), PPOConfig(lora_r=2, lora_targets=["all-linear"]).lora)
        save_folder(tmp_path / "other", other, load_tokenizer(folder))
        adapters.attach(policy, adapters.adapter_folder(tmp_path / "other"), adapters.REWARD, trained=False)
    for name, parameter in adapters.parameters_of(policy, adapters.MAIN).items():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    sent = {name: tensor.clone() for name, tensor in merged_weights(policy)}
    adapters.merge(policy)
    merged = dict(policy.named_parameters())
    assert sent.keys() == merged.keys()
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-7)


def test_ids_in_and_out_with_stops_and_lengths(folder):
    tokenizer = load_tokenizer(folder)
    eos, stop = tokenizer.eos_token_id, tokenizer(" red", add_special_tokens=False)["input_ids"][0]
    answers = [[7, 8, eos], [9, stop], [5, 6, 7, 8]]
    found = to_rollout(tokenizer, PROMPTS, [[1, 5], [1, 5, 6, 7], [1]], answers, [eos, stop], torch.device("cpu"))
    assert found.prompt_length == 4
    assert found.ids[0].tolist() == [0, 0, 1, 5, 7, 8, eos, 0]
    assert found.response_mask.sum(1).tolist() == [3, 2, 4]
    assert found.ended.tolist() == [True, True, False]
    assert [row[keep].tolist() for row, keep in zip(found.responses, found.response_mask, strict=True)] == answers
    texts = [tokenizer.decode(answer) for answer in ([7, 8], [9], [5, 6, 7, 8])]
    assert found.completions == texts
    empty = to_rollout(tokenizer, PROMPTS[:1], [[1, 5]], [[]], [eos], torch.device("cpu"))
    assert (empty.responses.shape, int(empty.response_mask.sum()), empty.completions) == ((1, 1), 0, [""])


def test_another_seed_for_every_request_and_rollout(folder):
    llm, seen = FakeLLM(folder), []
    engine = VllmEngine(llm, lambda **options: seen.append(options["seed"]) or SimpleNamespace(**options))
    policy, tokenizer, generator = load_causal(folder), load_tokenizer(folder), torch.Generator().manual_seed(0)
    sampling = {"max_new_tokens": 4, "temperature": 0.7, "stop_token": None, "group_size": 1}
    for _ in range(2):
        found = engine.generate(policy, tokenizer, ["one"] * 8, generator=generator, **sampling)
    assert len(set(seen)) == 16
    assert len(set(found.completions)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_engine": "sglang"}, "--rollout_engine sglang: it takes hf, vllm"),
        ({"vllm_memory": 1.5}, "--vllm_memory 1.5: must be between 0 and 1"),
        ({"rollout_engine": "vllm"}, r"needs vLLM and a GPU: pip install 'rlhf-kernels\[vllm\]'"),
    ],
)
def test_bad_options(options, message, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(UserError, match=message):
        validate_options(PPOConfig(**options))


def test_policies_that_vllm_cannot_load(folder, engine):
    options = {"group_size": 1, "gather": True, "vllm_memory": 0.3, "seed": 0, "trust_remote_code": False}
    grown, tokenizer = load_causal(folder), load_tokenizer(folder)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="save it with them first"):
        load_engine("vllm", load_causal(folder, tokenizer), **options)
    grown.config.name_or_path = ""
    with pytest.raises(UserError, match="made in memory"):
        load_engine("vllm", grown, **options)
    assert not engine


def test_without_a_gpu_one_sentence(folder):
    with pytest.raises(UserError, match="needs the policy on a GPU, and it is on cpu"):
        rollout_vllm.make_llm(folder, torch.device("cpu"), vllm_memory=0.3, seed=0, trust_remote_code=False)
