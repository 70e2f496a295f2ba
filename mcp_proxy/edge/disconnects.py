"""The client's connection, where the WSGI server gives access to it.

A server notices that a client has left when a write fails, which after an orderly close is only the
second write (seen with gunicorn). So the socket is polled, where there is one, and the kernel is
told to drop a peer that no longer responds.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mcp_proxy.background import Worker, Workers

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

#: Seconds between polls, so the longest time that a disconnect goes unnoticed.
LOOK = 0.2

#: The same for standing streams in front of stdio servers, of which many are open for long.
STREAM_LOOK = 1.0

_GONE = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class ClientConnection:
    """The connection behind one request.

    One whose caller `is_known` no longer, since what it has shown counts no more, has been left.
    """

    def __init__(
        self, environ: WSGIEnvironment, is_known: Callable[[], bool] | None = None
    ) -> None:
        # gunicorn and waitress each have a key of their own for it; other servers have none.
        self._socket: socket.socket | None = environ.get("gunicorn.socket")
        self._disconnected = environ.get("waitress.client_disconnected")
        self._is_known = is_known
        #: Whether it can be found out that the client has left.
        self.is_visible = (self._socket, self._disconnected, is_known) != (None,) * 3

    def has_left(self) -> bool:
        """Whether the client is known to have closed its side, or has to go. Never blocks."""
        if self._is_known is not None and not self._is_known():
            return True
        if self._disconnected is not None:
            return bool(self._disconnected())
        if self._socket is None:
            return False
        try:
            poll = _system_poll()
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


class DisconnectWatcher(Worker):
    """Notices clients that leave while their request waits for a silent backend.

    One thread polls the connections of all waiting requests, every `interval` seconds (none:
    `LOOK`); it starts with the first of them and sleeps while there is none. Thread-safe.
    """

    is_essential = False

    def __init__(self, workers: Workers | None = None, interval: float | None = None) -> None:
        super().__init__("mcp-disconnects", workers)
        self._interval = LOOK if interval is None else interval
        self._keys = itertools.count()
        self._changed = threading.Condition()  # guards and announces _watched
        self._watched: dict[int, tuple[ClientConnection, Callable[[], object]]] = {}

    def __repr__(self) -> str:
        return f"<DisconnectWatcher watched={len(self._watched)}>"

    def watch(
        self, connection: ClientConnection, on_disconnect: Callable[[], object]
    ) -> Callable[[], object]:
        """Calls `on_disconnect` once if the client leaves; the returned function ends the watch."""
        if not connection.is_visible:
            return _nothing
        self.start()
        key = next(self._keys)
        with self._changed:
            self._watched[key] = (connection, on_disconnect)
            self._changed.notify()
        return lambda: self._forget(key)

    def _forget(self, key: int) -> bool:
        """Ends a watch; False where it had ended already."""
        with self._changed:
            return self._watched.pop(key, None) is not None

    def prepare(self) -> None:
        self._changed = threading.Condition()
        self._watched = {}  # after a fork these are the parent's

    def wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def run_once(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._watched or self.is_stopping)
        self.look()
        time.sleep(self._interval)

    def look(self) -> None:
        """Polls every connection once."""
        with self._changed:
            watched = dict(self._watched)
        for key, (connection, on_disconnect) in watched.items():
            if connection.has_left() and self._forget(key):
                try:
                    on_disconnect()
                except Exception:
                    log.exception("acting on a client's disconnect failed")


def _system_poll() -> select.poll:
    """The system's, also where gevent has put its own there: that hears of no peer that leaves."""
    patches = sys.modules.get("gevent.monkey")
    make = select.poll if patches is None else patches.get_original("select", "poll")
    poll: select.poll = make()
    return poll


def _nothing() -> None:
    """Does nothing: there is no watch to end."""
