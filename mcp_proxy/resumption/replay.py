"""The stream of a POST, resumed on any replica: read from the log, as far as it goes.

While the call runs the log grows, and the stream with it. When the child that would have answered
is lost, with whoever held it, the requests that the log has no answer to get an error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

from mcp_proxy.backends.base import Delivery, Exchange
from mcp_proxy.errors import PROXY_ERROR, RequestId, StorageError
from mcp_proxy.resumption.writing import is_message
from mcp_proxy.storage.event_log import EventLog, LoggedEvent
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Response

# Seconds between looks at whether anything can still come.
_LOOK = 2.0

_LOST = "The server was lost before it answered"


class ResumedStream(Exchange):
    """What came after `event` on its stream.

    `is_orphaned` says whether the child of the stream is lost; it may raise StorageError. Without
    an answer it ends with an error after `timeout` seconds, and without one when `is_draining`: its
    client comes back, to another replica.
    """

    def __init__(
        self,
        events: EventLog,
        session_id: str,
        event: LoggedEvent,
        is_orphaned: Callable[[], bool],
        timeout: float,
        is_draining: Callable[[], bool],
    ) -> None:
        self._events = events
        self._session_id = session_id
        self._stream = event.stream
        self._after = event.id
        self._is_orphaned = is_orphaned
        self._is_draining = is_draining
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._found: deque[Delivery] = deque()
        self._is_complete = event.is_last

    def __repr__(self) -> str:
        return f"<ResumedStream {self._stream} after={self._after} over={self.is_over}>"

    @property
    def is_over(self) -> bool:
        return self._is_complete and not self._found

    def receive(self, timeout: float) -> Delivery | None:
        until = time.monotonic() + timeout
        while not self._found and not self._is_complete:
            left = until - time.monotonic()
            if left <= 0:
                return None
            self._look(min(left, _LOOK))
        return self._found.popleft() if self._found else None

    def close(self) -> None:
        self._is_complete = True
        self._found.clear()

    def _look(self, timeout: float) -> None:
        if self._is_draining():
            self._is_complete = True
            return
        try:
            if self._read(timeout):
                return
            if self._is_orphaned():
                self._read_all()
                self._fail(_LOST)
            elif time.monotonic() > self._deadline:
                self._fail(f"The server did not answer within {self._timeout:g} seconds")
        except StorageError:
            time.sleep(timeout)  # the store is away; the client hears keepalives meanwhile

    def _read_all(self) -> None:
        while self._read(0.0):
            pass

    def _read(self, timeout: float) -> bool:
        """Whether there was anything new in the log."""
        events = self._events.read(self._session_id, self._after, timeout)
        for event in events:
            self._after = event.id
            if event.stream == self._stream and not self._is_complete:
                self._is_complete = event.is_last
                if is_message(event):
                    self._found.append(Delivery(event.data, False, event_id=event.id))
        return bool(events)

    def _fail(self, sentence: str) -> None:
        """Tells the client that nothing more will come, for each request without an answer."""
        if self._is_complete:
            return
        self._is_complete = True
        for request_id in self._unanswered():
            data = jsonrpc.encode_error(PROXY_ERROR, sentence, request_id)
            self._found.append(Delivery(data, is_response=True))

    def _unanswered(self) -> list[RequestId]:
        ids: list[RequestId] = []
        for event in self._whole_stream():
            if not is_message(event):
                ids = msgspec.json.decode(event.data or b"[]", type=list[int | str])
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
