"""The stream of a POST, resumed on any replica: read from the log, as far as it goes.

While the call runs the log grows, and the stream with it. When the child that would have answered
is lost, with whoever held it, the requests that the log has no answer to get an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.errors import PROXY_ERROR, BackendError, RequestId, StorageError, in_seconds
from mcp_proxy.resumption.writing import is_message
from mcp_proxy.storage.event_log import EventLog, LoggedEvent
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Response

# Seconds between looks at whether anything can still come.
_LOOK = 2.0

_LOST = "The server was lost before it answered"


class Replay:
    """What came after `event` on its stream: the source of an exchange, read by its receiver.

    `is_lost` says whether the child of the stream is lost; it may raise StorageError. After
    `timeout` seconds without an answer the stream ends with an error. While the worker drains it
    ends without one; the client resumes elsewhere.
    """

    def __init__(
        self,
        events: EventLog,
        session_id: str,
        event: LoggedEvent,
        is_lost: Callable[[], bool],
        timeout: float,
        is_draining: Callable[[], bool],
    ) -> None:
        self.exchange = Exchange()
        self._events = events
        self._session_id = session_id
        self._stream = event.stream
        self._after = event.id
        self._is_lost = is_lost
        self._is_draining = is_draining
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._is_complete = False
        self.exchange.attach(self, read_more=self._read_more)
        if event.is_last:
            self._end()

    def __repr__(self) -> str:
        return f"<Replay {self._stream} after={self._after} complete={self._is_complete}>"

    def stream_begun(self, exchange: Exchange) -> None:
        """It is one from the beginning."""

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        """The exchange has no deadline of its own."""

    def leave(self, exchange: Exchange) -> None:
        """Nothing but the receiver's own reading has to stop."""

    def _read_more(self, timeout: float) -> None:
        """Offers what is new in the log; waits at most `timeout` seconds for that."""
        if self._is_draining():
            self._end()
            return
        timeout = min(timeout, _LOOK)
        try:
            if self._read(timeout):
                return
            if self._is_lost():
                while self._read(0.0):
                    pass
                self._fail(_LOST)
            elif time.monotonic() > self._deadline:
                self._fail(f"The server did not answer within {in_seconds(self._timeout)}")
        except StorageError:
            time.sleep(timeout)  # the store is away; the client hears keepalives meanwhile

    def _read(self, timeout: float) -> bool:
        """Whether there was anything new in the log."""
        events = self._events.read(self._session_id, self._after, timeout)
        for event in events:
            self._after = event.id
            if event.stream == self._stream and not self._is_complete:
                if is_message(event):
                    self.exchange.offer(ServerMessage(event.data, False, event_id=event.id))
                if event.is_last:
                    self._end()
        return bool(events)

    def _end(self) -> None:
        self._is_complete = True
        self.exchange.end()

    def _fail(self, sentence: str) -> None:
        """Tells the client that nothing more will come, for each request without an answer."""
        if self._is_complete:
            return
        for request_id in self._unanswered():
            data = jsonrpc.encode_error(PROXY_ERROR, sentence, request_id)
            self.exchange.offer(ServerMessage(data, is_response=True))
        self._end()

    def _unanswered(self) -> list[RequestId]:
        ids: list[RequestId] = []
        for event in self._whole_stream():
            if event.data.startswith(b"["):  # where the stream begins; an empty one was too large
                ids = msgspec.json.decode(event.data, type=list[int | str])
            elif not is_message(event):
                continue
            elif isinstance(answer := jsonrpc.parse_message(event.data), Response):
                ids = [known for known in ids if not _are_same(known, answer.id)]
        return ids

    def _whole_stream(self) -> list[LoggedEvent]:
        found: list[LoggedEvent] = []
        after: str | None = None
        while events := self._events.read(self._session_id, after, 0.0):
            found += [event for event in events if event.stream == self._stream]
            after = events[-1].id
        return found


def _are_same(one: RequestId, other: RequestId) -> bool:
    """Whether two ids are the same: 1 and "1" are not."""
    return type(one) is type(other) and one == other
