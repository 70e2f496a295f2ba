"""The client's connection, as far as the WSGI server lets one see it.

A server notices that a client left when a write fails, and only the second write after an orderly
close does (seen with gunicorn). So where the socket can be had it is asked; and where it can be had
the kernel is told to give up on a peer that vanished without a word.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_GONE = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class ClientConnection:
    """The connection behind one request. Used by the request's thread."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        # gunicorn and waitress each have their own word for it; other servers have none.
        self._socket: socket.socket | None = environ.get("gunicorn.socket")
        self._disconnected = environ.get("waitress.client_disconnected")

    @property
    def is_visible(self) -> bool:
        """Whether the server lets one see the connection at all."""
        return self._socket is not None or self._disconnected is not None

    def has_left(self) -> bool:
        """Whether the client is known to have closed its side. Never blocks."""
        if self._disconnected is not None:
            return bool(self._disconnected())
        if self._socket is None:
            return False
        try:
            poll = select.poll()
            poll.register(self._socket, _GONE)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True

    def give_up_after(self, seconds: float) -> None:
        """Breaks the connection when the peer acknowledges nothing for `seconds` (RFC 5482)."""
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if self._socket is not None and option is not None:
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))


# --- departures: Notices clients that leave while their request waits for a backend that is silent.

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
