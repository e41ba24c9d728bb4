"""Where kernels run in tests, and what a test does whose backend is absent."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before anything imports triton: its kernels are jitted for the interpreter or not at all.
    os.environ["TRITON_INTERPRET"] = "1"

from rlhf_kernels import dispatch  # noqa: E402

# Backends that must be here; `make test` names them, so that a failed build is not a skipped test.
REQUIRED = set(filter(None, os.environ.get("RLHF_KERNELS_REQUIRE", "").split(",")))


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
