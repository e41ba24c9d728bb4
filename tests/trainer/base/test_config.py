"""Command line and YAML: who wins, what is refused and how."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

import rlhf_trainer
from rlhf_trainer.base import shared
from rlhf_trainer.base.config import option, parse_config, parser_for, require, save_config
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import STAGES, main, usage
from rlhf_trainer.onpolicy.config import PPOConfig


@dataclass
class Config:
    learning_rate: float = option(0.1, "speed")
    name: str = option("x", "a name")
    stop: str | None = option(None, "a token")
    files: list[str] = option([], "files")
    fast: bool = option(False, "hurry")


def parse(*arguments):
    return parse_config(Config, list(arguments))


def test_command_line_beats_yaml_beats_default(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 0.5\nname: yaml\nfast: true\nfiles: [a, b]\n")
    cfg = parse("--config", str(file), "--name", "line")
    assert cfg == Config(learning_rate=0.5, name="line", stop=None, files=["a", "b"], fast=True)
    assert parse() == Config()


def test_dashes_and_underscores_are_the_same(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning-rate: 0.5\n")
    assert parse("--config", str(file)) == parse("--learning-rate", "0.5") == parse("--learning_rate=0.5")


def test_every_option_of_every_stage_may_be_spelled_with_dashes():
    for name, _ in STAGES.values():
        stage = importlib.import_module(f"rlhf_trainer.{name}")
        for module in (stage, *getattr(stage, "COMMANDS", {}).values()):
            actions = {
                o: action for action in parser_for(module.Config, "", "")._actions for o in action.option_strings
            }
            for field in dataclasses.fields(module.Config):
                assert actions[f"--{field.name}"] is actions["--" + field.name.replace("_", "-")]


def test_the_text_of_an_option_is_written_once():
    texts = Counter()
    for file in Path(rlhf_trainer.__file__).parent.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        options = [call for call in calls if "option" in [getattr(part, "id", "") for part in [call.func, *call.args]]]
        literals = [part for call in options for part in [*call.args, *(word.value for word in call.keywords)]]
        texts.update(part.value for part in literals if isinstance(part, ast.Constant) and " " in str(part.value))
    assert texts["run code that comes with the model folder"] == 1
    assert [text for text, times in texts.items() if times > 1] == []


def test_a_shared_option_is_a_field_of_its_own_in_every_stage():
    first, second = shared.report_to(), shared.report_to()
    assert first is not second
    assert first.default_factory() == ["tensorboard"]
    assert first.default_factory() is not first.default_factory()
    assert shared.n(3).default == 3
    with pytest.raises(TypeError, match="default"):  # the stages' defaults differ: each must say its own
        shared.n()


def test_a_yaml_value_that_looks_like_an_option(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("stop: '--end'\nlearning_rate: -1.0\n")
    assert parse("--config", str(file)) == Config(stop="--end", learning_rate=-1.0)


def test_saved_config_repeats_the_run(tmp_path):
    cfg = PPOConfig(model="m", kl_coef=0.7, stop_token="\n", minibatches=3)
    save_config(cfg, tmp_path)
    assert parse_config(PPOConfig, ["--config", str(tmp_path / "config_resolved.yaml")]) == cfg


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1\n", "unknown key learning_rat; did you mean learning_rate"),
        ("- a\n", "holds a list"),
        ("name: x\nfiles: [a\n", "c.yaml:3: not YAML"),
        ("learning_rate: fast\n", "invalid float value: 'fast'"),
        ("name: [a, b]\n", "c.yaml: name takes one value, not a list"),
        ("files: {a: b}\n", "c.yaml: files takes a list, not a dict"),
        ("name: x\nfast: true\nname: y\n", "c.yaml: name is there twice"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        parse("--config", str(file))
    assert "\n" not in str(caught.value)


def test_bad_command_line():
    with pytest.raises(UserError, match="did you mean learning_rate"):
        parse("--learning-rat", "1")
    with pytest.raises(UserError, match="no such file"):
        parse("--config", "nowhere.yaml")
    with pytest.raises(UserError, match="'word' belongs to no option"):
        parse("word")
    with pytest.raises(UserError, match="argument --config: expected one argument"):
        parse("--config")
    with pytest.raises(UserError, match="--name is needed"):
        require(Config(name=""), "name")


def test_exit_codes_and_help(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == usage()
    assert main(["pppo"]) == 2
    assert "unknown stage 'pppo'" in capsys.readouterr().err
    assert main(["ppo", "--modle", "x"]) == 2
    error = capsys.readouterr().err
    assert error == "rlhf ppo: error: unknown option --modle; did you mean model?\n"


def test_what_cannot_be_written_is_one_sentence(tmp_path, capsys):
    file, prompts = tmp_path / "file", tmp_path / "pairs.jsonl"
    file.write_text("")
    prompts.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert main(["prefs", str(prompts), "--output", str(file / "pairs.jsonl")]) == 2
    assert capsys.readouterr().err == f"rlhf prefs: error: {file}: file exists\n"


@pytest.mark.parametrize(("stage", "kept"), [("prefs", ""), ("generate", "; --resume goes on from what is saved")])
def test_ctrl_c_ends_without_a_traceback(stage, kept, capsys, monkeypatch):
    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"rlhf_trainer.{stage}"), "run", interrupted)
    assert main([stage]) == 130
    assert capsys.readouterr().err == f"rlhf {stage}: interrupted{kept}\n"


def test_no_file_that_is_read_is_written_over(tmp_path, capsys):
    """Labellers' work, say: `rlhf prefs rankings.jsonl --output rankings.jsonl`."""
    file, link = tmp_path / "in.jsonl", tmp_path / "link.jsonl"
    text = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "completions": ["b", "c"]}\n'
    file.write_text(text)
    link.symlink_to(file)
    bon = ["bon", "--model", "m", "--reward", "r.py:f", "--prompts", str(file)]
    for words in (
        ["prefs", str(file), "--output", str(link)],
        ["label", str(file), "--output", str(link)],
        [*bon, "--output", str(link)],
        [*bon, "--output", "best.jsonl", "--pairs", str(link)],
        [*bon, "--output", "best.jsonl", "--pairs", "best.jsonl"],
        ["cai", "revise", "--model", "m", "--prompts", str(file), "--output", str(link)],
        ["cai", "label", "--judge", "j.py:f", "--completions", str(file), "--output", str(link)],
    ):
        assert main(words) == 2
        assert "is a file that is read; the result needs one of its own" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_every_option(stage, capsys):
    with pytest.raises(SystemExit) as done:
        main([stage, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text
    assert "(default:" in text
