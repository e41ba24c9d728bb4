"""Runs what the pages under docs/ show, in order, each page in a folder of its own with a tiny model.

A fenced block whose first line names a file (```json pairs.jsonl) becomes that file; one marked `run` (```bash run,
```python run) is executed. Lines that begin with `rlhf` go to the command's own main(), in this process.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from support.tiny import WORDS

from rlhf_trainer import Pair, RewardConfig, train_reward
from rlhf_trainer.cli import STAGES, main
from rlhf_trainer.models.from_scratch import build_model, build_tokenizer
from rlhf_trainer.models.loading import load_causal, load_tokenizer, save_folder

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+) +(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Stage -> the page that shows it, on the command line and from Python.
PAGE_OF = {
    "generate": "preferences",
    "label": "preferences",
    "prefs": "preferences",
    "sft": "sft",
    "reward": "reward",
    "ppo": "ppo",
    "dpo": "dpo",
    "bon": "bon",
    "init": "README",
    "cai": "cai",
}


class Block(NamedTuple):
    language: str
    mark: str  # "run", or the name of a file
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(*found.groups(), text.count("\n", 0, found.start()) + 1) for found in BLOCK.finditer(text)]


PAGES = sorted(page.name for page in DOCS.glob("*.md") if any(block.mark == "run" for block in blocks_of(page)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/base and runs/sft, a language model; runs/reward, a reward model on it."""
    folder = tmp_path_factory.mktemp("docs") / "runs"
    tokenizer = build_tokenizer([WORDS] * 4, 300)
    tokenizer.chat_template = CHAT
    model = build_model("llama", tokenizer, hidden_size=32, layers=2, heads=2, max_length=512)
    for name in ("base", "sft"):
        save_folder(folder / name, model, tokenizer)
    model, tokenizer = load_causal(folder / "sft"), load_tokenizer(folder / "sft")
    pairs = [Pair(word, " thanks yes", " fool") for word in WORDS.split()[:8]]
    train_reward(RewardConfig(model=str(folder / "sft"), output_dir=str(folder / "reward"), heldout=0), pairs=pairs)
    return folder


def commands_of(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES)
def test_page(page, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs, "runs")
    shutil.copytree(DOCS.parent / "configs", "configs")
    names: dict[str, object] = {"__name__": page}
    for block in blocks_of(DOCS / page):
        where = f"{page}:{block.line}"
        if block.mark != "run":
            assert "." in block.mark, f"{where}: {block.mark!r} is neither `run` nor the name of a file"
            Path(block.mark).parent.mkdir(parents=True, exist_ok=True)
            Path(block.mark).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(DOCS / page), "exec"), names)
        else:
            for command in commands_of(block.text):
                words = shlex.split(command, comments=True)
                code = main(words[1:]) if words[0] == "rlhf" else subprocess.run(command, shell=True).returncode
                assert code == 0, f"{where}: {command}"


@pytest.mark.parametrize("stage", PAGE_OF)
def test_a_stage_is_shown_as_a_command_and_from_python(stage):
    assert stage in STAGES
    found = blocks_of(DOCS / f"{PAGE_OF[stage]}.md")
    shown = {block.language: block.text for block in found if block.mark == "run"}
    commands = [
        line for block in found if block.mark == "run" and block.language == "bash" for line in commands_of(block.text)
    ]
    assert stage == "label" or any(command.startswith(f"rlhf {stage} ") for command in commands)
    assert "from rlhf_trainer import" in shown["python"]


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index
