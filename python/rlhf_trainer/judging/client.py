"""A client of OpenAI-compatible servers (vLLM, llama.cpp, Ollama, LM Studio), on the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urldefrag, urlsplit

from rlhf_trainer.base.errors import UserError

KEY = "RLHF_SERVER_KEY"  # environment variable with the server's API key, if it wants one
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses after which another try may succeed
Item = TypeVar("Item")
Found = TypeVar("Found")


class RefusedError(UserError):
    """The server refuses this request (HTTP 400 to 499)."""


class TooLongError(RefusedError):
    """What is asked is longer than the server's model can read."""


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


class ServerClient:
    """`URL` or `URL#model`, as in http://127.0.0.1:8000/v1#my-model; without a model the first that the server names.

    Args:
        timeout: seconds to wait for one reply.
        retries: further tries, with growing pauses, after no reply or a failure that may pass.
        parallel: requests sent at the same time.
    """

    def __init__(self, source: str, *, timeout: float = 120.0, retries: int = 3, parallel: int = 8) -> None:
        self.url, model = urldefrag(source)
        self.url = self.url.rstrip("/")
        if not is_url(source) or not urlsplit(self.url).hostname:
            raise UserError(f"{source}: not a server's address; expected one such as http://127.0.0.1:8000/v1")
        self.timeout, self.retries, self.parallel = timeout, retries, parallel
        # A proxy that the environment names cannot reach this machine's own address.
        local = urlsplit(self.url).hostname in LOOPBACK
        self.opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        reply = self.request("/models")
        try:
            return str(reply["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.url}/models names no model; say which with {self.url}#NAME") from None

    def request(self, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server replies with; a POST if there is a payload."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if payload is None else json.dumps(payload).encode()
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            request = urllib.request.Request(self.url + path, data, headers)
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    return self._object(path, response.read())
            except urllib.error.HTTPError as error:
                if last or error.code not in TRANSIENT:
                    reason = _reason(error)
                    kind = RefusedError if 400 <= error.code < 500 else UserError
                    if error.code in (400, 413) and "context" in reason.lower():
                        kind = TooLongError
                    raise kind(f"{self.url}{path}: HTTP {error.code}: {reason}") from None
            except (OSError, http.client.HTTPException) as error:  # refused, timed out, cut off
                if last:
                    reason = str(getattr(error, "reason", error)) or type(error).__name__
                    raise UserError(
                        f"{self.url}{path}: no reply in {self.retries + 1} tries: {reason}; is it running?"
                    ) from None
            time.sleep(min(0.2 * 2**attempt, 5.0))
        raise AssertionError  # the last attempt returns or raises

    def _object(self, path: str, body: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(body)
        except ValueError:
            raise UserError(f"{self.url}{path}: replied with something that is not JSON: {body[:80]!r}") from None
        if not isinstance(reply, dict):
            raise UserError(f"{self.url}{path}: replied with a {type(reply).__name__}, expected an object")
        return reply

    def choice(self, prompt: str | list[dict[str, str]], **options: Any) -> dict[str, Any]:
        """The first choice for a text (/completions) or a chat (/chat/completions), with "text" always there.

        Raises:
            UserError: no reply, an HTTP error, or a reply without text. TooLongError: beyond the model's context.
        """
        chat = not isinstance(prompt, str)
        path, key = ("/chat/completions", "messages") if chat else ("/completions", "prompt")
        reply = self.request(path, {"model": self.model, key: prompt, **options})
        try:
            found = dict(reply["choices"][0])
            text = found["message"]["content"] if chat else found["text"]
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"{self.url}{path}: a reply without a choice: {json.dumps(reply)[:120]}") from None
        return found | {"text": text or ""}

    def map(self, function: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """`function` of every item, several at a time, in order; the first error is raised."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(function, items))


def _reason(error: urllib.error.HTTPError) -> str:
    """What an error's body says, in one line."""
    try:
        body = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        found = json.loads(body)
        found = found.get("error", found)
        body = found["message"] if isinstance(found, dict) else str(found)
    except (ValueError, KeyError, AttributeError):
        pass
    return " ".join(str(body).split())[:200] or error.reason
