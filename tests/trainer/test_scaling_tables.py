"""bench/scaling.py and bench/op_costs.py: docs/scaling.md holds what they print, and a small job can be measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

import op_costs  # noqa: E402
import scaling  # noqa: E402

TINY = replace(scaling.GPT2_TINY, name="tiny", layers=3, width=64, ffn=128, kv_width=64, vocab=300)
SIZES = {"batch": 4, "micro": 2, "prompt": 6, "response": 4, "epochs": 2}


@pytest.mark.parametrize("arguments", [[], ["--costs", str(ROOT / "bench" / "results" / "op_costs_cpu.json")]])
def test_the_page_holds_the_tables(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    scaling.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    page = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    assert [line for line in rows if line not in page] == []


@pytest.mark.parametrize(("lora", "gated", "mixed"), [(0, False, False), (4, True, True)])
def test_costs_and_a_run_beside_them(
    lora: int,
    gated: bool,
    mixed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = scaling.Job(
        replace(TINY, gated=gated), 1, lora=lora, **SIZES, mixed=mixed, checkpointing=mixed, minibatches=1, reward=False
    )
    for module in (op_costs, scaling):
        monkeypatch.setattr(module, "SMALL_JOBS", [("here", job, scaling.H100)])
    out = tmp_path / "costs.json"
    monkeypatch.setattr(
        sys, "argv", ["op_costs.py", "--rounds", "2", "--quiet", "1", "--only", "tiny", "--out", str(out)]
    )
    op_costs.main()
    found = json.loads(out.read_text())["jobs"]["tiny, here"]
    assert set(found["rlhf ppo"]) == {"rollout", "scoring", "update"}
    printed = capsys.readouterr().out
    assert "| tiny | here | 1 | 4 |" in printed
    assert "| tiny, here | iteration |" in printed


def test_seconds_add_up() -> None:
    """Of costs that are powers of ten each phase shows what it counts."""
    job = scaling.Job(TINY, 1, **SIZES, checkpointing=True, minibatches=2, reward=True)
    names = ("prefill", "step", "forward", "train", "head", "train_head", "optimizer", "losses")
    costs = scaling.Costs(**{name: 100.0**i for i, name in enumerate(names)})
    parts = scaling.seconds(job, costs, link=1.0)
    assert parts["rollout"] == 4 * costs.prefill + 4 * costs.step
    assert parts["scoring"] == 12 * costs.forward + 8 * costs.head
    passes = costs.train + costs.forward + costs.train_head + costs.losses
    assert parts["update"] == 2 * 4 * passes + 4 * costs.optimizer
    assert parts["exchange"] == 0
