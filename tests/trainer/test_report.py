"""Reports: one self-contained page, numbers people can read, text of a model shown as text."""

from __future__ import annotations

import base64
import re

import pytest

from rlhf_trainer import report
from rlhf_trainer.report import Check, Curve

ESTIMATE = {"mean": 0.5, "low": 0.25, "high": 0.75}
RESULT = {
    "prompts": 7,
    "policies": {"sft": {"measures": {"toxicity": ESTIMATE}}, "ppo": {"measures": {"toxicity": ESTIMATE}}},
    "changes": {"ppo": {"toxicity": {"mean": -0.25, "low": -0.5, "high": 0.0}}},
    "samples": [{"prompt": "<script>p</script>", "completions": {"sft": "[bold]a & b", "ppo": "line\nline"}}],
}


def test_page_is_self_contained_and_shows_everything(tmp_path):
    curve = Curve("loss", {"training": ([1, 2], [3.0, 1.0]), "held-out": ([2], [2.0])})
    checks = [Check("toxicity falls", "by 3 %", False), Check("KL < 15", "2", True)]
    path = report.write_report(
        tmp_path / "report.html", RESULT, title="A & B", curves=[curve], checks=checks, notes=["1 < 2"]
    )
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:image/png;base64,)", page)
    assert "http" not in page
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert [base64.b64decode(image)[:8] for image in images] == [b"\x89PNG\r\n\x1a\n"] * 2
    for shown in (
        "A &amp; B",
        "1 &lt; 2",
        "&lt;script&gt;p&lt;/script&gt;",
        "[bold]a &amp; b",
        "0.500 [0.250, 0.750]",
    ):
        assert shown in page
    assert '<td class="broken">broken</td>' in page
    assert "<script" not in page
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_terminal_shows_markup_of_a_model_as_text(capsys):
    report.print_report(RESULT, [Check("toxicity falls", "by 3 %", False)])
    shown = capsys.readouterr().out
    assert "[bold]a & b" in shown
    assert "BROKEN" in shown
    assert "-0.250" in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.000"), (-0.12345, "-0.123"), (1.0, "1"), (12.3456, "12.35"), (123456.7, "123457"), (float("nan"), "-")],
)
def test_numbers(value, shown):
    assert report.show_number(value) == shown


def test_point_estimates_have_no_interval():
    assert report.show_estimate({"mean": 0.0, "low": 0.0, "high": 0.0}) == "0.000"


def test_curves_pass_over_steps_without_the_metric():
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "heldout/loss": 3.0}]
    curve = report.metric_curve(records, {"loss": "training", "heldout/loss": "held-out"}, "loss")
    assert curve.series == {"training": ([1, 2], [2.0, 1.0]), "held-out": ([2], [3.0])}
