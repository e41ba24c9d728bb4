"""A result of `rlhf eval` as a terminal table and as one HTML page: plots are embedded PNGs, nothing is linked."""

from __future__ import annotations

import base64
import html
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_trainer.base.console import say
from rlhf_trainer.base.writing import write_text
from rlhf_trainer.reports.completions import completions_table
from rlhf_trainer.reports.style import STYLE

matplotlib.use("Agg")  # a server has no display

SMOOTH = 20  # steps of the moving average in long curves
COLOURS = ("#8a8f98", "#1f6feb", "#2da44e", "#bf8700", "#8250df", "#cf222e", "#0f8f8f", "#c2558f")
INKS = {"light": ("#1f2328", "#ffffff"), "dark": ("#e6edf3", "#0d1117")}  # text and lines, background
INK = "ink"  # gid of lines that take the colour of the text
MAX_SAMPLES = 200  # prompts whose completions the page shows


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


def show_number(value: float | None) -> str:
    """Four significant digits at most, without an exponent for everyday sizes."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3f}"


def show_estimate(estimate: Mapping[str, Any]) -> str:
    """Mean and interval; the mean alone where there is no interval, or it is a point."""
    mean, low, high = (show_number(estimate[key]) for key in ("mean", "low", "high"))
    return mean if estimate["low"] is None or low == high == mean else f"{mean} [{low}, {high}]"


def error_bars(estimates: Sequence[Mapping[str, Any]], mean: str = "mean") -> list[list[float]]:
    """[2][N] what matplotlib draws below and above each mean: never negative, 0 where there is no interval."""
    bars = [
        [one[mean] - one["low"], one["high"] - one[mean]] if one["low"] is not None else [0.0, 0.0] for one in estimates
    ]
    return [[max(0.0, pair[side]) if math.isfinite(pair[side]) else 0.0 for pair in bars] for side in (0, 1)]


def excludes_zero(estimate: Mapping[str, Any]) -> bool:
    return estimate["low"] is not None and estimate["low"] * estimate["high"] > 0


def write_or_warn(write: Callable[[], Any], what: str) -> None:
    """A report that cannot be drawn or written is said, and fails no stage: its training is done and saved."""
    try:
        write()
    except Exception as error:  # matplotlib's, of any kind
        say(f"warning: {what} could not be written ({type(error).__name__}: {error}); all else is complete")


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


def _grid(count: int, columns: int, panel_width: float, panel_height: float) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(panel_width * min(columns, count), panel_height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, min(columns, count), i + 1) for i in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def measures_figure(result: dict[str, Any]) -> Figure:
    """One panel a measure: a bar for each policy with its 95 % interval."""
    names = list(result["policies"])
    measures = list(result["policies"][names[0]]["measures"])
    figure, axes = _grid(len(measures), 4, 2.6, 2.2)
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    for axis, measure in zip(axes, measures, strict=True):
        estimates = [result["policies"][name]["measures"][measure] for name in names]
        means = [estimate["mean"] for estimate in estimates]
        bars = axis.bar(range(len(names)), means, yerr=error_bars(estimates), color=colours, width=0.7, capsize=3)
        drawn: Any = bars.errorbar
        _, caps, lines = drawn.lines
        for artist in (*caps, *lines):
            artist.set_gid(INK)
        for place, estimate in enumerate(estimates):
            top = (place, max(0.0, estimate["mean"] if estimate["high"] is None else estimate["high"]))
            text = show_number(estimate["mean"])
            size = 8 if len(names) <= 3 else 6
            axis.annotate(text, top, xytext=(0, 3), textcoords="offset points", ha="center", fontsize=size)
        axis.axhline(0, linewidth=0.8, gid=INK)
        axis.margins(y=0.12)
        axis.set_title(measure, fontsize=9)
        axis.set_xticks([])
    handles = [Patch(color=colour) for colour in colours]
    figure.legend(handles, names, loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    return figure


def curves_figure(curves: Sequence[Curve]) -> Figure:
    figure, axes = _grid(len(curves), 3, 3.4, 2.5)
    for axis, curve in zip(axes, curves, strict=True):
        for colour, (name, (x, y)) in zip((*COLOURS[1:], COLOURS[0]), curve.series.items(), strict=False):
            if len(y) >= 5 * SMOOTH:  # single steps are mostly noise: drawn faintly, behind their moving average
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
    """<picture> with the figure inside as a PNG for light pages and one for dark ones."""
    light, dark = (_png(figure, *INKS[kind]) for kind in ("light", "dark"))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img alt="{html.escape(description)}" src="{light}"></picture>'


def _png(figure: Figure, ink: str, paper: str) -> str:
    """The figure in these colours as a data URL."""
    figure.set_facecolor(paper)
    for axis in figure.axes:
        axis.set_facecolor(paper)
        axis.tick_params(colors=ink)
        for spine in axis.spines.values():
            spine.set_edgecolor(ink)
    found: list[Any] = figure.findobj(lambda artist: isinstance(artist, Text) or artist.get_gid() == INK)
    for artist in found:
        artist.set_color(ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def estimates_table(result: dict[str, Any]) -> str:
    """A row a measure, a column a policy: its estimate, and below its change against the first policy.

    A change is strong where its interval has no 0 in it.
    """
    names = list(result["policies"])
    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name in names)
    rows = []
    for measure in result["policies"][names[0]]["measures"]:
        cells = [f"<td>{html.escape(measure)}</td>"]
        for name in names:
            cell = _estimate(result["policies"][name]["measures"][measure])
            if name in result["changes"]:
                change = result["changes"][name][measure]
                shown = _estimate(change, sign="+")
                cell += f"<br>{f'<strong>{shown}</strong>' if excludes_zero(change) else shown}"
            cells.append(f'<td class="number">{cell}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _estimate(estimate: Mapping[str, Any], sign: str = "") -> str:
    mean, _, interval = show_estimate(estimate).partition(" ")
    if sign and estimate["mean"] > 0:
        mean = sign + mean
    return f"{mean} <small>{interval}</small>" if interval else mean


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
    samples: int = MAX_SAMPLES,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        result: what `rlhf eval` finds: "prompts", "policies", "changes", "samples", and "gates" if there are some.
        curves: learning curves, one panel each. checks: promises with their outcome. notes: paragraphs at the top.
        samples: prompts at most whose completions are shown.
    """
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    if checks:
        parts.append("<h2>Promises</h2>" + _checks_table(checks, ("kept", "broken")))
    if result.get("gates"):
        gates = [
            Check(f"not {gate['gate']}, {gate['policy']}", show_number(gate["value"]), not gate["failed"])
            for gate in result["gates"]
        ]
        parts.append("<h2>Gates</h2>" + _checks_table(gates, ("passed", "FAILED")))
    parts.append("<h2>Before and after, on the same prompts</h2>" + estimates_table(result))
    names = list(result["policies"])
    explained = (
        f"{result['prompts']} prompts; mean and 95 % interval over the prompts: Wilson's for shares, jackknife for "
        "distinct-n, else bootstrap. From one prompt there is none."
    )
    if result["changes"]:
        explained += f" Below each: the paired change against {names[0]}, bold where its interval excludes 0."
    parts.append(f'<p class="note">{html.escape(explained)}</p>')
    parts.append(embed(measures_figure(result), "each measure for each policy"))
    if curves:
        parts.append("<h2>Learning curves</h2>" + embed(curves_figure(curves), "learning curves"))
    if samples and result["samples"]:
        parts.append("<h2>Completions side by side</h2>")
        if len(result["samples"]) > samples:
            parts.append(f'<p class="note">The first {samples} of {len(result["samples"])} prompts.</p>')
        parts.append(completions_table(names, result["samples"][:samples], show_number))
    return write_page(path, title, parts)


def write_page(path: str | Path, title: str, parts: Sequence[str]) -> Path:
    """A page of these pieces of HTML under their title, written whole or not at all."""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )
    write_text(path, page)
    return Path(path)


def _checks_table(checks: Sequence[Check], words: tuple[str, str]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(check.promise)}</td><td>{html.escape(check.seen)}</td>"
        f'<td class="{"kept" if check.kept else "broken"}">{words[0] if check.kept else words[1]}</td></tr>'
        for check in checks
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
