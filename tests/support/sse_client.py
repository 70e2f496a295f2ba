"""The least that a client of HTTP+SSE (MCP 2024-11-05) does, everything in the test's hands."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

from mcp_proxy.wire.sse import Event
from tests.support.front import Answer, Front, Json

JSON_TYPE = {"Content-Type": "application/json"}


class SseClient:
    """One session: its stream comes by `front`, its messages go by `posts`, else by the same."""

    def __init__(self, front: Front, posts: Front | None = None, path: str = "/sse") -> None:
        self.front = front
        self.posts = posts or front
        self.path = path
        self.uri = ""
        self.stream: Answer | None = None
        self.heard: list[Json] = []  # what came and was no answer that was waited for
        self._events: Iterator[Event] = iter(())
        self._ids = itertools.count(1)

    @property
    def session(self) -> str:
        """The session's id, as the endpoint says it."""
        return parse_qs(urlsplit(self.uri).query)["session_id"][0]

    def connect(self, **headers: str) -> Answer:
        """Opens the stream; of one that is an event stream the endpoint has been read."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        wanted = {"Accept": "text/event-stream", **given}
        present = {name: value for name, value in wanted.items() if value}
        answer = self.front.request("GET", self.path, present, None)
        if answer.status != 200:
            return _complete(answer)
        self.stream, self._events = answer, answer.events()
        first = next(self._events)
        assert first.event == b"endpoint", first
        self.uri = urljoin(self.path, (first.data or b"").decode())
        return answer

    def open(self, version: str = "2024-11-05") -> SseClient:
        """Opens a session, all of the handshake, and returns itself."""
        answer = self.connect()
        assert answer.status == 200, answer.body()
        self.initialize(version)
        return self

    def initialize(self, version: str = "2024-11-05") -> None:
        """The handshake, on a stream that is open."""
        about = {"name": "test", "version": "1"}
        params = {
            "protocolVersion": version,
            "capabilities": {"sampling": {}},
            "clientInfo": about,
        }
        assert self.result("initialize", params)["protocolVersion"] == version
        assert self.notify("notifications/initialized").status == 202

    # --- to the server ---------------------------------------------------------------------------

    def post(self, message: Any, uri: str | None = None, **headers: str) -> Answer:
        """Posts a message, or any bytes."""
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        wanted = {name: value for name, value in {**JSON_TYPE, **given}.items() if value}
        address = self.uri if uri is None else uri
        return _complete(self.posts.request("POST", address, wanted, body))

    def notify(self, method: str, params: Json | None = None) -> Answer:
        """Sends a notification."""
        return self.post({"jsonrpc": "2.0", "method": method, "params": params or {}})

    def call(self, method: str, params: Json | None = None, key: Any = None) -> Any:
        """Sends a request, which must be accepted, and returns its id."""
        key = next(self._ids) if key is None else key
        answer = self.post({"jsonrpc": "2.0", "id": key, "method": method, "params": params or {}})
        body = answer.body()
        assert (answer.status, body) == (202, b""), body
        return key

    # --- from the server -------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """What is still to come."""
        return self._events

    def next(self) -> Json:
        """The next message on the stream."""
        event = next(self._events)
        assert event.event == b"message", event
        message: Json = json.loads(event.data or b"")
        return message

    def answer(self, key: Any) -> Json:
        """The answer to a request; what comes before it is `heard`."""
        while True:
            message = self.next()
            is_answer = "method" not in message
            if is_answer and message.get("id") == key and type(message["id"]) is type(key):
                return message
            self.heard.append(message)

    def result(self, method: str, params: Json | None = None) -> Any:
        """The result of a request; an error fails the test."""
        message = self.answer(self.call(method, params))
        assert "result" in message, message
        return message["result"]

    def seen(self) -> list[Json]:
        """What has reached the scripted server of this session."""
        messages: list[Json] = self.result("seen")["messages"]
        return messages

    def close(self) -> None:
        """Leaves; harmless when repeated."""
        if self.stream is not None:
            self.stream.close()


def _complete(answer: Answer) -> Answer:
    """The same answer, its body read: its connection is done with."""
    return Answer(answer.status, answer.headers, iter([answer.body()]), answer.close)
