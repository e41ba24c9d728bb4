"""`rlhf label`: a page on this machine where people rank completions; the answers are what `rlhf prefs` reads."""

from __future__ import annotations

import signal
import socket
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from rlhf_trainer.base.config import option, refuse_overwriting, require
from rlhf_trainer.base.console import say
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.files import read_lines
from rlhf_trainer.labelling import page as label_page
from rlhf_trainer.labelling.instructions import CRITERIA, instructions
from rlhf_trainer.labelling.store import Store, parse_rank, read_tasks

SUMMARY = """Serve a page on this machine where people rank the completions of a file, with the instructions in view.

FILE has lines of {"prompt", "completions": [...]}, such as `rlhf generate` writes. Each labeller gives a name and sees
the completions in an order of their own. Every answer is on disk before the page says so; stop and start at any time.
The answers go to FILE.rankings.jsonl, which `rlhf prefs` reads. Ctrl-C ends."""
EXAMPLE = (
    "rlhf label completions.jsonl --criterion helpful\n  rlhf prefs completions.rankings.jsonl --output pairs.jsonl"
)
POSITIONAL = "data"
LIMIT = 1 << 20  # bytes of a form; a hundred ranks take a few thousand
LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("", "0.0.0.0")


@dataclass
class LabelConfig:
    data: str = option("", "JSON lines with `prompt` and `completions`; .gz too")
    output: str = option("", "file of rankings, gone on with if it exists; default: beside the data, .rankings.jsonl")
    criterion: str = option("helpful", f"instructions shown: {', '.join(CRITERIA)}, or a sentence of your own")
    instructions: str | None = option(None, "Markdown file to show in place of the criterion's instructions")
    per_prompt: int = option(0, "how many labellers each prompt is shown to; 0: to everyone")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets others on the network in, without a password")
    port: int = option(8765, "port to listen on; 0 takes a free one")


Config = LabelConfig


class LabelServer(ThreadingHTTPServer):
    """The page's server with what its handlers share."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], store: Store, text: str) -> None:
        self.store, self.instructions, self.host = store, text, address[0]
        super().__init__(address, Handler)

    def server_close(self) -> None:
        super().server_close()
        self.store.close()

    @property
    def url(self) -> str:
        name = "localhost" if self.host in LOCAL else self.host
        return f"http://{socket.gethostname() if name in EVERYWHERE else name}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a silent connection is kept

    def do_GET(self) -> None:
        if not self._allowed():
            return
        parts = urlsplit(self.path)
        if parts.path == "/":
            self._home()
        elif parts.path == "/rank":
            self._rank(_single(parts.query))
        else:
            self._send(HTTPStatus.NOT_FOUND, label_page.page("Not found", '<p>No such page. <a href="/">Begin</a></p>'))

    def do_POST(self) -> None:
        if not self._allowed():
            return
        length = self.headers.get("Content-Length", "")
        if urlsplit(self.path).path != "/rank" or not length.isdigit() or int(length) > LIMIT:
            self.close_connection = True  # the body is not read
            self._send(HTTPStatus.BAD_REQUEST, label_page.page("Refused", "<p>Not a form of this page.</p>"))
            return
        self._save(_single(self.rfile.read(int(length)).decode("utf-8", errors="replace")))

    def _allowed(self) -> bool:
        """Only pages of this server may talk to it: no other site that the labeller's browser has open."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        name = host.rsplit(":", 1)[0].strip("[]")
        here = self.server.host not in LOCAL or name in LOCAL
        if origin not in (None, f"http://{host}") or not here:
            self.close_connection = True
            self._send(HTTPStatus.FORBIDDEN, label_page.page("Refused", "<p>This request comes from another site.</p>"))
            return False
        return True

    def _home(self, wrong: str = "") -> None:
        store = self.server.store
        status = HTTPStatus.BAD_REQUEST if wrong else HTTPStatus.OK
        self._send(status, label_page.home(store.done(), len(store.tasks), self.server.instructions, wrong))

    def _rank(self, query: dict[str, str]) -> None:
        """The next open prompt, or the one asked for."""
        store, name = self.server.store, _name(query)
        if not name:
            return self._home("Please give a name of at most 64 characters.")
        numbers = {key: int(query[key]) for key in ("task", "after", "saved") if query.get(key, "").isdecimal()}
        numbers = {key: number for key, number in numbers.items() if number < len(store.tasks)}
        message = label_page.saved_note(name, numbers["saved"]) if "saved" in numbers else ""
        number = numbers.get("task", store.next_task(name, numbers.get("after", numbers.get("saved", -1))))
        if number is None:
            done = store.done().get(name, 0)
            return self._send(HTTPStatus.OK, label_page.finished(name, done, len(store.tasks), message))
        return self._task(name, number, message)

    def _task(
        self, name: str, number: int, message: str, status: HTTPStatus = HTTPStatus.OK, ranks: Any = None
    ) -> None:
        store = self.server.store
        task = store.tasks[number]
        html = label_page.task(
            name,
            number,
            len(store.tasks),
            store.done().get(name, 0),
            task.prompt,
            task.order(name),
            store.ranks(number, name) if ranks is None else ranks,
            self.server.instructions,
            message,
        )
        self._send(status, html)

    def _save(self, form: dict[str, str]) -> None:
        store, name = self.server.store, _name(form)
        number = int(form["task"]) if form.get("task", "").isdecimal() else len(store.tasks)
        if not name or number >= len(store.tasks):
            return self._home("That answer had no name or no prompt; please begin again.")
        texts = store.tasks[number].order(name)
        given, wrong = {}, ""
        for index, text in enumerate(texts):
            try:
                given[text] = parse_rank(form.get(f"rank-{index}", ""), len(texts))
            except ValueError:
                wrong = "Not saved: every completion needs a rank."
        if wrong:
            return self._task(name, number, label_page.wrong_note(wrong), HTTPStatus.BAD_REQUEST, given)
        try:
            store.save(number, name, given)
        except OSError as error:
            wrong = f"Not saved: {error.strerror}. Tell whoever runs this page; your ranks are still in the form."
            return self._task(name, number, label_page.wrong_note(wrong), HTTPStatus.INTERNAL_SERVER_ERROR, given)
        # A redirect, so that reloading the page does not send the answer again.
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/rank?" + urlencode({"labeller": name, "saved": number}))
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def _send(self, status: HTTPStatus, html: str) -> None:
        body = html.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what a labeller does is in the rankings file."""


def _single(query: str) -> dict[str, str]:
    try:
        return {key: values[-1] for key, values in parse_qs(query, max_num_fields=1000).items()}
    except ValueError:  # more fields than any page has
        return {}


def _name(form: dict[str, str]) -> str:
    """The labeller's name, single spaces and printable characters; "" if there is none."""
    name = " ".join(form.get("labeller", "").split())
    return name if len(name) <= 64 and name.isprintable() else ""


def label_server(cfg: LabelConfig) -> LabelServer:
    """A server that is bound but not yet serving: `serve_forever()` does, `shutdown()` from another thread ends that.

    As a context manager it closes the port and the file of rankings.

    Raises:
        UserError: bad files or options, or a port in use.
    """
    require(cfg, "data")
    if cfg.per_prompt < 0:
        raise UserError(f"--per_prompt {cfg.per_prompt}: must be at least 0")
    if cfg.instructions is None:
        text = instructions(cfg.criterion)
    else:
        text = "\n".join(line for _, line in read_lines(cfg.instructions))
    data = Path(cfg.data)
    output = cfg.output or data.with_name(data.name.split(".")[0] + ".rankings.jsonl")
    refuse_overwriting("output", output, data, cfg.instructions)
    if Path(output).suffix == ".gz":
        raise UserError(f"--output {output}: it grows by an answer at a time, uncompressed; name it .jsonl")
    store = Store(read_tasks(cfg.data), output, cfg.per_prompt)
    try:
        return LabelServer((cfg.host, cfg.port), store, text)
    except (OSError, OverflowError) as error:
        store.close()  # an overflow comes before the server would
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on {cfg.host}:{cfg.port}: {reason.lower()}; --port 0 takes a free one"
        ) from None


def run(cfg: LabelConfig) -> dict[str, Any]:
    """Serve until Ctrl-C or SIGTERM."""
    server = label_server(cfg)
    say(f"{len(server.store.tasks)} prompts; answers go to {server.store.path}\nopen {server.url}   (Ctrl-C ends)")
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    done = server.store.done()
    say(", ".join(f"{name}: {count}" for name, count in done.items()) or "nothing ranked")
    return {"answers": sum(done.values())}
