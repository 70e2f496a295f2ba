"""The contract of the event log, from which streams are resumed, and the log in memory.

MCP 2025-11-25, transports, "Resumability and Redelivery". Every event of a stream is logged before
it is sent, under an id that is unique in its session. A client that lost its connection sends the
last id that it got (Last-Event-ID) to any replica, and gets the later events of the same stream.
Each session has a log of its own, in which ids of other sessions are not found.
"""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

#: The limits of a session's log: events, bytes of data, and seconds after the last event.
MAX_EVENTS = 1000
MAX_BYTES = 4 * 1024 * 1024
KEPT = 600.0

#: The limit of a log in memory for all sessions together, in bytes with what each event costs
#: besides its data; the sessions that were silent the longest lose their events first.
MAX_LOCAL_BYTES = 64 * 1024 * 1024
_EVENT_COST = 256


class LoggedEvent(NamedTuple):
    """A logged event; `is_last` says that no event follows on its stream."""

    id: str
    stream: str
    data: bytes
    is_last: bool


class EventLog(ABC):
    """The events of sessions, bounded in number, bytes and time; the oldest are dropped first.

    Every method may be called from any thread and raises StorageUnavailable when the log cannot be
    reached.
    """

    @abstractmethod
    def append(self, session_id: str, stream: str, data: bytes, is_last: bool) -> str:
        """Logs an event and returns its id, which is later than every one in the session's log."""

    def append_all(
        self, session_id: str, stream: str, events: Sequence[bytes], is_last: bool
    ) -> list[str]:
        """Logs events of one stream, and returns their ids; `is_last` is said of the last one.

        A log that is far away does it in one round trip.
        """
        ends = [is_last and number == len(events) for number in range(1, len(events) + 1)]
        return [
            self.append(session_id, stream, data, end)
            for data, end in zip(events, ends, strict=True)
        ]

    @abstractmethod
    def find(self, session_id: str, event_id: str) -> LoggedEvent | None:
        """The event with this id, None where it is not, or no longer, in the session's log."""

    @abstractmethod
    def read(self, session_id: str, after: str | None, timeout: float) -> list[LoggedEvent]:
        """The next events of all streams after an id (None: from the oldest), in order.

        More may be in the log. Waits at most `timeout` seconds for the first; the list is empty
        when none came.
        """

    @abstractmethod
    def forget(self, session_id: str) -> None:
        """Drops the log of a session."""


class _Log:
    def __init__(self) -> None:
        self.events: deque[LoggedEvent] = deque()
        self.size = 0
        self.expires = 0.0

    @property
    def cost(self) -> int:
        """Bytes of memory, more or less."""
        return self.size + len(self.events) * _EVENT_COST

    def append(self, event: LoggedEvent) -> None:
        self.events.append(event)
        self.size += len(event.data)
        while len(self.events) > MAX_EVENTS or (self.size > MAX_BYTES and len(self.events) > 1):
            self.drop_oldest()

    def drop_oldest(self) -> None:
        self.size -= len(self.events.popleft().data)


class LocalEventLog(EventLog):
    """Events in memory, for `kept` seconds after a session's last one. `clock` is for tests."""

    def __init__(self, kept: float = KEPT, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept = kept
        self._clock = clock
        self._ids = itertools.count(1)
        self._appended = threading.Condition()  # guards and announces _logs; guards _cost
        self._cost = 0
        # Every append moves its log to the end, so the next to expire is the first.
        self._logs: OrderedDict[str, _Log] = OrderedDict()

    def __repr__(self) -> str:
        return f"<LocalEventLog sessions={len(self._logs)} bytes={self._cost}>"

    def append(self, session_id: str, stream: str, data: bytes, is_last: bool) -> str:
        with self._appended:
            self._sweep()
            log = self._logs.setdefault(session_id, _Log())
            before = log.cost
            event = LoggedEvent(str(next(self._ids)), stream, data, is_last)
            log.append(event)
            log.expires = self._clock() + self._kept
            self._logs.move_to_end(session_id)
            self._cost += log.cost - before
            self._make_room()
            self._appended.notify_all()
            return event.id

    def find(self, session_id: str, event_id: str) -> LoggedEvent | None:
        with self._appended:
            return next((e for e in self._events(session_id) if e.id == event_id), None)

    def read(self, session_id: str, after: str | None, timeout: float) -> list[LoggedEvent]:
        with self._appended:
            self._appended.wait_for(lambda: self._later(session_id, after), timeout)
            return self._later(session_id, after)

    def forget(self, session_id: str) -> None:
        with self._appended:
            log = self._logs.pop(session_id, None)
            self._cost -= 0 if log is None else log.cost

    def _make_room(self) -> None:
        """Drops what is oldest, but not the last event of all; the lock is held."""
        while self._cost > MAX_LOCAL_BYTES:
            session_id, log = next(iter(self._logs.items()))
            if len(log.events) == 1 and len(self._logs) == 1:
                return
            before = log.cost
            log.drop_oldest()
            self._cost -= before - log.cost
            if not log.events:
                del self._logs[session_id]

    def _later(self, session_id: str, after: str | None) -> list[LoggedEvent]:
        number = 0 if after is None else int(after)
        return [event for event in self._events(session_id) if int(event.id) > number]

    def _events(self, session_id: str) -> deque[LoggedEvent]:
        """The session's events; the lock is held."""
        self._sweep()
        log = self._logs.get(session_id)
        return deque() if log is None else log.events

    def _sweep(self) -> None:
        now = self._clock()
        while self._logs and next(iter(self._logs.values())).expires <= now:
            _, log = self._logs.popitem(last=False)
            self._cost -= log.cost


class ScopedEventLog(EventLog):
    """The part of a log in memory that one server's sessions have; the whole log is bounded."""

    def __init__(self, log: EventLog, name: str) -> None:
        self._log = log
        self._name = name

    def __repr__(self) -> str:
        return f"<ScopedEventLog {self._name} {self._log!r}>"

    def append(self, session_id: str, stream: str, data: bytes, is_last: bool) -> str:
        return self._log.append(self._key(session_id), stream, data, is_last)

    def find(self, session_id: str, event_id: str) -> LoggedEvent | None:
        return self._log.find(self._key(session_id), event_id)

    def read(self, session_id: str, after: str | None, timeout: float) -> list[LoggedEvent]:
        return self._log.read(self._key(session_id), after, timeout)

    def forget(self, session_id: str) -> None:
        self._log.forget(self._key(session_id))

    def _key(self, session_id: str) -> str:
        return f"{self._name}\0{session_id}"
