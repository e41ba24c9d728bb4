"""Reports: one self-contained page, numbers people can read, text of a model shown as text."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess

import pytest

from rlhf_trainer.reports import page as report
from rlhf_trainer.reports.page import Check, Curve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIELDS = ("find", "measure", "policy", "order")
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
    assert not re.search(r"(?:src|srcset|href)=\"(?!data:image/png;base64,)", page)
    assert "http" not in page
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert [base64.b64decode(image)[:8] for image in images] == [b"\x89PNG\r\n\x1a\n"] * 4  # for light and dark
    assert len(set(images)) == 4
    for shown in (
        "A &amp; B",
        "1 &lt; 2",
        "&lt;script&gt;p&lt;/script&gt;",
        "[bold]a &amp; b",
        "0.500 <small>[0.250, 0.750]</small><br>-0.250 <small>[-0.500, 0.000]</small>",
    ):
        assert shown in page
    assert '<td class="broken">broken</td>' in page
    assert page.count("<script") == 1  # our own; the prompt's is text
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


MEASURED = RESULT | {
    "gates": [{"gate": "toxicity>0.4", "policy": "ppo", "value": 0.5, "failed": True}],
    "samples": [
        {
            "prompt": f"prompt {place}",
            "completions": {"sft": "one", "ppo": f"two {'red' if place % 2 else 'blue'}"},
            "measures": {"sft": {"reward (x)": 1.0}, "ppo": {"reward (x)": value}},
        }
        for place, value in enumerate((0.5, 3.0, float("nan"), -2.0))
    ],
}


def test_changes_whose_interval_excludes_0_are_bold_and_failed_gates_stand_out(tmp_path):
    page = report.write_report(tmp_path / "r.html", MEASURED).read_text(encoding="utf-8")
    assert '<td>not toxicity&gt;0.4, ppo</td><td>0.500</td><td class="broken">FAILED</td>' in page
    assert "<small>reward <b>3</b></small>" in page
    assert "<strong>" not in page
    surely = MEASURED | {"changes": {"ppo": {"toxicity": {"mean": -0.25, "low": -0.5, "high": -0.1}}}}
    page = report.write_report(tmp_path / "r.html", surely).read_text(encoding="utf-8")
    assert "<strong>-0.250 <small>[-0.500, -0.100]</small></strong>" in page


def test_a_page_shows_so_many_prompts_and_says_so(tmp_path):
    page = report.write_report(tmp_path / "r.html", MEASURED, samples=3).read_text(encoding="utf-8")
    assert "The first 3 of 4 prompts." in page
    assert "prompt 2" in page
    assert "prompt 3" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("script", "prompts"),
    [
        ("", "0123"),
        ("find.value = 'RED'; find.dispatchEvent(input)", "13"),
        ("measure.value = '0'; policy.value = '1'; policy.dispatchEvent(input)", "1032"),
        ("measure.value = '0'; policy.value = '1 change'; measure.dispatchEvent(input); order.click()", "3012"),
    ],
)
def test_completions_are_searched_and_sorted(tmp_path, script, prompts):
    """In a browser: a value that is not a number comes last either way."""
    path = report.write_report(tmp_path / "r.html", MEASURED)
    names = ", ".join(f"{name} = document.querySelector('[name={name}]')" for name in FIELDS)
    act = f"<script>const {names}, input = new Event('input', {{bubbles: true}}); {script}</script>"
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{act}</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"]
    page = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert "".join(re.findall(r">prompt (\d)<", page)) == prompts
    assert f"{len(prompts)} of 4 shown" in page


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
