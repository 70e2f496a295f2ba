"""A child whose event streams can be resumed: a bridge, and the journal of its session.

It stands on the replica that holds the child, whoever reads its exchanges: a request thread here,
or the relay for another replica.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from mcp_proxy.backends.base import Backend
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import PushedExchange
from mcp_proxy.transports.journal import Journal, stream_name
from mcp_proxy.transports.logged import LoggedExchange, Missed
from mcp_proxy.transports.recorder import Recorder
from mcp_proxy.wire.jsonrpc import Notification, Request, Response


class ResumableBackend(Backend):
    """A bridge and the log of its session. `on_close` ends the child and what belongs to it."""

    def __init__(
        self,
        bridge: Bridge,
        journal: Journal,
        recorder: Recorder,
        on_close: Callable[[], None],
    ) -> None:
        self._bridge = bridge
        self._journal = journal
        self._recorder = recorder
        self._on_close = on_close
        self._numbers = itertools.count(1)
        self._standing = ""  # the name of the newest standing stream

    def __repr__(self) -> str:
        return f"<ResumableBackend {self._bridge!r}>"

    def send(
        self, requests: Sequence[Request], accepts_stream: bool, timeout: float
    ) -> PushedExchange:
        inner = self._bridge.send(requests, accepts_stream, timeout)
        if not accepts_stream:
            return inner
        name = stream_name(self._bridge.child_id, next(self._numbers))
        ids = [request.id for request in requests]
        return LoggedExchange(inner, self._journal, name, ids, self._recorder)

    def submit(self, request: Request, timeout: float) -> None:
        self._bridge.submit(request, timeout)

    def notify(self, notification: Notification) -> None:
        self._bridge.notify(notification)

    def respond(self, response: Response) -> None:
        self._bridge.respond(response)

    def listen(self, after: str | None = None) -> PushedExchange:
        event = None if after is None else self._journal.find(after)
        if event is None:
            name = stream_name(self._bridge.child_id, next(self._numbers), standing=True)
            return self._stand(name)
        if self._bridge.has_stream and self._standing != event.stream:
            return Missed(self._journal.missed(event))
        stream = self._stand(event.stream)
        stream.continue_after(event)
        return stream

    def _stand(self, name: str) -> LoggedExchange:
        self._standing = name
        return LoggedExchange(self._bridge.listen(), self._journal, name, None, self._recorder)

    def close(self) -> None:
        self._on_close()
