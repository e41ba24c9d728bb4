"""How exact an op is has one rule, `truth.assert_accurate`; what else is compared with a tolerance is listed here.

Exceptions are of four kinds, none of which says how exact an op is.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SUMS = "two computations of ours that add the same terms in another order: shards and whole, packed and padded, parts"
FORMULA = "a value or slope by hand, written down in decimals or from Python's float arithmetic"
PEER = "another library's own head or sampler, which multiplies in its own dtype and order"
HEAD = (
    "loss or gradient of a whole head against float64, in units of its largest: each is a sum over tokens and columns"
)
EXCEPTIONS = {
    "head_ranks.py": SUMS,
    "linear_ranks.py": SUMS,
    "test_contract_derivatives.py": SUMS,
    "test_contract_random.py": SUMS,
    "test_full_kl.py": FORMULA,
    "test_heads.py": PEER,
    "test_linear_kl.py": HEAD,
    "test_linear_lora.py": HEAD,
    "test_linear_losses.py": HEAD,
    "test_linear_unit.py": SUMS,
    "test_linear_widening.py": HEAD,
    "test_losses.py": FORMULA,
    "test_losses_kernels.py": FORMULA,
    "test_ppo_advantages.py": SUMS,
    "test_preference.py": FORMULA,
    "test_sampling.py": PEER,
    "test_scan.py": FORMULA,
    "test_tokens.py": SUMS,
}
TESTS = Path(__file__).parent
TOLERANCE = re.compile(r"\b[ra]tol=(?!0(?:\.0*)?(?![\d.]))")


def with_tolerances(folder: Path) -> set[str]:
    own = {Path(__file__).name, "truth.py"}
    return {path.name for path in folder.glob("*.py") if path.name not in own and TOLERANCE.search(path.read_text())}


def test_every_other_tolerance_has_its_reason() -> None:
    found = with_tolerances(TESTS)
    assert found - EXCEPTIONS.keys() == set(), (
        "truth.assert_accurate is the rule; another tolerance needs a reason here"
    )
    assert EXCEPTIONS.keys() - found == set(), "an exception that is none any more"


@pytest.mark.parametrize(
    ("text", "found"), [("rtol=0, atol=0", False), ("rtol=1e-5", True), ("atol=0.02", True), ("atol=tolerance", True)]
)
def test_a_tolerance_is_found(text: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(f"assert_close(a, b, {text})")
    assert bool(with_tolerances(tmp_path)) == found
