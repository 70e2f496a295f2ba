"""The end of a worker: streams end, calls get their time, sessions go to other workers.

gunicorn has no hook for the moment at which it stops a worker, and then waits for open streams. So
a thread of ours learns of it, by the signal, or by looking where there is none: after
`max_requests`, or when the master has exited.

A worker whose sessions others can serve stops accepting first, and serves the connections that it
has until their clients are told to leave. So does one that has served `max_requests`. One that is
told to stop and has its sessions in memory accepts and refuses, since nobody else would answer.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

#: Seconds of gunicorn's `graceful_timeout` that calls do not get, from the signal on: gunicorn has
#: two for kept connections, children have five to end, and the last answers have to go out.
RESERVED = 8.0

# Seconds between looks whether the worker stops without a signal.
_LOOK = 1.0

# Seconds for which requests are served by a worker that cannot say whether it has clients.
_LINGER = 2.5


class Leaving:
    """The orderly end of one worker and its application, in a thread that waits for it."""

    def __init__(self, worker: Any, app: Any) -> None:
        self._worker = worker
        self._app = app
        self._told = threading.Event()
        self._told_at: float | None = None
        self._stop: Any = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._leave, name="mcp-drain", daemon=True)

    def start(self) -> None:
        """Takes SIGTERM in gunicorn's place; called in the main thread."""
        self._stop = signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.siginterrupt(signal.SIGTERM, False)
        self._thread.start()

    def leave_at_once(self) -> None:
        """Ends everything without waiting for any call."""
        self._has_ended = True
        self._app.close()

    def wait(self) -> None:
        """Returns when the application has ended; the worker's main loop has."""
        if not self._has_ended:
            self._has_ended = True
            self._told.set()
            self._thread.join()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._told_at = self._told_at or time.monotonic()
        self._told.set()

    def _leave(self) -> None:
        worker = self._worker
        while not self._told.wait(_LOOK) and worker.alive and os.getppid() == worker.ppid:
            pass
        since = self._told_at or time.monotonic()
        until = since + max(0.0, worker.cfg.graceful_timeout - RESERVED)
        refuses = self._told_at is not None and not self._app.is_shared
        if not refuses:
            self._stop_accepting()
        self._app.drain(until - time.monotonic(), lambda: not refuses and self._has_clients(since))
        self._stop_accepting()
        self._app.close()

    def _stop_accepting(self) -> None:
        """Has gunicorn stop the worker; harmless when repeated, or where it does so already."""
        if callable(self._stop):
            self._stop(signal.SIGTERM, None)

    def _has_clients(self, since: float) -> bool:
        """Whether requests are to be served, of clients that had a connection before the end."""
        if self._has_ended:
            return False
        found: bool | None = getattr(self._worker, "has_clients", None)
        return time.monotonic() < since + _LINGER if found is None else found
