"""An OpenAI-compatible server on this machine, of the standard library, whose answers a test writes."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serving(answer):
    """An OpenAI-compatible server: `answer(path, payload)` gives (status, object or bytes); yields (URL, payloads)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, payload):
            seen.append((self.path, payload, dict(self.headers)))
            status, body = answer(self.path, payload)
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """A client that hung up, and an assertion of `answer`, which the client sees as no reply."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text, top=None):
    logprobs = None if top is None else {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs}]}
