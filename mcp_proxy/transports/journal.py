"""The journal of one session: its events, logged before they are sent, and found again."""

from __future__ import annotations

import logging
import time

from mcp_proxy.errors import StorageError
from mcp_proxy.storage.event_log import EventLog, LoggedEvent

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
