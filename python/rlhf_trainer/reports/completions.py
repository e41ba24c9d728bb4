"""The completions of an evaluation side by side: an HTML table that can be searched, and sorted by any measure."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from rlhf_trainer.base.jsons import dumps
from rlhf_trainer.reports.style import SCRIPT


def completions_table(names: Sequence[str], samples: Sequence[dict[str, Any]], show: Any) -> str:
    """One row per prompt, one column per policy, each completion above its measures; `show` formats a number.

    samples: {"prompt", "completions": {policy: text}}, and where there are some {"measures": {policy: {name: value}}}.
    """
    measures = list(samples[0].get("measures", {}).get(names[0], {}))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("prompt", *names))
    body = "".join(_row(names, measures, sample, show) for sample in samples)
    table = f'<div class="scroll tall"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f'<div id="completions">{_controls(names, measures)}{table}</div><script>{SCRIPT}</script>'


def _row(names: Sequence[str], measures: Sequence[str], sample: dict[str, Any], show: Any) -> str:
    found = [[sample["measures"][name].get(measure) for measure in measures] for name in names] if measures else []
    values = [[_number(value) for value in row] for row in found]
    cells = [f'<td><div class="text">{html.escape(sample["prompt"])}</div></td>']
    for place, name in enumerate(names):
        shown = "".join(
            f"<small>{html.escape(measure.split(' (')[0])} <b>{show(value)}</b></small> "
            for measure, value in zip(measures, found[place] if found else (), strict=False)
            if value is not None
        )
        text = html.escape(sample["completions"][name])
        cells.append(f'<td><div class="text">{text}</div><div>{shown}</div></td>')
    return f"<tr data-values='{dumps(values, separators=(',', ':'))}'>{''.join(cells)}</tr>"


def _number(value: float | None) -> float | None:
    """A number for JSON, which has no NaN; four digits are enough to sort by."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def _controls(names: Sequence[str], measures: Sequence[str]) -> str:
    """The search field and the sort order; hidden until the script runs."""
    find = '<label>find <input type="search" name="find"></label>'
    sort = ""
    if measures:
        order = '<option value="">order of the file</option>'
        order += "".join(f'<option value="{i}">{html.escape(name)}</option>' for i, name in enumerate(measures))
        first = html.escape(names[0])
        whose = "".join(f'<option value="{i}">{html.escape(name)}</option>' for i, name in enumerate(names))
        whose += "".join(
            f'<option value="{i} change">{html.escape(name)} - {first}</option>'
            for i, name in enumerate(names)
            if i > 0
        )
        sort = (
            f'<label>sort by <select name="measure">{order}</select></label>'
            f'<label>of <select name="policy">{whose}</select></label>'
            '<button type="button" name="order">highest first</button>'
        )
    return f'<div class="controls" hidden>{find}{sort}<output class="note"></output></div>'
