"""head_of on tiny models of every kind of head: loss and gradients equal those of the model's own logits."""

from __future__ import annotations

import copy
import gc
import weakref
from fractions import Fraction

import pytest
import torch
from support import programs
from support.head_models import MODELS, V, made
from torch import Tensor, nn

import rlhf_kernels as rk
from rlhf_kernels.heads import ModelHead

transformers = pytest.importorskip("transformers")


def inputs_of(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The call's inputs, labels and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (2, 7), generator=generator)
    attention = torch.ones(2, 7, dtype=torch.long)
    attention[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": attention}
    if model.config.is_encoder_decoder:
        target = torch.randint(0, V, (2, 5), generator=generator)
        return {**inputs, "decoder_input_ids": target}, target.roll(-1, 1), torch.ones(2, 5, dtype=torch.bool)
    mask = attention.bool().clone()
    mask[:, -1] = False
    return inputs, ids.roll(-1, 1), mask & attention.bool()


def assert_equal_to_own_logits(model: nn.Module) -> None:
    inputs, labels, mask = inputs_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    log_p = model(**inputs).logits.log_softmax(-1)
    own = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    expected = torch.autograd.grad(-own[mask].mean(), parameters, allow_unused=True)

    head = rk.head_of(model)
    hidden = head.hidden_states(**inputs)
    logprobs = rk.linear_logprobs(hidden, labels=labels, mask=mask, **head.options())
    torch.testing.assert_close(logprobs[mask], own[mask].detach(), rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(-logprobs[mask].mean(), parameters, allow_unused=True)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    loss = rk.linear_cross_entropy(head.hidden_states(**inputs), labels=labels, mask=mask, **head.options())
    torch.testing.assert_close(loss, -own[mask].mean().detach(), rtol=1e-4, atol=1e-5)
    # The model is as it was.
    torch.testing.assert_close(model(**inputs).logits.log_softmax(-1), log_p.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_logits(name: str) -> None:
    assert_equal_to_own_logits(made(name))


def with_lora(name: str, targets: list[str], saved: list[str] | None = None, **options: object) -> nn.Module:
    """A model under PEFT, its adapters filled."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=saved, **options)
    wrapped = peft.get_peft_model(made(name), config)
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


LORA = {
    "backbone": ("llama tied", ["q_proj"], None, {}),
    "head of llama": ("llama", ["q_proj", "lm_head"], None, {}),
    "tied head": ("llama tied", ["q_proj", "lm_head"], None, {}),
    "head of gpt2": ("gpt2", ["c_attn", "lm_head"], None, {}),
    "softcap": ("gemma2", ["q_proj", "lm_head"], None, {"use_rslora": True}),
    "bias of the adapter": ("phi", ["q_proj", "lm_head"], None, {"lora_bias": True}),
    "t5": ("t5", ["q", "lm_head"], None, {}),
    "trained copy": ("llama", ["q_proj"], ["lm_head"], {}),
}


@pytest.mark.parametrize("case", LORA)
def test_under_lora(case: str) -> None:
    """Loss and gradients of A, B and the backbone's adapters as in the model's own logits; also with adapters off."""
    name, targets, saved, options = LORA[case]
    wrapped = with_lora(name, targets, saved, **options)
    assert_equal_to_own_logits(wrapped)
    head = rk.head_of(wrapped)
    inputs, labels, mask = inputs_of(wrapped)
    head.hidden_states(**inputs)
    found = head.options()
    assert (found["lora"] is not None) == ("lm_head" in targets)
    if "lm_head" in targets:  # the model's own parameters, nothing merged
        assert {x.data_ptr() for x in (found["weight"], *found["lora"][0][:2])} <= {
            x.data_ptr() for x in wrapped.parameters()
        }
    with wrapped.disable_adapter():
        hidden = head.hidden_states(**inputs)
        logprobs = rk.linear_logprobs(hidden, labels=labels, mask=mask, **head.options())
        own = wrapped(**inputs).logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(logprobs[mask], own[mask], rtol=1e-4, atol=1e-5)


def test_two_adapters_and_a_16_bit_base() -> None:
    """PEFT keeps adapters in float32 beside a bfloat16 base; two may be active."""
    peft = pytest.importorskip("peft")
    model = made("llama").bfloat16()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"])
    wrapped = peft.get_peft_model(model, config)
    wrapped.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=1, target_modules=["lm_head"]))
    wrapped.base_model.set_adapter(["default", "other"])
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.requires_grad_(), std=0.3)
    inputs, labels, mask = inputs_of(wrapped)
    head = rk.head_of(wrapped)
    hidden = head.hidden_states(**inputs)
    options = head.options()
    assert [(a.dtype, b.dtype, scale) for a, b, scale in options["lora"]] == [
        (torch.float32, torch.float32, 2.0),
        (torch.float32, torch.float32, 0.5),
    ]
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    own = wrapped(**inputs).logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    expected = torch.autograd.grad(own[mask].mean(), parameters)
    logprobs = rk.linear_logprobs(hidden, labels=labels, mask=mask, **options)
    grads = torch.autograd.grad(logprobs[mask].mean(), parameters)
    torch.testing.assert_close(logprobs[mask], own[mask].detach(), rtol=0, atol=0.1)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.03 * b.abs().max().item())


def test_adapters_that_are_not_known() -> None:
    dora = with_lora("llama", ["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="adapter 'default' on the head uses DoRA; only plain LoRA is known"):
        rk.head_of(dora).options()
    dora.base_model.model.lm_head.lora_variant = {}  # PEFT before 0.16 had only use_dora
    with pytest.raises(ValueError, match="uses DoRA"):
        rk.head_of(dora).options()
    dora.base_model.model.lm_head.use_dora = {}
    dora.base_model.model.lm_head.lora_variant = {"default": Fraction()}  # one that is not known here
    with pytest.raises(ValueError, match="uses Fraction"):
        rk.head_of(dora).options()
    dropout = with_lora("llama", ["lm_head"], lora_dropout=0.1)
    assert rk.head_of(dropout.eval()).options()["lora"]
    with pytest.raises(ValueError, match="uses dropout"):
        rk.head_of(dropout.train()).options()


def test_a_model_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And forgotten with its last reference; a copy, another class or another factor in the config is asked again."""
    probes = []
    check = ModelHead._check
    monkeypatch.setattr(ModelHead, "_check", lambda head, found: probes.append(found) or check(head, found))
    model = made("granite")
    inputs, _, _ = inputs_of(model)
    assert_equal_to_own_logits(model)
    for _ in range(2):
        assert rk.head_of(model).options()["logit_scale"] == 0.25
        rk.head_of(model).hidden_states(**inputs)
    assert len(probes) == 1
    rk.head_of(copy.deepcopy(model)).hidden_states(**inputs)
    assert len(probes) == 2
    model.config.logits_scaling = model.logits_scaling = 8.0
    assert_equal_to_own_logits(model)
    model.__class__ = type("Other", (type(model),), {})
    assert_equal_to_own_logits(model)
    assert len(probes) == 4
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_adapters_that_come_and_go_after_the_probe() -> None:
    """What is remembered of a model is no adapter, layer or weight."""
    peft = pytest.importorskip("peft")
    model = made("granite")
    assert_equal_to_own_logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    for adapter in ("default", "other"):
        wrapped.set_adapter(adapter)
        assert_equal_to_own_logits(wrapped)
    wrapped.merge_adapter()
    inputs, labels, mask = inputs_of(wrapped)
    for changed in (wrapped, wrapped.unload()):
        head = rk.head_of(changed)
        hidden = head.hidden_states(**inputs)
        own = changed(**inputs).logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        logprobs = rk.linear_logprobs(hidden, labels=labels, mask=mask, **head.options())
        torch.testing.assert_close(logprobs[mask], own[mask], rtol=1e-4, atol=1e-5)


def test_under_wrappers_that_hide_the_model() -> None:
    class Wrapper(nn.Module):
        """As DistributedDataParallel: the model is `module`."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: object, **kwargs: object) -> object:
            return self.module(*args, **kwargs)

    model = made("llama")
    inputs, _, _ = inputs_of(model)
    expected = rk.head_of(model).hidden_states(**inputs)
    assert torch.equal(rk.head_of(Wrapper(Wrapper(model))).hidden_states(**inputs), expected)
    assert torch.equal(rk.head_of(torch.compile(model, backend="eager")).hidden_states(**inputs), expected)


def test_shared_by_two_processes() -> None:
    """Each rank's loss and the reduced gradients; a DTensor head gathered, and as the shard of the vocabulary."""
    pytest.importorskip("accelerate")
    cases = ["ddp", "accelerate", "fsdp", "fsdp_head", "dtensor"]
    done = programs.run("head_ranks", *cases)
    assert done.returncode == 0, done.stderr[-3000:]


def test_under_accelerates_hooks() -> None:
    """A hook replaces the module's own forward; it is back afterwards."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = made("llama")
    inputs, _, _ = inputs_of(model)
    expected = model(**inputs).logits
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    rk.head_of(model).hidden_states(**inputs)
    assert torch.equal(model(**inputs).logits, expected)


def test_what_it_cannot_find_is_said() -> None:
    with pytest.raises(TypeError, match="Linear has no get_output_embeddings"):
        rk.head_of(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        rk.head_of(made("llama").model)
    model = made("llama")
    inner = type(model).forward

    class Shifted(type(model)):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = inner(self, *args, **kwargs)
            output.logits = output.logits + 7
            return output

    model.__class__ = Shifted
    with pytest.raises(ValueError, match=r"into logits \[8.0, 4103.0\]"):
        rk.head_of(model).hidden_states(**inputs_of(model)[0])
    head = rk.head_of(made("granite"))
    with pytest.raises(ValueError, match="call hidden_states first"):
        head.options()


def test_no_logits_are_made() -> None:
    """The largest tensor of training on a wide vocabulary is no [B, T, V]."""
    model = copy.deepcopy(made("llama"))
    inputs, _, _ = inputs_of(model)
    calls = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: calls.append(tuple(output.shape)))
    rk.head_of(model).hidden_states(**inputs)
    assert calls == [(2, 7, 2)]


@pytest.mark.parametrize("name", ["llama tied", "gemma2"])
def test_compiled_model_with_the_op_inside(name: str) -> None:
    """Backbone and loss in one graph; loss and gradients as without torch.compile."""
    model = made(name)
    inputs, labels, mask = inputs_of(model)
    head = rk.head_of(model)
    head.hidden_states(**inputs)  # finds softcap and factor
    scalars = {"softcap": head.softcap, "logit_scale": head.logit_scale}

    def step(ids: Tensor, attention: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        return rk.linear_cross_entropy(hidden, model.lm_head.weight, labels, mask, **scalars)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    parameters = list(model.parameters())
    arguments = (inputs["input_ids"], inputs["attention_mask"], labels, mask)
    expected, got = step(*arguments), compiled(*arguments)
    torch.testing.assert_close(got, expected)
    pairs = zip(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
