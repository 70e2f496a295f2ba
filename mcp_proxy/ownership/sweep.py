"""The thread that looks, now and then, after sessions that nobody asks for any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from mcp_proxy.errors import StorageError

log = logging.getLogger(__name__)

_SWEEPS_PER_TTL = 4
_MAX_SWEEP = 30.0
_MIN_SWEEP = 0.25


class Sweeper:
    """Calls `sweep` several times in each `ttl` seconds, once it has been started. Thread-safe."""

    def __init__(self, name: str, ttl: float, sweep: Callable[[], None]) -> None:
        self._name = name
        self._interval = min(_MAX_SWEEP, max(_MIN_SWEEP, ttl / _SWEEPS_PER_TTL))
        self._sweep = sweep
        self._lock = threading.Lock()  # guards _thread
        self._thread: threading.Thread | None = None
        self._wanted = threading.Event()
        self._is_closed = False

    def start(self) -> None:
        """Starts the thread; harmless when repeated."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mcp-sweeper", daemon=True)
                self._thread.start()

    def soon(self) -> None:
        """Has the next sweep done at once."""
        self._wanted.set()

    def close(self) -> None:
        """Ends the thread after the sweep that it is at."""
        self._is_closed = True
        self._wanted.set()

    def _run(self) -> None:
        while not self._is_closed:
            self._wanted.wait(self._interval)
            self._wanted.clear()
            if not self._is_closed:
                self._sweep_once()

    def _sweep_once(self) -> None:
        try:
            self._sweep()
        except StorageError as error:
            log.warning("[%s] sessions not swept: %s", self._name, error)
        except Exception:
            log.exception("[%s] sessions not swept", self._name)
