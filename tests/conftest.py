"""Chooses where kernels run, and gives tests one backend at a time."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("support")

from support.backends import HAS_GPU, Backend, require_backend, shrink_blocks  # noqa: E402

from rlhf_kernels import dispatch  # noqa: E402

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


def pytest_configure(config: pytest.Config) -> None:
    # numpy warns of what IEEE arithmetic does silently on a GPU: inf - inf, log(0), 0 / 0.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SWEEPS.search(item.name):
            item.add_marker(pytest.mark.sweep)


def pytest_report_header() -> str:
    """Which build of the native module is tested: the installed one, or an instrumented one on PYTHONPATH."""
    found = importlib.util.find_spec("rlhf_kernels._native")
    return f"rlhf_kernels._native: {found.origin if found else 'not built'}"


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


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch)
