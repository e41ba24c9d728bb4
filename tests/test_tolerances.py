"""How exact an op is has one rule, `truth.assert_accurate`; a file that chooses another tolerance is listed here.

None of the reasons says how exact an op is. A comparison that leaves its tolerance to the library (`approx(x)`,
`assert_close(a, b)`) takes the rounding of a dtype, and needs none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SUMS = "two computations of ours that add the same terms in another order: shards and whole, packed and padded, parts"
FORMULA = "a value or slope by hand, written down in decimals or from Python's float arithmetic"
PEER = "another library's own model, head or sampler, which multiplies in its own dtype and order"
HEAD = (
    "loss or gradient of a whole head against float64, in units of its largest: each is a sum over tokens and columns"
)
DRAWN = "a share or mean of random draws against its expectation, a few standard errors wide"
ROUNDED = "a model's numbers after its weights went through 16 or 4 bits, or through the product of an adapter"
ENGINE = "a model's own logprobs or scores from two forward passes: padded, cached, in batches, or read from its folder"
EXCEPTIONS = {
    "support/checks/linear_losses.py": {HEAD},
    "support/head_ranks.py": {SUMS},
    "support/linear_ranks.py": {SUMS},
    "test_arguments.py": {FORMULA},
    "test_arm64.py": {PEER},
    "test_contract_derivatives.py": {SUMS},
    "test_contract_random.py": {SUMS},
    "test_full_kl.py": {FORMULA},
    "test_heads.py": {PEER},
    "test_linear_kl.py": {HEAD},
    "test_linear_lora.py": {HEAD},
    "test_linear_losses.py": {HEAD},
    "test_linear_unit.py": {SUMS},
    "test_linear_logits_dtype.py": {HEAD},
    "test_losses.py": {FORMULA},
    "test_losses_kernels.py": {FORMULA},
    "test_ppo_advantages.py": {SUMS},
    "test_preference.py": {FORMULA},
    "test_sampling.py": {PEER, DRAWN},
    "test_scan.py": {FORMULA},
    "test_tokens.py": {FORMULA, SUMS},
    "trainer/base/test_distributed.py": {SUMS},
    "trainer/constitutional/test_cai_label.py": {ENGINE},
    "trainer/constitutional/test_constitution.py": {DRAWN},
    "trainer/data/test_agreement.py": {FORMULA, DRAWN},
    "trainer/judging/test_judges.py": {FORMULA, ENGINE},
    "trainer/judging/test_rewards.py": {ENGINE, ROUNDED},
    "trainer/models/test_adapters.py": {ENGINE, ROUNDED},
    "trainer/models/test_loading.py": {ENGINE},
    "trainer/models/test_quantised.py": {ROUNDED},
    "trainer/models/test_seq2seq.py": {FORMULA, ENGINE},
    "trainer/onpolicy/test_groups.py": {FORMULA, SUMS, ENGINE},
    "trainer/sampling/test_rollout.py": {DRAWN, ENGINE},
    "trainer/sampling/test_vllm.py": {ROUNDED},
    "trainer/test_bon.py": {FORMULA},
    "trainer/test_dpo.py": {FORMULA, SUMS, ENGINE},
    "trainer/test_eval.py": {FORMULA, DRAWN},
    "trainer/test_ppo.py": {FORMULA, SUMS},
    "trainer/test_reward.py": {FORMULA, DRAWN, SUMS, ENGINE},
    "trainer/test_sft.py": {FORMULA, SUMS},
    "trainer/test_verify.py": {FORMULA, DRAWN, ENGINE},
    "trainer/verification/test_cases.py": {FORMULA, DRAWN, ENGINE},
    "trainer/verification/test_other_worlds.py": {FORMULA},
    "trainer/reports/test_intervals.py": {FORMULA, DRAWN},
    "trainer/models/test_saved.py": {ENGINE, ROUNDED},
    "trainer/onpolicy/test_exact_kl.py": {DRAWN, ENGINE},
    "trainer/onpolicy/test_value_head.py": {DRAWN, ENGINE},
    "trainer/sampling/test_rollout_agreement.py": {ENGINE},
    "trainer/training/test_checkpoint.py": {SUMS},
}
TESTS = Path(__file__).parent
OWN = {"test_tolerances.py", "support/truth.py"}  # this file, and the rule itself
# Of every function; `approx` has two more, and some take them by position too, from this place on.
NAMES = {"rtol", "atol", "rel_tol", "abs_tol"}
BY_POSITION = {"approx": 1, "allclose": 2, "isclose": 2, "assert_allclose": 2}
SMALL = 0.1  # a difference below less is a tolerance, `x.abs() < 20` is not


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _tolerances(node: ast.AST) -> Iterator[ast.expr]:
    """The values in this node that say how far two numbers may be apart."""
    if isinstance(node, ast.Call):
        names = NAMES | ({"rel", "abs"} if _name(node) == "approx" else set())
        yield from (keyword.value for keyword in node.keywords if keyword.arg in names)
        yield from node.args[BY_POSITION.get(_name(node), len(node.args)) :]
    elif isinstance(node, ast.Dict):
        keys = (key.value if isinstance(key, ast.Constant) else None for key in node.keys)
        yield from (value for key, value in zip(keys, node.values, strict=True) if key in NAMES)
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt | ast.LtE):
        difference = any(isinstance(part, ast.Call) and _name(part) == "abs" for part in ast.walk(node.left))
        limits = [part for part in ast.walk(node.comparators[0]) if isinstance(part, ast.Constant)]
        if difference and any(isinstance(limit.value, float) and 0 < limit.value < SMALL for limit in limits):
            yield node.comparators[0]


def with_tolerances(folder: Path) -> set[str]:
    """The files below the folder that choose a tolerance other than 0."""
    found = set()
    for path in folder.rglob("*.py"):
        values = (value for node in ast.walk(ast.parse(path.read_text())) for value in _tolerances(node))
        if any(not (isinstance(value, ast.Constant) and value.value == 0) for value in values):
            found.add(path.relative_to(folder).as_posix())
    return found - OWN


def test_every_other_tolerance_has_its_reason() -> None:
    found = with_tolerances(TESTS)
    assert found - EXCEPTIONS.keys() == set(), (
        "truth.assert_accurate is the rule; a file with another tolerance needs a reason in EXCEPTIONS"
    )
    assert EXCEPTIONS.keys() - found == set(), "an exception that is none any more"
    assert all(EXCEPTIONS.values())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("assert_close(a, b)", False),
        ("assert_close(a, b, rtol=0, atol=0.0)", False),
        ("assert_close(a, b, rtol=1e-5, atol=0)", True),
        ("assert_close(a, b, rtol=0, atol=0.02)", True),
        ("assert_close(a, b, rtol=0, atol=tolerance)", True),
        ("assert_close(a, b, **{'rtol': 1e-5})", True),
        ("torch.allclose(a, b)", False),
        ("torch.allclose(a, b, 1e-5)", True),
        ("math.isclose(a, b, rel_tol=1e-5)", True),
        ("assert a == pytest.approx(b)", False),
        ("assert a == pytest.approx(b, rel=0, abs=0)", False),
        ("assert a == pytest.approx(b, rel=1e-5)", True),
        ("assert a == approx(b, abs=1e-5)", True),
        ("assert a == approx(b, 1e-5)", True),
        ("assert (a - b).abs().max() < 1e-5", True),
        ("assert abs(a - b) <= 1e-6 * scale", True),
        ("assert a.abs().max() < 20", False),
        ("assert a < 1e-5", False),
    ],
)
def test_a_tolerance_is_found(text: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "test_x.py").write_text(text)
    assert with_tolerances(tmp_path) == ({"deeper/test_x.py"} if found else set())
