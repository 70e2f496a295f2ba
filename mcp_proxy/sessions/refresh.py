"""A session with an open stream lives, however long nothing is requested in it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

from mcp_proxy.errors import SessionNotFound, StorageError, StorageUnavailable
from mcp_proxy.sessions.manager import SessionManager

log = logging.getLogger(__name__)

_LOADS_PER_TTL = 3


class SessionKeeper:
    """Prolongs the sessions of open streams, in one thread that starts with the first of them.

    Thread-safe.
    """

    def __init__(self, manager: SessionManager, ttl: float) -> None:
        self._manager = manager
        self._interval = ttl / _LOADS_PER_TTL
        self._lock = threading.Lock()  # guards _kept and _thread
        self._kept: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def __repr__(self) -> str:
        return f"<SessionKeeper kept={len(self._kept)}>"

    def keep(self, session_id: str) -> Callable[[], None]:
        """Keeps a session alive until what is returned is called."""
        with self._lock:
            self._kept[session_id] += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mcp-keeper", daemon=True)
                self._thread.start()
        return lambda: self._release(session_id)

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()

    def prolong(self) -> None:
        """One round: every kept session is used. A store that is away ends no session."""
        with self._lock:
            kept = list(self._kept)
        for session_id in kept:
            try:
                self._manager.storage.load(session_id)
            except SessionNotFound:
                log.debug("a session with an open stream is over")
            except StorageUnavailable as error:
                log.warning("sessions with open streams were not prolonged: %s", error)
                return
            except StorageError as error:
                log.warning("a session with an open stream was not prolonged: %s", error)

    def _release(self, session_id: str) -> None:
        with self._lock:
            self._kept[session_id] -= 1
            if not self._kept[session_id]:
                del self._kept[session_id]

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            try:
                self.prolong()
            except Exception:
                log.exception("prolonging sessions failed")
