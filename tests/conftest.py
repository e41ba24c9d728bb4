"""Chooses where kernels run, and gives tests one backend at a time."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before anything imports triton: its kernels are jitted for the interpreter or not at all.
    os.environ["TRITON_INTERPRET"] = "1"

from rlhf_kernels import dispatch  # noqa: E402

# `make test-all` sets it: random tests take all of their cases, not a quarter.
ALL_CASES = os.environ.get("RLHF_KERNELS_ALL_CASES") == "1"
# Parts of node ids that are long sweeps beside what stays in every run: the native backend's guard pages and compiled
# graphs, one instruction set's far offsets, two shards.
SWEEPS = re.compile(
    r"test_guard_pages\[.*triton"
    r"|test_offsets_past_31_bits\[triton"
    r"|test_memory\[x86-64-v\d-(before|far)"
    r"|test_no_global_state_changes_a_bit\[triton-sample"
    r"|test_export_keeps_the_batch_dynamic\[triton"
    r"|test_compiles_whole_and_once\[triton-"
    r"|test_compiles_whole_and_once\[reference-(?!pairwise_loss|dpo_loss|group_advantages|gae|policy_loss)"
    r"|test_inductor\[reference"
    r"|test_vocabulary_sharded_over_processes\[4"
)

# Backends that must be here; `make test` names them, so that a failed build is not a skipped test.
REQUIRED = set(filter(None, os.environ.get("RLHF_KERNELS_REQUIRE", "").split(",")))


def pytest_configure(config: pytest.Config) -> None:
    # numpy warns of what IEEE arithmetic does silently on a GPU: inf - inf, log(0), 0 / 0.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SWEEPS.search(item.name):
            item.add_marker(pytest.mark.sweep)


def cases(most: int) -> int:
    """How many cases a random test takes."""
    return most if ALL_CASES else max(5, most // 4)


def pytest_report_header() -> str:
    """Which build of the native module is tested: the installed one, or an instrumented one on PYTHONPATH."""
    found = importlib.util.find_spec("rlhf_kernels._native")
    return f"rlhf_kernels._native: {found.origin if found else 'not built'}"


class Backend(NamedTuple):
    name: str
    device: str  # where its tensors live in these tests

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter: slow, and its bf16 stores truncate."""
        return self.name == "triton" and not HAS_GPU


def require_backend(name: str) -> None:
    """Skip the test where the backend is not installed; fail where RLHF_KERNELS_REQUIRE names it."""
    missing = dispatch.available().get(name)
    if missing:
        if name in REQUIRED:
            pytest.fail(f"backend {name} is required here but absent: {missing}")
        pytest.skip(f"backend {name}: {missing}")


def _use(name: str) -> Iterator[Backend]:
    require_backend(name)
    # Deterministic mode fills fresh memory with NaN: an element that a kernel does not write shows.
    torch.use_deterministic_algorithms(True)
    try:
        with dispatch.use_backend(name):
            yield Backend(name, "cuda" if name == "triton" and HAS_GPU else "cpu")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, forced, with uninitialised memory full of NaN."""
    yield from _use(request.param)


@pytest.fixture(params=["cpu", "triton"])
def kernel_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """As `backend`, without the reference: for what only a registered kernel has."""
    yield from _use(request.param)


def shrink_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton blocks so small that little inputs span several, which the interpreter can afford."""
    if dispatch.available()["triton"] is None:
        from rlhf_kernels.backends.triton import (
            full_kl,
            linear,
            logits,
            loss_tiles,
            losses,
            sampling,
            scan,
            tokens,
            whiten,
        )

        for module in (full_kl, logits, sampling):
            monkeypatch.setattr(module, "blocks", lambda V: (128, 1))
        monkeypatch.setattr(linear, "_blocks", lambda W: (128, 1))
        monkeypatch.setattr(scan, "BLOCK_T", 16)
        monkeypatch.setattr(losses, "BLOCK_T", 16)
        monkeypatch.setattr(loss_tiles, "BLOCK_T", 16)
        monkeypatch.setattr(losses, "TILE", 32)
        monkeypatch.setattr(tokens, "BLOCK", 16)
        monkeypatch.setattr(whiten, "BLOCK", 16)
        monkeypatch.setattr(whiten, "MERGE_BLOCK", 4)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch)
