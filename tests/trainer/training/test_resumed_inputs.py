"""A resumed run of every supervised stage sees what has changed among the things it depends on."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.tiny import tiny_folder

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import write_jsonl

EXAMPLES = [{"prompt": f"{word} day", "completion": " good night"} for word in ("one", "two", "three", "red")]
PAIRS = [
    {"prompt": f"{word} day", "chosen": " good day", "rejected": " bad", "margin": 0.0, "label": 1.0}
    for word in ("one", "two", "three", "red")
]


def stage(name, folder, **options):
    module = importlib.import_module(f"rlhf_trainer.{name}")
    places = {"model": "base", "data": "data.jsonl", "eval_data": "heldout.jsonl", "output_dir": "out"}
    fixed = {"batch_size": 1, "save_every": 1, "lora_r": 2, "report_to": ["none"], "device": "cpu"}
    given = {key: str(folder / value) for key, value in places.items()} | fixed | options
    getattr(module, f"train_{name}")(module.Config(**given))


@pytest.fixture(scope="module", params=["sft", "reward", "dpo"])
def ran(request, tmp_path_factory):
    """(stage, folder) of a run that has ended."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_folder(folder / "base")
    records = EXAMPLES if request.param == "sft" else PAIRS
    write_jsonl(folder / "data.jsonl", records)
    write_jsonl(folder / "heldout.jsonl", records[:1])
    stage(request.param, folder)
    return request.param, folder


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def moved_border(record):
    texts = ("completion",) if "completion" in record else ("chosen", "rejected")
    answers = {name: record[name].replace(" good", "") for name in texts}
    return {**record, "prompt": record["prompt"] + " good", **answers}


def scaled(file):
    tensors = load_file(file)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, file, {"format": "pt"})


def first_with(**fields):
    return lambda folder, records: write_jsonl(folder / "data.jsonl", [{**records[0], **fields}, *records[1:]])


CHANGES = {
    "a moved border": (
        lambda f, r: write_jsonl(f / "data.jsonl", [moved_border(r[0]), *r[1:]]),
        r"data changed \(tokens\)",
    ),
    "a label": (first_with(label=0.5), r"data changed \(labels\)"),
    "a margin": (first_with(margin=0.5), r"data changed \(margins\)"),
    "held-out data": (lambda f, r: write_jsonl(f / "heldout.jsonl", r[1:2]), "the heldout data changed"),
    "merges": (
        lambda f, r: edit(f / "base/tokenizer.json", lambda content: content["model"]["merges"].reverse()),
        r"the tokenizer changed \(rules\)",
    ),
    "rope_theta": (
        lambda f, r: edit(f / "base/config.json", lambda content: content["rope_parameters"].update(rope_theta=7.0)),
        r"the model changed \(config\)",
    ),
    "the adapter's base": (lambda f, r: scaled(f / "base/model.safetensors"), r"the model changed \(weights\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_is_named(ran, change, tmp_path):
    name, kept = ran
    make, told = CHANGES[change]
    folder = shutil.copytree(kept, tmp_path / "run")
    make(folder, EXAMPLES if name == "sft" else PAIRS)
    if name == "sft" and change in ("a label", "a margin"):  # which it does not read
        stage(name, folder, resume=True)
        assert (folder / "out" / "adapter_model.safetensors").is_file()
        return
    with pytest.raises(UserError, match=told):
        stage(name, folder, resume=True)


def test_a_moved_run_goes_on_and_more_epochs_are_taken(ran, tmp_path, capsys):
    name, kept = ran
    folder = shutil.copytree(kept, tmp_path / "run")
    stage(name, folder, resume=True, epochs=2)
    assert "epochs=2, not 1 as before: the learning rate follows the longer schedule" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
