"""An exchange whose messages are logged, once it is a stream.

It is one from the moment that something comes before the answer, or that the transport begins it
because the answer takes long. A JSON answer is not logged. A stream whose client has left is still
read, into the log, until it is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from mcp_proxy.backends.base import Delivery
from mcp_proxy.backends.exchange import PushedExchange, QueuedExchange
from mcp_proxy.errors import PROXY_ERROR, RequestId
from mcp_proxy.storage.event_log import LoggedEvent
from mcp_proxy.transports.journal import Journal
from mcp_proxy.transports.recorder import Recorder
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Response

#: Bytes of the largest message that is kept for a resumption.
MAX_EVENT = 1024 * 1024


class LoggedExchange(PushedExchange):
    """What another exchange delivers, under the ids it was logged with.

    `ids` are those of the requests; None for a standing stream, which is one from the beginning.
    """

    def __init__(
        self,
        inner: QueuedExchange,
        journal: Journal,
        stream: str,
        ids: Sequence[RequestId] | None,
        recorder: Recorder,
    ) -> None:
        self.stream = stream
        self._inner = inner
        self._journal = journal
        self._ids = ids
        self._recorder = recorder
        self._is_stream = ids is None
        self._is_opened = False
        self._ahead: deque[Delivery] = deque()
        self._last_seen: LoggedEvent | None = None

    def __repr__(self) -> str:
        return f"<LoggedExchange {self.stream} stream={self._is_stream} {self._inner!r}>"

    @property
    def is_over(self) -> bool:
        return self._inner.is_over and not self._ahead

    @property
    def was_replaced(self) -> bool:  # type: ignore[override]
        """Whether a newer standing stream took its place."""
        return self._inner.was_replaced

    def begin(self) -> None:
        self._is_stream = True
        self._inner.nudge()

    def continue_after(self, event: LoggedEvent) -> None:
        """This goes on where an earlier stream of the same name was when its client left."""
        self._is_opened = True
        self._last_seen = event
        self._catch_up()

    def receive(self, timeout: float) -> Delivery | None:
        return self._first() or self._logged(self._inner.receive(timeout))

    def poll(self) -> Delivery | None:
        return self._first() or self._logged(self._inner.poll())

    def _first(self) -> Delivery | None:
        """What is to be sent before anything that is still to come."""
        if self._ahead:
            return self._ahead.popleft()
        return self._open() if self._is_stream and not self._is_opened else None

    def _logged(self, delivery: Delivery | None) -> Delivery | None:
        if self._last_seen is not None:
            self._catch_up()
            self._last_seen = None
        if delivery is not None:
            self._take(delivery)
        return self._ahead.popleft() if self._ahead else None

    def _take(self, delivery: Delivery) -> None:
        if not delivery.is_response:
            self._is_stream = True
        if not self._is_stream:
            self._ahead.append(delivery)
            return
        opening = None if self._is_opened else self._open()
        if opening is not None:
            self._ahead.append(opening)
        kept = _kept(delivery)
        is_last = self._ids is not None and self._inner.is_over
        event_id = self._journal.append(self.stream, kept, is_last)
        self._ahead.append(delivery._replace(event_id=event_id))

    def _open(self) -> Delivery | None:
        """Logs that the stream begins, and for whom: who resumes it after our end can tell them."""
        self._is_opened = True
        ids = msgspec.json.encode(list(self._ids or ()))
        event_id = self._journal.append(self.stream, ids)
        return None if event_id is None else Delivery(b"", is_response=False, event_id=event_id)

    def _catch_up(self) -> None:
        """What was logged meanwhile: whoever read the stream before may still be at it."""
        assert self._last_seen is not None
        for event in self._journal.missed(self._last_seen):
            self._last_seen = event
            self._ahead.append(Delivery(event.data, is_response=False, event_id=event.id))

    def close(self) -> None:
        if self._is_stream and self._ids is not None and not self.is_over:
            self._recorder.record(self, self._inner.close)
        else:
            self._inner.close()

    def wake_with(self, wake: Callable[[], None]) -> None:
        self._inner.wake_with(wake)

    @property
    def is_due(self) -> bool:
        return self._inner.is_due

    def expire_if_due(self) -> None:
        self._inner.expire_if_due()


class Missed(PushedExchange):
    """What a client missed on a standing stream that another has replaced; then it is over."""

    was_replaced = True

    def __init__(self, events: Sequence[LoggedEvent]) -> None:
        self._left = deque(events)

    @property
    def is_over(self) -> bool:
        return not self._left

    def receive(self, timeout: float) -> Delivery | None:
        return self.poll()

    def poll(self) -> Delivery | None:
        if not self._left:
            return None
        event = self._left.popleft()
        return Delivery(event.data, is_response=False, event_id=event.id)

    def close(self) -> None:
        self._left.clear()

    def wake_with(self, wake: Callable[[], None]) -> None:
        wake()

    @property
    def is_due(self) -> bool:
        return False

    def expire_if_due(self) -> None:
        pass


def _kept(delivery: Delivery) -> bytes:
    """What is logged of a message: itself, or, where it is too large, that it was."""
    if len(delivery.data) <= MAX_EVENT:
        return delivery.data
    if not delivery.is_response:
        return b""
    answer = jsonrpc.parse_message(delivery.data)
    assert isinstance(answer, Response)
    sentence = "The answer was too large to be kept for a resumption"
    return jsonrpc.encode_error(PROXY_ERROR, sentence, answer.id)
