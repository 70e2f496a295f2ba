"""The client's connection, as far as the WSGI server lets one see it.

A server notices that a client left when a write fails, and only the second write after an orderly
close does (seen with gunicorn). So where the socket can be had it is asked; and where it can be had
the kernel is told to give up on a peer that vanished without a word.
"""

from __future__ import annotations

import contextlib
import select
import socket
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
