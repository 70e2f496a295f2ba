"""What has happened lately in this process, for the page of an operator: sessions and failures.

Both are bounded, and the oldest go first. Nothing of it outlives the process. A session id is a
credential: its last eight characters are kept, which is what the log shows, too.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque

import msgspec

#: Sessions and failures that are remembered.
MAX_SESSIONS = 256
MAX_FAILURES = 20

# Characters of a text of others, and lines that a server wrote to stderr, at the most.
_MAX_TEXT = 300
_MAX_LINES = 10


class SessionNote(msgspec.Struct):
    """What is known of a session. Times are in seconds since 1970.

    `backend` is where its requests go, for one whose record was looked at.
    """

    id: str
    server: str
    began: float
    last: float
    client: str = ""
    calls: int = 0
    error: str = ""
    backend: str = ""


class FailureNote(msgspec.Struct):
    """Something of a server that went wrong: when (seconds since 1970), and what it said."""

    at: float
    server: str
    reason: str
    stderr: list[str]


class Recent:
    """The latest sessions and failures of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._sessions: OrderedDict[tuple[str, str], SessionNote] = OrderedDict()
        self._failures: deque[FailureNote] = deque(maxlen=MAX_FAILURES)

    def __repr__(self) -> str:
        return f"<Recent sessions={len(self._sessions)} failures={len(self._failures)}>"

    def note_call(self, session_id: str, server: str, client: str = "", error: str = "") -> None:
        """A request of a session is answered; `error` says what went wrong, if anything did.

        `client` is the name of the client where the request tells it.
        """
        key, now = (server, session_id[-8:]), time.time()
        with self._lock:
            note = self._sessions.pop(key, None) or SessionNote(key[1], server, now, now)
            note.last = now
            note.calls += 1
            note.client = shortened(client) or note.client
            note.error = shortened(error) or note.error
            self._sessions[key] = note
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def end_session(self, session_id: str, server: str) -> None:
        """A session has ended; it is forgotten."""
        with self._lock:
            self._sessions.pop((server, session_id[-8:]), None)

    def note_failure(self, server: str, reason: str, stderr: list[str]) -> None:
        """A server was lost, or could not be started; `stderr` is the end of what it wrote."""
        lines = [shortened(line) for line in stderr[-_MAX_LINES:]]
        with self._lock:
            self._failures.append(FailureNote(time.time(), server, shortened(reason), lines))

    def sessions(self, count: int) -> list[SessionNote]:
        """The sessions that were used last, the latest first."""
        with self._lock:
            latest = list(self._sessions.values())[-count:]
            return [msgspec.structs.replace(note) for note in reversed(latest)]

    def session(self, session_id: str, server: str) -> SessionNote | None:
        """What is known of one session; None where nothing is."""
        with self._lock:
            note = self._sessions.get((server, session_id[-8:]))
            return None if note is None else msgspec.structs.replace(note)

    def failures(self) -> list[FailureNote]:
        """The failures, the latest first."""
        with self._lock:
            return list(reversed(self._failures))


def shortened(text: str) -> str:
    """A text of others in one line, with nothing that cannot be seen, and not too long."""
    shown = text[:_MAX_TEXT]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)[:_MAX_TEXT]
    return shown if len(text) <= _MAX_TEXT else shown + "[...]"
