"""The generated accuracy page has a table for every op with a kernel."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_kernels import dispatch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "accuracy.md"
# Sums of what their tables show already: linear_logprobs, and gae over other offsets.
WITHOUT_TABLE = {"gae_packed", "linear_cross_entropy", "linear_dpo_loss", "linear_kl", "linear_policy_loss"}
WITHOUT_TABLE |= {"shaped_rewards"}  # one product and one sum, both part of ppo_advantages


def test_every_op_has_its_errors_published() -> None:
    tables = set(re.findall(r"^## (\w+)", PAGE.read_text(), re.MULTILINE))
    kernels = {op for backend in dispatch.BACKENDS for op in backend.ops}
    assert kernels - WITHOUT_TABLE <= tables
    wrong = [line for line in PAGE.read_text().splitlines() if "rlhf_kernels" in line and not line.endswith("|  |")]
    assert not wrong, "a backend of ours returned NaN or infinity where truth has none, or the other way round"
