"""support/soak.py counts what it says: one call a case, parts that share a run, mismatches, records that resume."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import soak, soaked, soaked_linear
from support.backends import require_backend
from torch import Tensor

import rlhf_kernels as rk


@pytest.mark.parametrize("op", soak.SOAKED)
def test_a_case_is_one_call_of_the_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = op.removesuffix("_packed").removesuffix("_frozen")
    stock, calls, cases = getattr(rk, name), [], []
    monkeypatch.setattr(rk, name, lambda *args, **kwargs: calls.append(args) or stock(*args, **kwargs))

    @settings(
        max_examples=20,
        phases=[Phase.generate],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(call=soak.SOAKED[op].calls)
    def check(call: object) -> None:
        cases.append(call)
        soak.SOAKED[op].check(call, "reference", "cpu")

    check()
    if op == "sample_tokens":  # truth is not another call of it; some are drawn again
        assert len(calls) == len(cases) + sum(call.repeat > 0 for call in cases)
    else:
        assert len(calls) == 2 * len(cases)  # the backend's and the reference's


@pytest.mark.parametrize(("cases", "count"), [(1, 1), (3 * soak.BATCH, 2), (7 * soak.BATCH + 3, 4), (10_001, 3)])
def test_parts_share_a_run(cases: int, count: int) -> None:
    ops = ["a", "b", "c"]
    whole = list(soak.planned(ops, cases, (1, 1)))
    parts = [batch for k in range(count) for batch in soak.planned(ops, cases, (k + 1, count))]
    assert sorted(parts) == sorted(whole)
    assert len({batch[:2] for batch in whole}) == len(whole)
    assert sum(size for _, _, size in whole) == cases
    assert max(size for _, _, size in whole) <= soak.BATCH


def _check(call: int, backend: str, device: str) -> float:
    assert call % 7, f"{call} is one of those"
    return float(call % 5)


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soak.SOAKED, "numbers", soaked.Soaked(st.integers(0, 10**6), _check))


def test_mismatches_are_counted_and_the_rest_still_runs(numbers: None) -> None:
    ran, worst, mismatches = soak.soak("numbers", "cpu", 200, "0 numbers 0")
    assert (ran, worst) == (200, 4.0)
    assert 1 < len(mismatches) < 100
    assert all(line.endswith(f"at {line.split()[0]}") for line in mismatches)
    assert soak.soak("numbers", "cpu", 200, "0 numbers 0")[2] == mismatches, "a seed repeats its calls"
    assert soak.soak("numbers", "cpu", 200, "0 numbers 1")[2] != mismatches, "another batch has others"


def test_a_record_resumes_and_sums(
    numbers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "BATCH", 40)
    monkeypatch.setattr(soak.signal, "signal", lambda *args: None)
    record = tmp_path / "record.jsonl"

    def run(cases: int, part: tuple[int, int], stops: bool = False) -> list[soak.Batch]:
        options = argparse.Namespace(backend="cpu", seed=3, cases=cases, part=part, record=record)
        finished, stopped = soak.run_batches(options, ["numbers"])
        assert stopped == stops
        return finished

    stock = soak.soak

    def interrupted(op: str, backend: str, cases: int, batch_seed: str) -> tuple[int, float, list[str]]:
        if batch_seed.endswith(" 2"):
            raise KeyboardInterrupt
        return stock(op, backend, cases, batch_seed)

    monkeypatch.setattr(soak, "soak", interrupted)
    assert [one.batch for one in run(150, (1, 1), stops=True)] == [0, 1]
    monkeypatch.setattr(soak, "soak", stock)
    assert sum(one.cases for one in run(150, (1, 2)) + run(150, (2, 2))) == 150
    lines = record.read_text().splitlines()
    assert len(lines) == 4, "none twice"
    assert sum(one.cases for one in run(160, (1, 1))) == 160, "the short last batch is run in full"
    batches = soak.read([record, record])
    assert sum(one.cases for one in batches.values()) == 160
    capsys.readouterr()
    assert soak.report(batches.values()) == sum(one.mismatches for one in batches.values()) > 0
    assert "cpu on cpu: 160 cases" in capsys.readouterr().out


class _LastRowMore(torch.autograd.Function):
    """A weight whose last row's gradient is 2 % too large."""

    @staticmethod
    def forward(ctx: object, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return torch.cat([grad[:-1], 1.02 * grad[-1:]])


FAULTS = {
    "products off by 0.1 %": (0, lambda hidden: 1.001 * hidden),
    "a last row's gradient off by 2 %": (-1, _LastRowMore.apply),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", soaked_linear.SOAKED)
def test_the_linear_family_is_compared_sharply(op: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that small is a mismatch within 300 calls: the allowances are no looser than roundings make them."""
    require_backend("cpu")
    name, (place, spoil) = op.removesuffix("_frozen"), FAULTS[fault]
    stock = getattr(rk, name)
    place = {"linear_dpo_loss": 2, "linear_logprobs_frozen": 0}.get(op, 1) if place else 0

    def faulty(*args: object, **kwargs: object) -> object:
        if args[0].dtype == torch.float32:  # neither truth nor what 16-bit roundings hide
            args = (*args[:place], spoil(args[place]), *args[place + 1 :])
        return stock(*args, **kwargs)

    monkeypatch.setattr(rk, name, faulty)
    assert any(soak.soak(op, "cpu", 30, f"0 {op} {batch}")[2] for batch in range(10))
