"""Notices clients that leave while their request waits for a backend that is silent."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from mcp_proxy.edge.connection import ClientConnection

log = logging.getLogger(__name__)

#: Seconds between looks: how long a departure may go unnoticed.
LOOK = 0.2


class Departures:
    """Looks at the connections of waiting requests, all in one thread.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._wanted = threading.Condition()  # guards and announces _watched
        self._watched: dict[int, tuple[ClientConnection, Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Departures watched={len(self._watched)}>"

    def watch(
        self, connection: ClientConnection, on_departure: Callable[[], None]
    ) -> Callable[[], None]:
        """Calls `on_departure` once if the client leaves; what is returned ends the watch."""
        if not connection.is_visible:
            return lambda: None
        key = next(self._keys)
        with self._wanted:
            self._watched[key] = (connection, on_departure)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._look_for_ever, name="mcp-departures", daemon=True
                )
                self._thread.start()
            self._wanted.notify()
        return lambda: self._forget(key)

    def _forget(self, key: int) -> None:
        with self._wanted:
            self._watched.pop(key, None)

    def _look_for_ever(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._watched)
            self.look()
            time.sleep(LOOK)

    def look(self) -> None:
        """One look at everybody."""
        with self._wanted:
            watched = dict(self._watched)
        for key, (connection, on_departure) in watched.items():
            if connection.has_left():
                self._forget(key)
                try:
                    on_departure()
                except Exception:
                    log.exception("acting on a client's departure failed")
