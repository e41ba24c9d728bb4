"""Folders from elsewhere: odd, damaged and malicious ones are refused in a sentence, and run nothing."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_folder

from rlhf_trainer.base.console import say_once
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.folders import BASE_RECORD
from rlhf_trainer.models.adapters import MAIN, LoraOptions, add_adapter, parameters_of
from rlhf_trainer.models.loading import load_causal, load_reward_model, load_tokenizer, save_folder
from rlhf_trainer.onpolicy.value_head import VALUE_HEAD, load_value_head


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model in `base` and an adapter over it in `adapter`."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_folder(folder / "base")
    tokenizer = load_tokenizer(folder / "base")
    model = add_adapter(load_causal(folder / "base", tokenizer), LoraOptions(2, 4, []))
    save_folder(folder / "adapter", model, tokenizer)
    return folder


@pytest.fixture
def place(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    edit(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(copy / "base"))
    return copy


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def only_pickled(folder, place, name):
    (place / folder / name.replace("pytorch_", "").replace(".bin", ".safetensors")).unlink()
    (place / folder / name).write_bytes(pickle.dumps(Attack(place / "attacked")))


def with_code(place):
    (place / "base" / "evil.py").write_text(f"open({str(place / 'attacked')!r}, 'w')\nclass E: pass\n")
    edit(place / "base" / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.E"})


def with_code_in_the_tokenizer(place):
    (place / "base" / "evil.py").write_text(f"open({str(place / 'attacked')!r}, 'w')\nclass E: pass\n")
    (place / "base" / "tokenizer.json").unlink()
    edit(place / "base" / "tokenizer_config.json", tokenizer_class="E", auto_map={"AutoTokenizer": ["evil.E", None]})


def with_an_index(name):
    def make(place):
        weights = place / "base" / "model.safetensors"
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), name)}
        weights.rename(place / "outside.safetensors")
        (place / "base" / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def config(**changes):
    return lambda place: edit(place / "base" / "config.json", **changes)


def adapter_config(**changes):
    return lambda place: edit(place / "adapter" / "adapter_config.json", **changes)


def written(name, content):
    return lambda place: (place / name).write_bytes(content)


def cut(name):
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-100])


FOLDERS = {
    "pickled weights": (lambda p: only_pickled("base", p, "pytorch_model.bin"), "runs code when it is read"),
    "a pickled adapter": (lambda p: only_pickled("adapter", p, "adapter_model.bin"), "runs code when it is read"),
    "code": (with_code, "cannot load a model"),
    "code of a tokenizer": (with_code_in_the_tokenizer, "cannot load a tokenizer"),
    "a kernel to fetch": (config(attn_implementation="someone/kernel"), "would fetch code to run"),
    "kernels to fetch": (config(_attn_implementation={"": "someone/kernel"}), "would fetch code to run"),
    "an index that leads out": (with_an_index("../outside.safetensors"), "only files beside it may be named"),
    "an absolute index": (with_an_index("/etc/passwd"), "only files beside it may be named"),
    "an index of numbers": (with_an_index(3), "only files beside it may be named"),
    "cut weights": (cut("base/model.safetensors"), "model.safetensors: damaged, or no safetensors file"),
    "garbage weights": (written("base/model.safetensors", b"garbage" * 9), "damaged, or no safetensors file"),
    "no weights": (lambda p: (p / "base/model.safetensors").unlink(), "cannot load a language model"),
    "a list for a config": (written("base/config.json", b"[1]"), "config.json: expected a JSON object, got list"),
    "no JSON": (written("base/config.json", b"{"), "config.json: not JSON"),
    "deep JSON": (written("base/config.json", b"[" * 100_000), "config.json: not JSON"),
    "an architecture that is a number": (config(architectures=3), "architectures is 3, expected a list of names"),
    "no heads": (config(num_attention_heads=0), "cannot load a "),
    "a size that is a text": (config(hidden_size="many"), "cannot load a "),
    "a negative size": (config(hidden_size=-32), "cannot load a "),
    "an unknown type": (config(model_type="nosuch"), "cannot load a model"),
    "a tokenizer that is a list": (written("base/tokenizer.json", b"[]"), "cannot load a tokenizer"),
    "cut adapter": (cut("adapter/adapter_model.safetensors"), "damaged, or no safetensors file"),
    "an adapter's config as a list": (written("adapter/adapter_config.json", b"[]"), "expected a JSON object"),
    "an adapter of rank 0": (adapter_config(r=0), "adapter_config.json: `r` should be a positive"),
    "a rank that is a text": (adapter_config(r="two"), "adapter_config.json: '<=' not supported"),
    "targets that are no pattern": (adapter_config(target_modules="("), "adapter_config.json: "),
    "a rank for each part that is no table": (adapter_config(rank_pattern="x"), "adapter_config.json: "),
    "another kind of adapter": (adapter_config(peft_type="NOSUCH"), "adapter_config.json"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_an_odd_folder_is_one_sentence_and_runs_nothing(place, kind, capsys):
    make, told = FOLDERS[kind]
    make(place)
    folder = str(place / ("adapter" if "adapter" in kind or "rank" in kind or "targets" in kind else "base"))

    def load():
        load_causal(folder, load_tokenizer(folder))

    with pytest.raises(UserError, match=told) as caught:
        load()
    assert "\n" not in str(caught.value)
    if "tokenizer" not in kind:
        with pytest.raises(UserError):
            load_reward_model(folder, num_labels=1)
    assert not (place / "attacked").exists()


def test_a_chat_template_reaches_nothing_but_its_messages(place):
    file = place / "base" / "tokenizer_config.json"
    edit(file, chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}")
    tokenizer = load_tokenizer(place / "base")
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (None, "damaged, or no safetensors file"),
        ({"linear.weight": torch.ones(1, 3), "linear.bias": torch.zeros(1)}, "no value head of this policy"),
        ({"other": torch.ones(1)}, "no value head of this policy"),
        ({"linear.weight": torch.full((1, 32), torch.nan), "linear.bias": torch.zeros(1)}, "not finite"),
    ],
)
def test_a_value_head_of_something_else(place, tensors, told):
    policy, file = load_causal(place / "base"), place / "base" / VALUE_HEAD
    file.write_bytes(b"garbage") if tensors is None else save_file(tensors, file)
    with pytest.raises(UserError, match=told):
        load_value_head(policy, torch.device("cpu"), folder=str(place / "base"))


def test_an_adapter_over_another_base_of_the_same_shape_is_refused(place, capsys):
    adapter, base = place / "adapter", place / "base"
    save_file({"linear.weight": torch.ones(1, 32)}, base / VALUE_HEAD)  # which is not of the base's weights
    assert list(parameters_of(load_causal(adapter), MAIN))
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"trained on another base than lies in {base} now"):
        load_causal(adapter)
    (adapter / BASE_RECORD).unlink()
    assert list(parameters_of(load_causal(adapter), MAIN))


def test_an_embedding_grows_aloud(place, capsys):
    say_once.cache_clear()
    tokenizer = load_tokenizer(place / "base", pad_token="<fill>")
    load_causal(place / "base", tokenizer)
    told = f"its embedding grows from {len(tokenizer) - 1} to {len(tokenizer)} rows, for the tokenizer has more"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs/sfft", "./sfft", "a/b/c", "~/runs", "sfft"])
def test_a_mistyped_folder_is_told_at_once(name, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    (tmp_path / "sft").mkdir()
    began = time.monotonic()
    with pytest.raises(UserError, match=f"{name}: no such tokenizer folder") as caught:
        load_tokenizer(name)
    assert time.monotonic() - began < 5
    meant = {"runs/sfft": "runs/sft", "./sfft": "./sft", "sfft": "sft"}.get(name)
    assert str(caught.value).endswith(f"did you mean {meant}?") == (meant is not None)
    for stage in ("sft", "ppo"):
        module = importlib.import_module(f"rlhf_trainer.{stage}")
        with pytest.raises(UserError, match="no such tokenizer folder"):
            getattr(module, f"train_{stage}")(
                module.Config(model=name, **({"data": "d"} if stage == "sft" else {"reward": "m:f", "prompts": "p"}))
            )
