"""A scripted HTTP+SSE server (MCP 2024-11-05), and what has become of each of its sessions."""

from __future__ import annotations

import itertools
import json
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

from tests.servers.http_backend import Feed, HttpBackend, Turn, stream


class OldSession:
    """One stream: the id that it was given, the target of its messages, what is to be sent."""

    def __init__(self, session_id: str, target: str) -> None:
        self.id = session_id
        self.target = target
        self.feed = Feed()
        self.posted: list[Any] = []


class OldServer(HttpBackend):
    """GET `path` opens a session; a POST to the target that its endpoint named gets 202.

    A request among what is posted is answered on its stream, with the server's name, the session
    and the params. `uri` is what the endpoint says: `{base}`, `{port}` and `{id}` are filled in.
    `head` precedes the event.
    """

    def __init__(self, name: str, *, path: str = "/sse", ids: str = "{name}-{number}") -> None:
        self.path = path
        self.ids = ids
        self.uri = "/messages?session_id={id}"
        self.head = b""
        self.line_end = b"\n"
        self.live: dict[str, OldSession] = {}  # by the target of its messages
        self._numbers = itertools.count(1)
        super().__init__(name=name)

    def __enter__(self) -> Self:
        return self

    @property
    def only(self) -> OldSession:
        """The session that is open."""
        (session,) = self.live.values()
        return session

    def _answer(self, turn: Turn) -> None:
        path = turn.seen.target.partition("?")[0]
        if (turn.seen.method, path) in self.acts:
            super()._answer(turn)
        elif turn.seen.method == "POST" and turn.seen.target in self.live:
            self._take(turn, self.live[turn.seen.target])
        elif turn.seen.method == "GET" and path == self.path:
            self._begin(turn)
        else:
            turn.reply(405 if path == self.path else 404, b"not here", "Allow: GET")

    def _begin(self, turn: Turn) -> None:
        session_id = self.ids.format(name=self.name, number=next(self._numbers))
        uri = self.uri.format(base=self.url, port=self.port, id=session_id)
        parts = urlsplit(urljoin(self.url + turn.seen.target, uri))
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        session = self.live[target] = OldSession(session_id, target)
        event = self.line_end.join([b"event: endpoint", b"data: " + uri.encode(), b"", b""])
        try:
            stream(self.head + event, session.feed)(turn)
        finally:
            self.live.pop(target, None)

    def _take(self, turn: Turn, session: OldSession) -> None:
        message = turn.seen.json
        session.posted.append(message)
        turn.reply(202)
        if "id" in message and "method" in message:
            result = {"server": self.name, "id": session.id, "params": message.get("params")}
            if message["method"] == "initialize":
                result["protocolVersion"] = message["params"]["protocolVersion"]
            answer = {"jsonrpc": "2.0", "id": message["id"], "result": result}
            session.feed.put(b"event: message\ndata: " + json.dumps(answer).encode() + b"\n\n")
