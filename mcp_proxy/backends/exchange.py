"""The exchange of a backend that pushes: a queue with a deadline and a bound.

Threads: the backend's reader offers, one request thread receives, anyone may close. Deliveries and
byte counts need no lock of their own: each counter has a single writer.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol

from mcp_proxy.backends.base import Delivery, Exchange
from mcp_proxy.errors import BackendError

#: Bytes that may wait for a slow client before its server's reader waits too.
MAX_BACKLOG = 4 * 1024 * 1024

_END = Delivery(b"", is_response=False)

# Seconds between looks at whether the client of a crowded exchange has left.
_ROOM_CHECK = 1.0


class ExchangeOwner(Protocol):
    """Who is told of what happens to an exchange."""

    def expire(self, exchange: QueuedExchange, failure: BackendError) -> None:
        """The deadline has passed: whatever is unanswered is answered by `failure`."""

    def detach(self, exchange: QueuedExchange) -> None:
        """The client no longer listens."""


class PushedExchange(Exchange):
    """An exchange that can be served by somebody who serves many, and waits for none of them."""

    @abstractmethod
    def poll(self) -> Delivery | None:
        """The next delivery if it is there. Never waits, and unlike `receive` expires nothing."""

    @abstractmethod
    def wake_with(self, wake: Callable[[], None]) -> None:
        """Has `wake`, which must be quick, called by whoever makes something happen here."""

    @property
    @abstractmethod
    def is_due(self) -> bool:
        """Whether a deadline has passed."""

    @abstractmethod
    def expire_if_due(self) -> None:
        """Acts on a deadline that has passed; for an exchange that nobody waits for."""


class QueuedExchange(PushedExchange):
    """`expected` responses are to come, or None for a stream that ends only when it is ended."""

    def __init__(self, owner: ExchangeOwner, expected: int | None, accepts_stream: bool) -> None:
        self.accepts_stream = accepts_stream
        self.deadline: float | None = None
        self._on_deadline: Callable[[], BackendError] | None = None
        self._owner = owner
        self._expected = expected
        self._queue: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self._offered = 0  # bytes; written by the reader
        self._taken = 0  # bytes; written by the receiver
        self._room: threading.Event | None = None  # made when the client is slow
        self._wake: Callable[[], None] | None = None
        self._closed = False
        self._ended = False

    def __repr__(self) -> str:
        backlog = self._offered - self._taken
        return f"<QueuedExchange expected={self._expected} backlog={backlog} over={self.is_over}>"

    # --- the receiving side ----------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self._ended or self._expected == 0

    def receive(self, timeout: float) -> Delivery | None:
        until = time.monotonic() + timeout
        while not self.is_over:
            item = self._next(until)
            if item is _END:
                self._ended = True
            elif item is not None:
                return self._account(item)
            elif time.monotonic() >= until and self._queue.empty():
                return None
        return None

    def poll(self) -> Delivery | None:
        while not self.is_over:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return None
            if item is _END:
                self._ended = True
            elif item is not None:
                return self._account(item)
        return None

    def _next(self, until: float) -> Delivery | None:
        """One item; None for a wake-up, or when the time or the deadline has come."""
        limit = until if self.deadline is None else min(until, self.deadline)
        try:
            return self._queue.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            self.expire_if_due()
            return None

    def _account(self, item: Delivery) -> Delivery:
        self._taken += len(item.data)
        if self._room is not None:
            self._room.set()
        if item.is_response and self._expected is not None:
            self._expected -= 1
        return item

    def wake_with(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        wake()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._room is not None:
                self._room.set()
            if self._expected != 0:  # nothing follows the last response, so nobody holds this
                self._owner.detach(self)

    # --- the offering side -----------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether the client has stopped listening."""
        return self._closed

    def offer(self, delivery: Delivery) -> None:
        """Adds a message; never blocks."""
        self._offered += len(delivery.data)
        self._put(delivery)

    def wait_for_room(self) -> None:
        """Returns when the client has caught up or left. Called by the reader, without any lock."""
        while self._is_crowded():
            room = self._room = threading.Event()
            if self._is_crowded():
                room.wait(_ROOM_CHECK)

    def _is_crowded(self) -> bool:
        return self._offered - self._taken > MAX_BACKLOG and not self._closed

    def nudge(self) -> None:
        """Has whoever waits here look again."""
        self._put(None)

    def end(self, replaced: bool = False) -> None:
        """Ends a stream after what is queued."""
        self.was_replaced = replaced
        self._put(_END)

    def _put(self, item: Delivery | None) -> None:
        self._queue.put(item)
        if self._wake is not None:
            self._wake()

    def drain(self) -> list[Delivery]:
        """What was offered and never received; for an exchange that nobody reads any more."""
        items: list[Delivery] = []
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return items
            if item is not None and item is not _END:
                items.append(item)

    # --- the deadline ----------------------------------------------------------------------------

    def set_deadline(self, seconds: float, on_deadline: Callable[[], BackendError]) -> None:
        """In `seconds` from now everything unanswered is answered by what `on_deadline` makes."""
        is_new = self.deadline is None
        self.deadline = time.monotonic() + seconds
        self._on_deadline = on_deadline
        if not is_new:
            self.nudge()  # a receiver that waits learns of the new deadline

    @property
    def is_due(self) -> bool:
        deadline = self.deadline
        return deadline is not None and time.monotonic() >= deadline

    def expire_if_due(self) -> None:
        make = self._on_deadline
        if make is None or self.deadline is None or time.monotonic() < self.deadline:
            return
        self.deadline = self._on_deadline = None
        self._owner.expire(self, make())
