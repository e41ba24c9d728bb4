"""The pages of `rlhf label`: plain HTML forms that need no JavaScript."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import urlencode

from rlhf_trainer.data.rankings import FAIL, Rank

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#1c1e21;background:#f4f5f7}
main{display:flex;gap:2rem;align-items:flex-start;max-width:88rem;margin:0 auto;padding:1rem}
.work{flex:2 1 34rem;min-width:0}
aside{flex:1 1 20rem;position:sticky;top:1rem;max-height:95vh;overflow:auto;background:#fff;border:1px solid #d7dae0;
border-radius:8px;padding:0 1rem;font-size:.92rem}
aside h1{font-size:1.2rem}aside h2{font-size:1rem;margin-bottom:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
.prompt,fieldset{background:#fff;border:1px solid #d7dae0;border-radius:8px;padding:.8rem 1rem;margin:0 0 1rem}
.prompt{border-left:5px solid #4565c9}
legend,h2{font-weight:600}.prompt h2{font-size:1rem;margin:0 0 .4rem}
.ranks{margin-top:.7rem;display:flex;flex-wrap:wrap;gap:.4rem}
.ranks label{border:1px solid #b8bdc7;border-radius:6px;padding:.15rem .75rem;cursor:pointer}
.ranks label:has(:checked){background:#4565c9;border-color:#4565c9;color:#fff}
button{white-space:nowrap;font:inherit;padding:.5rem 1.5rem;border:0;border-radius:6px;background:#4565c9;color:#fff;
cursor:pointer}
.note{background:#e6f2e6;border-radius:6px;padding:.4rem .8rem}.wrong{background:#fbe3e0}
.foot{display:flex;gap:1.5rem;align-items:center}
progress{width:12rem}input[type=text]{font:inherit;padding:.4rem}
td,th{padding:.2rem 1rem .2rem 0;text-align:left}
@media(max-width:60rem){main{flex-direction:column-reverse}aside{position:static;flex:none;max-height:40vh}}
"""


def page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def markdown(text: str) -> str:
    """The Markdown that instructions are written in: headings, paragraphs, lists, bold."""
    html, kind = [], ""
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        for line in lines:
            heading = re.match(r"(#{1,3}) (.*)", line)
            item = re.match(r"(-|\*|\d+\.) (.*)", line)
            now = "" if not item else "ul" if item[1] in "-*" else "ol"
            if now != kind:
                html += [f"</{kind}>"] * bool(kind) + [f"<{now}>"] * bool(now)
                kind = now
            if heading:
                html.append(f"<h{len(heading[1])}>{_inline(heading[2])}</h{len(heading[1])}>")
            else:
                html.append(f"<li>{_inline(item[2])}</li>" if item else f"<p>{_inline(line)}</p>")
    return "\n".join(html + [f"</{kind}>"] * bool(kind))


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))


def _link(labeller: str, text: str, **query: int) -> str:
    return f'<a href="/rank?{escape(urlencode({"labeller": labeller, **query}))}">{escape(text)}</a>'


def home(done: Mapping[str, int], total: int, instructions: str, wrong: str = "") -> str:
    """The first page: it asks for a name, and shows how many prompts each labeller has ranked."""
    rows = "".join(f"<tr><td>{_link(name, name)}</td><td>{count} of {total}</td></tr>" for name, count in done.items())
    table = f"<h2>So far</h2><table><tr><th>labeller</th><th>prompts</th></tr>{rows}</table>" if rows else ""
    message = f'<p class="note wrong">{escape(wrong)}</p>' if wrong else ""
    body = (
        f'<div class="work"><h1>Ranking completions</h1>{message}<p>{total} prompts. Every answer is saved at once; '
        'stop whenever you like and come back under the same name.</p><form action="/rank">'
        '<label>Your name <input type="text" name="labeller" required maxlength="64" autofocus></label> '
        f"<button>Start</button></form>{table}</div><aside>{markdown(instructions)}</aside>"
    )
    return page("Ranking completions", body)


def task(
    labeller: str,
    number: int,
    total: int,
    done: int,
    prompt: str,
    texts: Sequence[str],
    ranks: Mapping[str, Rank],
    instructions: str,
    message: str = "",
) -> str:
    """A prompt and its completions to rank, with the ranks given before already chosen. `message` is HTML."""
    options = [*map(str, range(1, len(texts) + 1)), FAIL]
    fields = []
    for index, text in enumerate(texts):
        letter = chr(ord("A") + index) if index < 26 else str(index + 1)
        given = str(ranks.get(text, ""))
        choices = "".join(
            f'<label><input type="radio" name="rank-{index}" value="{option}" required'
            f"{' checked' if option == given else ''}> {option}</label>"
            for option in options
        )
        fields.append(
            f'<fieldset><legend>Completion {letter}</legend><p class="text">{escape(text)}</p>'
            f'<div class="ranks">{choices}</div></fieldset>'
        )
    body = (
        f'<div class="work">{message}<p class="foot"><span>{escape(labeller)}: {done} of {total} ranked</span> '
        f'<progress max="{total}" value="{done}"></progress></p>'
        f'<div class="prompt"><h2>Prompt</h2><p class="text">{escape(prompt)}</p></div>'
        f'<form method="post" action="/rank"><input type="hidden" name="labeller" value="{escape(labeller)}">'
        f'<input type="hidden" name="task" value="{number}">{"".join(fields)}'
        f'<p class="foot"><button>Save and go on</button> {_link(labeller, "Skip", after=number)} '
        f"<span>1 is best, equal ranks are a tie, {FAIL} is a completion that fails</span></p></form></div>"
        f"<aside>{markdown(instructions)}</aside>"
    )
    return page(f"Prompt {number + 1} of {total}", body)


def saved_note(labeller: str, number: int) -> str:
    return f'<p class="note">Prompt {number + 1} is saved. {_link(labeller, "Change it", task=number)}</p>'


def wrong_note(text: str) -> str:
    return f'<p class="note wrong">{escape(text)}</p>'


def finished(labeller: str, done: int, total: int, message: str = "") -> str:
    body = (
        f'<div class="work">{message}<h1>That was all, thank you</h1><p>{escape(labeller)}: {done} of {total} prompts '
        'ranked. Nothing is left to send.</p><p><a href="/">Back to the beginning</a></p></div>'
    )
    return page("Done", body)
