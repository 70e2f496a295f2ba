"""How often servers exit by themselves, and what follows: a pause before the next start."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from mcp_proxy.errors import BackendDraining, BackendError, BackendNotStarted

#: A server that ran this long (seconds) before it exited does not count as one that keeps ending.
SETTLED = 10.0

#: The longest pause (seconds) before a process is started again.
LONGEST = 30.0

_REMEMBERED = 300.0  # seconds after which an exit is forgotten
_FAILURE_COUNTS = 30.0  # seconds for which failed starts count where one has succeeded
_FAILURES = 2  # failed starts in a row that are no accident, nor one client's doing


class _Exits(NamedTuple):
    times: int
    until: float


class Backoff:
    """The pauses before a session's server is started again, `longest` at most. Thread-safe.

    `clock` is for tests.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, longest: float = LONGEST
    ) -> None:
        self._clock = clock
        self._longest = longest
        self._lock = threading.Lock()  # guards what follows
        self._exits: dict[str, _Exits] = {}  # by session
        self._failure: tuple[float, str] | None = None  # the last one, unless a success followed
        self._failures = 0  # since the last success
        self._has_succeeded = False  # ever

    def note_exit(self, session_id: str, lifetime: float) -> None:
        """A session's server exited by itself after `lifetime` seconds."""
        with self._lock:
            before = self._exits.get(session_id)
            times = 1 if before is None or lifetime >= SETTLED else before.times + 1
            delay = 0.0 if times == 1 else min(self._longest, 2.0 ** (times - 2))
            self._exits[session_id] = _Exits(times, self._clock() + delay)
            long_past = self._clock() - _REMEMBERED
            self._exits = {
                key: exits for key, exits in self._exits.items() if exits.until > long_past
            }

    def require_over(self, session_id: str) -> None:
        """Raises BackendNotStarted while the session's server is not to be started again."""
        with self._lock:
            exits = self._exits.get(session_id)
        left = exits.until - self._clock() if exits is not None else 0.0
        if exits is not None and left > 0:
            seconds = math.ceil(left)
            error = BackendNotStarted(
                f"The server keeps ending ({exits.times} times); it is started again in {seconds} s"
            )
            error.headers = [("Retry-After", str(seconds))]
            raise error

    def forget(self, session_id: str) -> None:
        """The session is over."""
        with self._lock:
            self._exits.pop(session_id, None)

    def forget_all(self) -> None:
        """It is another server from now on: nothing is known of it."""
        with self._lock:
            self._exits.clear()
            self._failure, self._failures, self._has_succeeded = None, 0, False

    def note_failure(self, failure: BackendError) -> None:
        """A server could not be started, or exited before it had answered initialize."""
        if isinstance(failure, BackendDraining):
            return  # it is this replica that stops
        with self._lock:
            self._failure = (self._clock(), failure.message)
            self._failures += 1

    def note_success(self) -> None:
        """A server was started and has answered initialize."""
        with self._lock:
            self._failure = None
            self._failures = 0
            self._has_succeeded = True

    def not_ready_reason(self) -> str | None:
        """Why new servers cannot be expected to start, None if they can.

        Two failures in a row count until a start succeeds where none has succeeded before, for half
        a minute otherwise: a replica that gets no requests because it is not ready must become
        ready again to find out. A server that was never started is not known to be broken.
        """
        with self._lock:
            return self._last_failure() if self._failures >= _FAILURES else None

    def doubt(self) -> str | None:
        """Why the last start failed, for as long as that counts; None if it did not."""
        with self._lock:
            return self._last_failure()

    def _last_failure(self) -> str | None:
        """The last failure in words, None where it counts no more. The lock is held."""
        if self._failure is None:
            return None
        since, reason = self._failure
        if not self._has_succeeded:
            return f"{reason}; no start has succeeded so far"
        return reason if self._clock() - since <= _FAILURE_COUNTS else None
