"""Keeps sessions with an open stream alive, even if nothing is requested in them."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

from mcp_proxy.background import Periodic, Workers
from mcp_proxy.errors import SessionNotFound, StorageError, StorageUnavailable
from mcp_proxy.sessions.manager import SessionManager

log = logging.getLogger(__name__)

_ROUNDS_PER_TTL = 3


class SessionRefresher(Periodic):
    """Restarts the time to live of held sessions, in one thread that starts with the first.

    `ttl` is the storage's, in seconds. Thread-safe.
    """

    is_essential = False

    def __init__(self, manager: SessionManager, ttl: float, workers: Workers | None = None) -> None:
        super().__init__("mcp-session-refresher", ttl / _ROUNDS_PER_TTL, self.refresh, workers)
        self._manager = manager
        self._lock = threading.Lock()  # guards _held
        self._held: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<SessionRefresher held={len(self._held)}>"

    def hold(self, session_id: str) -> Callable[[], None]:
        """Keeps a session alive until the returned function is called."""
        self.start()
        with self._lock:
            self._held[session_id] += 1
        return lambda: self._release(session_id)

    def refresh(self) -> None:
        """Restarts every held session's time to live once. A store that is down ends no session."""
        with self._lock:
            held = list(self._held)
        for session_id in held:
            try:
                self._manager.storage.load(session_id)
            except SessionNotFound:
                log.debug("a session with an open stream has ended")
            except StorageUnavailable as error:
                log.debug("sessions with open streams were not refreshed: %s", error)
                return
            except StorageError as error:
                log.warning("a session with an open stream was not refreshed: %s", error)

    def _release(self, session_id: str) -> None:
        with self._lock:
            self._held[session_id] -= 1
            if not self._held[session_id]:
                del self._held[session_id]
