"""The two ways in, for the same tests: werkzeug's test client, and HTTP to a real gunicorn."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import requests
from werkzeug.test import Client

from mcp_proxy.wire import sse

SCRIPTED = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "servers" / "scripted.py"))

#: A server that ends, or closes its input or its output, when a tool says so.
MORTAL = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "servers" / "mortal.py"))

Json = dict[str, Any]

#: What begins a session, whole: the id and the version are of no importance.
INITIALIZE: Json = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}

_PATIENCE = 30.0


class Answer:
    """One HTTP response: complete, or an event stream that is read as it comes."""

    def __init__(
        self, status: int, headers: Mapping[str, str], pieces: Iterator[bytes], close: Any
    ):
        self.status = status
        self.headers = headers
        #: The bytes as they come.
        self.pieces = pieces
        self._close = close

    def __repr__(self) -> str:
        return f"<Answer {self.status} {self.headers.get('Content-Type')}>"

    @property
    def is_stream(self) -> bool:
        """Whether this is an event stream."""
        return self.headers.get("Content-Type", "").startswith("text/event-stream")

    @property
    def failure(self) -> str | None:
        """The kind of what failed without being the client's fault, None where nothing did."""
        return self.headers.get("X-MCP-Proxy-Error")

    @property
    def has_succeeded(self) -> bool:
        """Whether a request was served; a failure may be answered 200, too."""
        return self.status == 200 and self.failure is None

    def body(self) -> bytes:
        """Everything that is left to read."""
        try:
            return b"".join(self.pieces)
        finally:
            self.close()

    def events(self) -> Iterator[sse.Event]:
        """The events, each as soon as it is there; fails when keepalives are all that comes."""
        decoder = sse.Decoder()
        until = time.monotonic() + _PATIENCE
        for piece in self.pieces:
            for event in decoder.feed(piece):
                yield event
                until = time.monotonic() + _PATIENCE
            assert time.monotonic() < until, f"no event in {_PATIENCE:g} seconds"

    def stream(self) -> Iterator[Json]:
        """The JSON-RPC messages of an event stream, each as soon as it is there."""
        assert self.is_stream, f"{self!r}: {self.body()!r}"
        for event in self.events():
            if event.data:
                yield json.loads(event.data)

    def messages(self) -> list[Json]:
        """Every JSON-RPC message of the response, whatever its form."""
        if self.is_stream:
            found = list(self.stream())
            self.close()
            return found
        parsed = json.loads(self.body())
        return parsed if isinstance(parsed, list) else [parsed]

    def message(self) -> Json:
        """The last message: the answer."""
        return self.messages()[-1]

    def error(self) -> Json:
        """The JSON-RPC error of the answer."""
        error: Json = self.message()["error"]
        return error

    def close(self) -> None:
        """Leaves; harmless when repeated."""
        self._close()


class Front(Protocol):
    """A way in."""

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer: ...


class WsgiFront:
    """Calls the application directly, from the loopback unless the environ says otherwise."""

    def __init__(self, app: Any, environ: Mapping[str, Any] | None = None) -> None:
        self.app = app
        self.environ = {"REMOTE_ADDR": "127.0.0.1", **(environ or {})}

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        headers = dict(headers)
        options = {"content_type": headers.pop("Content-Type", None)}
        response = Client(self.app).open(
            path,
            method=method,
            headers=headers,
            data=body,
            buffered=False,
            environ_overrides=self.environ,
            **options,
        )
        pieces = iter(response.response)
        return Answer(response.status_code, response.headers, pieces, response.close)


class HttpFront:
    """Talks to a server, with so many seconds of patience for the next byte."""

    def __init__(self, base: str, patience: float = _PATIENCE) -> None:
        self.base = base
        self.patience = patience

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        response = requests.request(
            method, self.base + path, headers=headers, data=body, stream=True, timeout=self.patience
        )
        pieces = iter(lambda: response.raw.read1(), b"")
        answer = Answer(response.status_code, response.headers, pieces, response.close)
        weakref.finalize(answer, response.close)  # where a test looks at the head alone
        return answer


class RotatingFront:
    """Sends every request to another replica than the one before."""

    def __init__(self, fronts: Sequence[Front]) -> None:
        self._fronts = itertools.cycle(fronts)
        self._lock = threading.Lock()  # guards _fronts

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        with self._lock:
            front = next(self._fronts)
        return front.request(method, path, headers, body)


class McpClient:
    """The least that a legacy MCP client does, with everything in the test's hands."""

    def __init__(self, front: Front, path: str = "/mcp") -> None:
        self.front = front
        self.path = path
        self.session: str | None = None
        self.ids = itertools.count(1)

    def at(self, front: Front) -> McpClient:
        """The same session by another way in."""
        same = McpClient(front, self.path)
        same.session = self.session
        same.ids = self.ids
        return same

    def initialize(self, version: str = "2025-06-18", **headers: str) -> Answer:
        """Opens a session; the answer has been read."""
        params = {
            "protocolVersion": version,
            "capabilities": {"sampling": {}},
            "clientInfo": {"name": "test", "version": "1"},
        }
        answer = self.post(_request("initialize", params, 0), **headers)
        self.session = answer.headers.get("Mcp-Session-Id")
        return answer

    def open(self, version: str = "2025-06-18") -> McpClient:
        """Opens a session, all of the handshake, and returns itself."""
        answer = self.initialize(version)
        assert answer.status == 200, answer.body()
        assert answer.message()["result"]["protocolVersion"] == version
        assert self.notify("notifications/initialized").status == 202
        return self

    def call(
        self, method: str, params: Json | None = None, key: Any = None, **headers: str
    ) -> Answer:
        """Sends a request and returns the response as it comes."""
        key = next(self.ids) if key is None else key
        return self.post(_request(method, params, key), **headers)

    def result(self, method: str, params: Json | None = None) -> Any:
        """The result of a request; an error fails the test."""
        answer = self.call(method, params)
        message = answer.message()
        assert answer.status == 200, message
        assert "result" in message, message
        return message["result"]

    def notify(self, method: str, params: Json | None = None) -> Answer:
        """Sends a notification."""
        message: Json = {"jsonrpc": "2.0", "method": method}
        return self.post({**message, "params": params} if params is not None else message)

    def post(self, message: Json | Sequence[Json] | bytes, **headers: str) -> Answer:
        """Posts a message, several, or any bytes. Headers are given with _ for -."""
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        return self.request("POST", body, **{"Content_Type": "application/json", **headers})

    def listen(self, **headers: str) -> Answer:
        """Opens the standing stream."""
        return self.request("GET", None, **headers)

    def require_streaming(self) -> None:
        """Fails unless an event of the scripted server arrives before the next one is made."""
        answer = self.call("hold", {"name": "h", "_meta": {"progressToken": "t"}})
        messages = answer.stream()
        assert next(messages)["params"]["progressToken"] == "t"
        self.result("release", {"name": "h"})
        assert next(messages)["result"]["held"] == "h"
        answer.close()

    def delete(self) -> Answer:
        """Ends the session."""
        return self.request("DELETE", None)

    def request(self, method: str, body: bytes | None, **headers: str) -> Answer:
        """Any request with the headers of a decent client; an empty one is left out."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        all_headers = {
            "Accept": "application/json, text/event-stream",
            **({"Mcp-Session-Id": self.session} if self.session else {}),
            **given,
        }
        wanted = {name: value for name, value in all_headers.items() if value}
        return self.front.request(method, self.path, wanted, body)


def _request(method: str, params: Json | None, key: Any) -> Json:
    message: Json = {"jsonrpc": "2.0", "id": key, "method": method}
    return {**message, "params": params} if params is not None else message
