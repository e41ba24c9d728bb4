"""A result of `rlhf eval` as a terminal table and as one HTML page: plots are embedded PNGs, nothing is linked."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

matplotlib.use("Agg")  # a server has no display

SMOOTH = 20  # steps of the moving average in long curves
COLOURS = ("#8a8f98", "#1f6feb", "#2da44e", "#bf8700", "#8250df", "#cf222e")
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d1d9e0; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .35rem .6rem; border-bottom: 1px solid #d1d9e0; }
th { text-align: left; background: #f6f8fa; } td { vertical-align: top; } td.number { text-align: right; }
img { max-width: 100%; } .note { color: #59636e; } .pre { white-space: pre-wrap; }
.kept { color: #1a7f37; font-weight: 600; } .broken { color: #cf222e; font-weight: 600; }
"""


@dataclass(frozen=True)
class Curve:
    """One panel of learning curves: `series` maps a legend entry to (steps, values)."""

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    y_label: str = ""
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Check:
    """A promise about the result, what was seen, and whether it was kept."""

    promise: str
    seen: str
    kept: bool


def show_number(value: float) -> str:
    """Four significant digits at most, without an exponent for everyday sizes."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3f}"


def show_estimate(estimate: dict[str, float]) -> str:
    mean, low, high = (show_number(estimate[key]) for key in ("mean", "low", "high"))
    return mean if low == high == mean else f"{mean} [{low}, {high}]"


def metric_curve(
    records: Sequence[dict[str, Any]],
    keys: dict[str, str],
    title: str,
    y_label: str = "",
    limits: tuple[float, float] | None = None,
) -> Curve:
    """A panel from metrics.jsonl records, passing over those without the metric; `keys` maps metric to legend entry."""
    series = {}
    for key, name in keys.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        series[name] = ([x for x, _ in points], [y for _, y in points])
    return Curve(title, series, y_label, limits)


def _grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * min(columns, count), height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, min(columns, count), i + 1) for i in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def measures_figure(result: dict[str, Any]) -> Figure:
    """One panel a measure: a bar for each policy with its 95 % interval."""
    names = list(result["policies"])
    measures = list(result["policies"][names[0]]["measures"])
    figure, axes = _grid(len(measures), 4, 2.6, 2.4)
    for axis, measure in zip(axes, measures, strict=True):
        estimates = [result["policies"][name]["measures"][measure] for name in names]
        means = [estimate["mean"] for estimate in estimates]
        errors = [
            [max(0.0, estimate["mean"] - estimate["low"]) for estimate in estimates],
            [max(0.0, estimate["high"] - estimate["mean"]) for estimate in estimates],
        ]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
        axis.bar(names, means, yerr=errors, color=colours, width=0.6, capsize=4)
        for place, estimate in enumerate(estimates):
            top = (place, max(0.0, estimate["high"]))
            text = show_number(estimate["mean"])
            axis.annotate(text, top, xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
        axis.axhline(0, color="#59636e", linewidth=0.8)
        axis.margins(y=0.12)
        axis.set_title(measure, fontsize=9)
        if len(names) > 3:
            axis.tick_params(axis="x", rotation=30)
    return figure


def curves_figure(curves: Sequence[Curve]) -> Figure:
    figure, axes = _grid(len(curves), 3, 3.4, 2.5)
    for axis, curve in zip(axes, curves, strict=True):
        for colour, (name, (x, y)) in zip((*COLOURS[1:], COLOURS[0]), curve.series.items(), strict=False):
            if len(y) >= 5 * SMOOTH:  # a step's own loss is mostly noise: faint behind its moving average
                axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.25)
                x, y = x[SMOOTH - 1 :], np.convolve(y, np.ones(SMOOTH) / SMOOTH, mode="valid").tolist()
            axis.plot(x, y, label=name, color=colour, linewidth=1.4, marker="o" if len(x) < 3 else None)
        axis.set_title(curve.title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel(curve.y_label, fontsize=8)
        if curve.limits is not None:
            axis.set_ylim(curve.limits)
        if len(curve.series) > 1:
            axis.legend(fontsize=7, frameon=False)
    return figure


def embed(figure: Figure, description: str) -> str:
    """<img> with the figure inside as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """An HTML table of plain text; with `numbers`, all but the first column are aligned to the right."""
    kind = ' class="number"' if numbers else ' class="pre"'
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><td>{html.escape(row[0])}</td>"
        + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def measures_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the main table: measure, each policy's estimate, and each change against the first policy."""
    names = list(result["policies"])
    columns = ["measure", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    rows = []
    for measure in result["policies"][names[0]]["measures"]:
        estimates = [show_estimate(result["policies"][name]["measures"][measure]) for name in names]
        changes = [show_estimate(result["changes"][name][measure]) for name in names[1:]]
        rows.append([measure, *estimates, *changes])
    return columns, rows


def print_report(result: dict[str, Any], checks: Sequence[Check] = (), samples: int = 3) -> None:
    """Measures, promises and a few completions, as tables on the terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=110)
    columns, rows = measures_rows(result)
    table = Table(title=f"{result['prompts']} prompts, mean and 95 % interval", title_justify="left", box=SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if checks:
        promises = Table(title="Promises", title_justify="left", box=SIMPLE)
        for column in ("promise", "seen", ""):
            promises.add_column(column)
        for check in checks:
            promises.add_row(check.promise, check.seen, "[green]kept[/]" if check.kept else "[bold red]BROKEN[/]")
        console.print(promises)
    if samples:
        names = list(result["policies"])
        shown = Table(title="Completions", title_justify="left", show_lines=True)
        for column in ("prompt", *names):
            shown.add_column(column, overflow="fold")
        for sample in result["samples"][:samples]:
            # Text of a model is not markup: "[bold]" in it is printed as it stands.
            shown.add_row(*(escape(text.strip()) for text in (sample["prompt"], *sample["completions"].values())))
        console.print(shown)


def write_report(
    path: str | Path,
    result: dict[str, Any],
    *,
    title: str = "Evaluation",
    curves: Sequence[Curve] = (),
    checks: Sequence[Check] = (),
    notes: Sequence[str] = (),
    samples: int = 20,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        result: what `rlhf eval` writes to eval.json: "prompts", "policies", "changes", "samples".
        curves: learning curves, one panel each. checks: promises with their outcome. notes: paragraphs at the top.
    """
    columns, rows = measures_rows(result)
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    if checks:
        parts.append("<h2>Promises</h2>" + _checks_table(checks))
    parts.append("<h2>Before and after, on the same prompts</h2>")
    parts.append(html_table(columns, rows))
    intervals = "mean and 95 % interval: bootstrap over prompts, jackknife for distinct-n"
    parts.append(f'<p class="note">{result["prompts"]} prompts; {intervals}.</p>')
    parts.append(embed(measures_figure(result), "each measure for each policy"))
    if curves:
        parts.append("<h2>Learning curves</h2>" + embed(curves_figure(curves), "learning curves"))
    if samples and result["samples"]:
        names = list(result["policies"])
        shown = [
            [sample["prompt"], *(sample["completions"][n] for n in names)] for sample in result["samples"][:samples]
        ]
        parts.append("<h2>Completions side by side</h2>" + html_table(["prompt", *names], shown, numbers=False))
    return write_page(path, title, parts)


def write_page(path: str | Path, title: str, parts: Sequence[str]) -> Path:
    """A page of these pieces of HTML under their title, written whole or not at all."""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _checks_table(checks: Sequence[Check]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(check.promise)}</td><td>{html.escape(check.seen)}</td>"
        f'<td class="{"kept" if check.kept else "broken"}">{"kept" if check.kept else "broken"}</td></tr>'
        for check in checks
    )
    return f"<table><tbody>{rows}</tbody></table>"
