"""A child whose event streams can be resumed: a bridge, and the journal of its session.

It stands on the replica that holds the child, whoever reads its exchanges: a request thread here,
or the relay for another replica.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from mcp_proxy.backends.base import Backend, Delivery
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import PushedExchange, QueuedExchange
from mcp_proxy.errors import PROXY_ERROR, RequestId, StorageError
from mcp_proxy.storage.event_log import EventLog, LoggedEvent
from mcp_proxy.wire import jsonrpc
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


# --- logged: An exchange whose messages are logged, once it is a stream.

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


# --- journal: The journal of one session: its events, logged before they are sent, and found again.

log = logging.getLogger(__name__)

# Seconds without a log after it could not be reached.
_PAUSE = 5.0

_STANDING = "listen-"


def stream_name(child: str, number: int, standing: bool = False) -> str:
    """The name of a stream of a child; it tells both from any other."""
    return f"{child}/{_STANDING if standing else ''}{number}"


def is_standing(stream: str) -> bool:
    """Whether a stream of this name is a standing one, not that of a POST."""
    return stream.rpartition("/")[2].startswith(_STANDING)


def child_of(stream: str) -> str:
    """The id of the child that a stream belongs to."""
    return stream.partition("/")[0]


class Journal:
    """The log of one session. Streams go on without ids while the log cannot be reached.

    Thread-safe.
    """

    def __init__(self, events: EventLog, session_id: str) -> None:
        self._events = events
        self._session_id = session_id
        self._not_before = 0.0
        self._is_closed = False

    def append(self, stream: str, data: bytes, is_last: bool = False) -> str | None:
        """The id of the event that was logged, None where it could not be."""
        if self._is_closed or time.monotonic() < self._not_before:
            return None
        try:
            return self._events.append(self._session_id, stream, data, is_last)
        except StorageError as error:
            log.warning("events cannot be resumed for now: %s", error)
            self._not_before = time.monotonic() + _PAUSE
            return None

    def missed(self, event: LoggedEvent) -> list[LoggedEvent]:
        """The messages after an event on its stream; raises StorageUnavailable."""
        found: list[LoggedEvent] = []
        after = event.id
        while events := self._events.read(self._session_id, after, 0.0):
            found += [e for e in events if e.stream == event.stream and is_message(e)]
            after = events[-1].id
        return found

    def find(self, event_id: str) -> LoggedEvent | None:
        """The event of this id; raises StorageUnavailable."""
        return self._events.find(self._session_id, event_id)

    def close(self) -> None:
        """Logs nothing any more: the session is over, or another replica's."""
        self._is_closed = True


def is_message(event: LoggedEvent) -> bool:
    """Whether an event is a message; the others say that a stream began, or what was not kept."""
    return event.data.startswith(b"{")


# --- recorder: Reads on, into the log, the streams whose clients have left: they may come back for the rest.

# Seconds between looks at deadlines.
_LOOK = 1.0


class Recorder:
    """One thread, which begins with the first stream that is left. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _recorded and _thread
        self._recorded: dict[PushedExchange, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._woken: queue.SimpleQueue[PushedExchange | None] = queue.SimpleQueue()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Recorder {len(self._recorded)}>"

    def record(self, exchange: PushedExchange, on_over: Callable[[], None]) -> None:
        """Reads an exchange that logs what is received from it, until it is over."""
        with self._lock:
            self._recorded[exchange] = on_over
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="mcp-recorder", daemon=True)
                self._thread.start()
        exchange.wake_with(lambda: self._woken.put(exchange))

    def close(self) -> None:
        """Ends the thread; what is recorded ends with its backends."""
        with self._lock:
            self._is_closed = True
        self._woken.put(None)

    def _run(self) -> None:
        next_look = 0.0
        while not self._is_closed:
            with contextlib.suppress(queue.Empty):
                exchange = self._woken.get(timeout=_LOOK if self._recorded else None)
                if exchange is not None:
                    self._read(exchange)
            if time.monotonic() > next_look:
                next_look = time.monotonic() + _LOOK
                self._look_at_deadlines()

    def _look_at_deadlines(self) -> None:
        with self._lock:
            waiting = list(self._recorded)
        for exchange in waiting:
            exchange.expire_if_due()

    def _read(self, exchange: PushedExchange) -> None:
        try:
            while not exchange.is_over and exchange.poll() is not None:
                pass
        except Exception:
            log.exception("recording a stream failed")
        if exchange.is_over:
            with self._lock:
                on_over = self._recorded.pop(exchange, None)
            if on_over is not None:
                on_over()
