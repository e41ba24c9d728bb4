"""How report pages look, in light and in dark, and how their completions table is filtered and sorted."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --faint: #59636e; --line: #d1d9e0; --head: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #9198a1; --line: #3d444d;
  --head: #161b22; --good: #3fb950; --bad: #f85149; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 76rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; } .note, small { color: var(--faint); } small { font-size: .82em; }
.scroll { overflow: auto; margin: .5rem 0; } .tall { max-height: 85vh; border: 1px solid var(--line); }
table { border-collapse: separate; border-spacing: 0; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--head); position: sticky; top: 0; z-index: 1; overflow-wrap: anywhere; }
th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--paper); }
th:first-child { z-index: 2; background: var(--head); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.tall td, .tall th { min-width: 13rem; } .text { max-height: 12em; overflow: auto; }
.text + div { line-height: 1.3; } .text + div small { display: inline-block; margin-right: .8em; }
small b { color: var(--ink); }
img { max-width: 100%; }
.kept { color: var(--good); font-weight: 600; } .broken { color: var(--bad); font-weight: 600; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .5rem 0; }
.controls[hidden] { display: none; }
input, select, button { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: .3rem; padding: .15rem .5rem; }
@media print { .controls { display: none; } .tall { max-height: none; } .text { max-height: none; } }
"""

# A row's data-values holds [policy][measure]; without JavaScript the table is whole, in the order of the file.
SCRIPT = """
(() => {
  const box = document.getElementById("completions"), body = box.querySelector("tbody");
  const controls = box.querySelector(".controls"), field = (name) => controls.querySelector(`[name=${name}]`);
  const rows = [...body.rows].map((row, place) =>
    ({ row, place, text: row.textContent.toLowerCase(), values: JSON.parse(row.dataset.values) }));
  let falling = true;
  const key = ({ values }) => {
    const measure = field("measure").value, [policy, change] = field("policy").value.split(" ");
    const value = values[policy][measure], first = values[0][measure];
    return value === null || (change && first === null) ? null : change ? value - first : value;
  };
  const compare = (a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
    return (falling ? y - x : x - y) || a.place - b.place;
  };
  const update = () => {
    const words = field("find").value.toLowerCase();
    const sorted = field("measure") && field("measure").value;
    const found = rows.filter((entry) => entry.text.includes(words));
    found.sort(sorted ? compare : (a, b) => a.place - b.place);
    body.replaceChildren(...found.map((entry) => entry.row));
    controls.querySelector("output").value = `${found.length} of ${rows.length} shown`;
  };
  if (field("order")) field("order").addEventListener("click", () => {
    falling = !falling;
    field("order").textContent = falling ? "highest first" : "lowest first";
    update();
  });
  controls.addEventListener("input", update);
  controls.hidden = false;
  update();
})();
"""
