"""Command line and YAML: who wins, what is refused and how."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

import rlhf_trainer
from rlhf_trainer.base import shared
from rlhf_trainer.base.config import option, parse_config, parser_for, require, save_config
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.base.values import PATHS
from rlhf_trainer.cli import STAGES, main, usage
from rlhf_trainer.onpolicy.config import PPOConfig


@dataclass
class Config:
    learning_rate: float = option(0.1, "speed")
    name: str = option("x", "a name")
    stop: str | None = option(None, "a token")
    files: list[str] = option([], "files")
    fast: bool = option(False, "hurry")
    output_dir: str = option("", "folder")
    model: str | None = option(None, "folder")
    steps: int = option(1, "steps")
    seed: int = option(0, "seed")


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
        ("name: [a, b]\n", "c.yaml:1: name takes one value, not a list"),
        ("files: {a: b}\n", "c.yaml:1: files takes a list, not a mapping"),
        ("name: x\nfast: true\nname: y\n", "c.yaml:3: name is there twice"),
        ("name: x\nfast: maybe\n", "Truthy value expected: got maybe"),
        ("learning_rate: !!int x\n", "invalid float value: 'x'"),
        ("? [name]\n: x\n", "c.yaml:1: unknown key"),
        ("files: [a, [b]]\n", "files takes a list of values, not of a list"),
        ("files: &f [*f]\n", "files takes a list of values, not of a list"),
        ("files:\n- a\n-\n", "files takes a list of values, not of nothing"),
        ("files: " + "[" * 3000, "nested too deeply|not YAML"),
        ("name: x\0\n", "not YAML: .*special characters are not allowed"),
        ('name: "x\\0y"\n', r"--name 'x\\x00y': holds a NUL character"),
        ("learning_rate: .inf\n", "invalid float value: '.inf'"),
        ("learning_rate: inf\n", "--learning_rate 'inf': must be a finite number"),
        ("seed: 99999999999\n", "--seed '99999999999': must be at least 0 and below 4294967296"),
        ("steps: 99999999999999999999\n", "--steps '99999999999999999999': beyond 64 bits"),
        ("a: b\n--- \nc: d\n", "c.yaml:2: not YAML"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        parse("--config", str(file))
    assert "\n" not in str(caught.value)


def test_a_yaml_value_is_what_is_written(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: 2026-11-31\nname: no\nmodel: 010\nsteps: 010\nfast: yes\nfiles: [--end, on, 1.0]\n")
    wanted = Config(output_dir="2026-11-31", name="no", model="010", steps=10, fast=True, files=["--end", "on", "1.0"])
    assert parse("--config", str(file)) == wanted
    file.write_text("model: null\nname: 'null'\nfiles:\nstop: ~\nsteps: 1_000\nlearning_rate: 1e-5\n")
    assert parse("--config", str(file)) == Config(name="null", steps=1000, learning_rate=1e-5)
    file.write_text("files: [a, b]\n")
    assert parse("--config", str(file), "--files", "c").files == ["c"]


@pytest.mark.parametrize("word", ["--config=--", "--name=--", "--", "--files=--"])
def test_two_dashes_are_no_value(word):
    with pytest.raises(UserError, match="`--` is neither an option nor a value"):
        parse(word)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--name", "a\udcff"], r"--name 'a.udcff': is not valid text"),
        (["--config", "a\0"], "embedded null"),
        (["--files", "a", "b\0"], "--files 'b.*holds a NUL"),
        (["--learning_rate", "nan"], "must be a finite number"),
        (["--seed", "-1"], "--seed '-1': must be at least 0"),
    ],
)
def test_values_that_no_stage_can_use(words, told):
    with pytest.raises(UserError, match=told):
        parse(*words)


def test_numbers_that_are_not_finite_are_refused_from_python_too():
    """`lr=inf` from a script, whose config no command line has checked."""
    for stage in ("sft", "reward", "dpo", "ppo"):
        module = importlib.import_module(f"rlhf_trainer.{stage}")
        with pytest.raises(UserError, match="--lr 'inf': must be a finite number"):
            getattr(module, f"train_{stage}")(module.Config(lr=float("inf")))


def test_home_and_environment_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "r")
    monkeypatch.chdir(tmp_path)
    assert parse("--output_dir", "~/${RUNS}/a$RUNS") == Config(output_dir=f"{tmp_path}/r/ar")
    (tmp_path / "c.yaml").write_text("model: $HOME/m\nname: $HOME ~\nstop: '~'\n")
    assert parse("--config=~/c.yaml") == Config(model=f"{tmp_path}/m", name="$HOME ~", stop="~")
    (tmp_path / "$odd").mkdir()
    assert parse("--model", "$odd").model == "$odd"  # there is such a folder
    with pytest.raises(UserError, match=r"--model .NOPE/x: there is no environment variable NOPE"):
        parse("--model", "$NOPE/x")
    with pytest.raises(UserError, match="--model ~nobody-of-that-name/x: there is no such user"):
        parse("--model", "~nobody-of-that-name/x")


def test_every_option_that_names_a_path_is_known_as_one():
    """By its text; those of the last line speak of files without being one."""
    named = set()
    for name, _ in STAGES.values():
        stage = importlib.import_module(f"rlhf_trainer.{name}")
        for module in (stage, *getattr(stage, "COMMANDS", {}).values()):
            fields = [field for field in dataclasses.fields(module.Config) if "str" in str(field.type)]
            about = re.compile(r"\b(files?|folders?)\b")
            named |= {field.name for field in fields if about.search(field.metadata["help"])}
    assert named - PATHS <= {"format", "split"}


def test_what_no_stage_foresaw_is_one_sentence_and_with_debug_a_traceback(capsys, monkeypatch):
    def broken(cfg):
        return {}["\x1b[31mred\u202e"]

    monkeypatch.setattr(importlib.import_module("rlhf_trainer.prefs"), "run", broken)
    assert main(["prefs"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlhf prefs: error: KeyError in test_config.py:")
    assert said.endswith("--debug shows the traceback\n")
    assert "\x1b" not in said
    with pytest.raises(KeyError):
        main(["prefs", "--debug"])


def test_control_characters_in_messages_are_escaped(capsys):
    say("a\x1b[2Jb\u202ec\td\n")
    assert capsys.readouterr().err == "a\\x1b[2Jb\\u202ec\td\n\n"
    assert main(["ppo", "--x\x1b[31m"]) == 2
    assert "--x\\x1b[31m" in capsys.readouterr().err


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


def test_json_says_null_for_what_is_not_finite():
    value = {"a": [1.0, float("nan")], "b": (float("inf"), {"c": -float("inf")}), "d": "NaN"}
    assert dumps(value) == '{"a": [1.0, null], "b": [null, {"c": null}], "d": "NaN"}'
