"""A connection of our worker class: the request that is arriving on it, and how long that may take.

A connection belongs to one thread at a time: to the main one while it waits in the poller, else to
the thread of the pool that serves it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from typing import Any

from gunicorn.http.errors import NoMoreData
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers import gthread

from mcp_proxy.server.arriving import ArrivingRequest, Shape

#: Bytes that are read or written at once.
PIECE = 64 * 1024

# Bytes of a body that have to come in a second, on the whole.
_SLOWEST = 1024


class Connection(gthread.TConn):  # type: ignore[misc]
    """gunicorn's connection, with the bytes of the request that is arriving."""

    sock: Any
    parser: Any

    def __init__(self, limits: tuple[float, int], *args: Any) -> None:
        super().__init__(*args)
        self.client_timeout, self.max_header_bytes = limits
        #: Whether the bytes on the socket are those of HTTP/1: of nothing else a request is kept.
        self.is_plain = (
            not self.cfg.is_ssl
            and self.cfg.http2_cleartext == "off"
            and self.cfg.proxy_protocol == "off"
            and self.cfg.protocol == "http"
        )
        self.data_ready = True  # gunicorn's thread need not wait for the first byte
        #: Whether a part of the threads that is for slow requests counts this one.
        self.has_place = False
        self.begin()

    def begin(self, surplus: bytes = b"") -> None:
        """Begins with the next request; `surplus` has been read with the last one."""
        self.request = ArrivingRequest(self.max_header_bytes)
        self.request.add(surplus)
        #: Whether the request has been told to send its body.
        self.is_continued = False
        #: Whether a thread has seen some of it.
        self.has_begun = False
        #: Whether its head has not come in time.
        self.is_late = False
        self.since = self.progress = time.monotonic()
        self._body_since: float | None = None
        self._got = 0

    # --- in the main thread, and in a thread that stays ------------------------------------------

    def receive(self) -> bool:
        """Takes what has come; False if the client has left. Waits only if nothing has come."""
        try:
            data = self.sock.recv(PIECE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.request.add(data)
        self.progress = time.monotonic()
        if self._body_since is None and self.request.shape is Shape.BODY:
            self._body_since = self.progress
        return bool(data)

    @property
    def is_for_a_thread(self) -> bool:
        """Whether a thread can read the request, or is needed to read it."""
        return not self.is_plain or self.request.shape in (Shape.WHOLE, Shape.OTHER)

    @property
    def is_slow(self) -> bool:
        """Whether a thread may have to wait for the rest of the request."""
        return self.is_plain and self.request.shape is Shape.OTHER

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for a 100 that has not been sent, before it sends the body."""
        request = self.request
        is_waiting = request.shape is Shape.BODY and not request.body_bytes
        return is_waiting and request.expects_continue and not self.is_continued

    @property
    def deadline(self) -> float:
        """When a connection that waits in the poller is given up."""
        if self._body_since is None:
            return self.since + self.client_timeout
        slowest = self._body_since + self.request.body_bytes / _SLOWEST
        return self.client_timeout + min(self.progress, slowest)

    # --- in a thread -----------------------------------------------------------------------------

    def init(self) -> None:
        """Gives gunicorn's parser what has come; from now on every wait has an end."""
        if not self.initialized:
            self._init_in_time()
            if not self.is_http2:
                self.parser.unreader = PatientUnreader(self)
        self.sock.settimeout(self.client_timeout)
        if self.request.data:
            self.has_begun = True
            self.parser.unreader.unread(bytes(self.request.data))
            self._got = self.request.body_bytes
            self.request = ArrivingRequest(self.max_header_bytes)

    def _init_in_time(self) -> None:
        """gunicorn shakes hands on a socket that it has made blocking: here that has its limit."""
        if self.cfg.is_ssl:
            self.sock = _PatientSocket(self.client_timeout, self.sock.detach())
        try:
            super().init()
        except TimeoutError as error:
            raise NoMoreData from error

    def begin_body(self) -> None:
        """The head is read; what comes next is the body."""
        self._body_since = self._body_since or time.monotonic()

    def chunk(self, read: Any, size_hint: int | None) -> bytes:
        """Bytes from the socket within the time that the request still has.

        Where the head is late it ends, where the body is late TimeoutError is raised.
        """
        before = self.sock.gettimeout()
        left = self._time_left() if before is None else min(before, self._time_left())
        self.sock.settimeout(max(left, 0.001))
        try:
            data: bytes = read(size_hint)
        except TimeoutError:
            if self._body_since is not None:
                raise
            self.is_late = True
            return b""
        finally:
            with contextlib.suppress(OSError):
                self.sock.settimeout(before)
        self.has_begun = self.has_begun or bool(data)
        self._got += len(data)
        return data

    def _time_left(self) -> float:
        now = time.monotonic()
        if self._body_since is None:
            return self.since + self.client_timeout - now
        slowest = self._body_since + self.client_timeout + self._got / _SLOWEST
        return min(self.client_timeout, slowest - now)

    def finish(self) -> None:
        """Begins with the next request, once the last one is answered."""
        self.begin(self.parser.unreader.take_buffered())

    @property
    def has_unread_bytes(self) -> bool:
        """Whether there are bytes of the next request that do not make the socket readable."""
        is_tls = isinstance(self.sock, ssl.SSLSocket)
        return bool(self.request.data) or (is_tls and self.sock.pending() > 0)


class _PatientSocket(socket.socket):
    """A socket that, made blocking, waits for some seconds only."""

    def __init__(self, seconds: float, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self._seconds = seconds

    def setblocking(self, flag: bool) -> None:
        """Makes it wait, or not."""
        self.settimeout(self._seconds if flag else 0.0)


class PatientUnreader(SocketUnreader):  # type: ignore[misc]
    """gunicorn's source of bytes, with the deadlines of a connection."""

    def __init__(self, conn: Connection) -> None:
        super().__init__(conn.sock)
        self._conn = conn

    def chunk(self, size_hint: int | None = None) -> bytes:
        """The next bytes; none where the client has left or its head is late."""
        return self._conn.chunk(super().chunk, size_hint)
