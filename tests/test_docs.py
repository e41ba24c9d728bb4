"""The pages: links lead somewhere, the README is short, every op with a kernel has its errors published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


ROOT = PAGE.parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The names that headings get on the usual hosts: lower case, dashes for spaces, no other signs."""
    headings = re.findall(r"^#+ +(.*?) *$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(page.read_text(encoding="utf-8").replace("\n", " ")):
        place, _, anchor = link.partition("#")
        target = page if not place else (page.parent / place).resolve()
        if "://" in link or link.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A head, line\n[a](#a-head-line) [b](#b) [c](none.md) [d\nd](page.md) ![e](f.png)")
    assert broken_links(page) == ["#b", "none.md"]


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
