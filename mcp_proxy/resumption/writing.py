"""What is written of a session's streams, so that a client whose connection broke finds the rest.

The replica that holds the child writes, in order, whoever serves the client: a message is logged
before it is sent. A stream is read on, into the log, when its client has left.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence

import msgspec

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.background import QueueWorker, Workers
from mcp_proxy.errors import PROXY_ERROR, StorageError
from mcp_proxy.storage.event_log import EventLog, LoggedEvent
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Response

log = logging.getLogger(__name__)

#: Bytes of the largest message that is kept for a resumption.
MAX_EVENT = 1024 * 1024

# Seconds without a log after it could not be reached.
_PAUSE = 5.0

# Seconds between looks at the deadlines of streams that are read on.
_LOOK = 1.0

# Messages of one stream that are read before the others have their turn.
_TURN = 64

_STANDING = "listen-"


def is_standing(stream: str) -> bool:
    """Whether a stream of this name is a standing one, not that of a POST."""
    return stream.rpartition("/")[2].startswith(_STANDING)


def child_of(stream: str) -> str:
    """The id of the child that a stream belongs to."""
    return stream.partition("/")[0]


def is_message(event: LoggedEvent) -> bool:
    """Whether an event is a message; the others say that a stream began, or what was not kept."""
    return event.data.startswith(b"{")


class SessionLog:
    """The log of one session's streams; the StreamLog of exchanges with the child `child_id`.

    Streams go on without ids while the log cannot be reached. Thread-safe.
    """

    def __init__(
        self, events: EventLog, session_id: str, child_id: str, reader: ReadOnWorker
    ) -> None:
        self._events = events
        self._session_id = session_id
        self._child_id = child_id
        self._reader = reader
        self._numbers = itertools.count(1)
        self._standing = ""  # the name of the newest standing stream
        self._not_before = 0.0
        self._is_closed = False

    def begin(self, exchange: Exchange) -> str | None:
        if not exchange.stream:
            exchange.stream = self._new_name(is_standing=not exchange.requests)
        # Who resumes the stream after our end can tell its requests that they got no answer.
        ids = msgspec.json.encode([request.id for request in exchange.requests])
        return self._append(exchange.stream, [ids], is_last=False)[0]

    def append(
        self, exchange: Exchange, messages: Sequence[ServerMessage], is_last: bool
    ) -> Sequence[str | None]:
        return self._append(exchange.stream, list(map(_kept, messages)), is_last)

    def continue_standing(self, exchange: Exchange, after: str | None, is_taken: bool) -> bool:
        event = None if after is None else self._events.find(self._session_id, after)
        if event is None:
            exchange.stream = self._standing = self._new_name(is_standing=True)
            return True
        exchange.stream = event.stream
        exchange.continue_after(event.id, self.missed(exchange, event.id))
        if is_taken and self._standing != event.stream:
            return False
        self._standing = event.stream
        return True

    def missed(self, exchange: Exchange, after: str) -> list[ServerMessage]:
        found: list[ServerMessage] = []
        while events := self._events.read(self._session_id, after, 0.0):
            found += [
                ServerMessage(event.data, is_response=False, event_id=event.id)
                for event in events
                if event.stream == exchange.stream and is_message(event)
            ]
            after = events[-1].id
        return found

    def read_on(self, exchange: Exchange) -> None:
        self._reader.add(exchange)

    def close(self) -> None:
        """Logs nothing any more: the session is over, or another replica's."""
        self._is_closed = True

    def _new_name(self, is_standing: bool) -> str:
        """A stream's name: the child's id, a slash, and a number that is unique for the child."""
        return f"{self._child_id}/{_STANDING if is_standing else ''}{next(self._numbers)}"

    def _append(self, stream: str, events: list[bytes], is_last: bool) -> Sequence[str | None]:
        if self._is_closed or time.monotonic() < self._not_before:
            return [None] * len(events)
        try:
            return self._events.append_all(self._session_id, stream, events, is_last)
        except StorageError as error:
            log.debug("events cannot be resumed for now: %s", error)
            self._not_before = time.monotonic() + _PAUSE
            return [None] * len(events)


def _kept(message: ServerMessage) -> bytes:
    """What is logged of a message: itself, or, where it is too large, that it was."""
    if len(message.data) <= MAX_EVENT:
        return message.data
    if not message.is_response:
        return b""
    answer = jsonrpc.parse_message(message.data)
    assert isinstance(answer, Response)
    sentence = "The answer was too large to be kept for a resumption"
    return jsonrpc.encode_error(PROXY_ERROR, sentence, answer.id)


class ReadOnWorker(QueueWorker[Exchange]):
    """Reads streams whose clients have left, to their ends: receiving a message logs it.

    One thread, which begins with the first such stream. Thread-safe.
    """

    is_essential = False

    def __init__(self, workers: Workers | None = None) -> None:
        super().__init__("mcp-read-on", workers)
        self._lock = threading.Lock()  # guards _exchanges
        self._exchanges: set[Exchange] = set()
        self._next_look = 0.0

    def __repr__(self) -> str:
        return f"<ReadOnWorker {len(self._exchanges)}>"

    def add(self, exchange: Exchange) -> None:
        """Reads an exchange until it is over; who read it before does not any more."""
        with self._lock:
            self._exchanges.add(exchange)
        self.start()
        exchange.set_on_ready(lambda: self.put(exchange))
        self.put(exchange)  # also so that its deadline is looked at from now on

    def run_once(self) -> None:
        for exchange in self.take(_LOOK if self._exchanges else None):
            self._read(exchange)
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _LOOK
            with self._lock:
                exchanges = list(self._exchanges)
            for exchange in exchanges:
                exchange.expire_if_due()

    def _read(self, exchange: Exchange) -> None:
        try:
            for _ in range(_TURN):
                if exchange.poll() is None:
                    break
            else:
                self.put(exchange)  # after the others
        except Exception:
            log.exception("reading a stream on failed")
            self.put(exchange)  # what failed was one message
        if exchange.is_over:
            with self._lock:
                self._exchanges.discard(exchange)
