"""A connection of our worker class: the request that is arriving on it, and how long that may take.

A connection belongs to one thread at a time: to the main one while it waits in the poller, else to
the one that serves it or goes on with its handshake.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from gunicorn.http import get_parser
from gunicorn.http.unreader import Unreader
from gunicorn.workers import gthread

from mcp_proxy.server.answers import PIECE
from mcp_proxy.server.arriving import SLOWEST_BODY, ArrivingRequest, Shape
from mcp_proxy.server.passing import Held, Offer, Passed
from mcp_proxy.server.tls import with_tls

#: Seconds for which a thread waits at a connection on which it has answered.
STAY = 0.05

# Bytes of a body that are read at once if so many are wanted.
_LARGEST_PIECE = 1024 * 1024

# A plain number: the operators of an enum take longer than the system call.
_DONT_WAIT = int(socket.MSG_DONTWAIT)

# A connection on which requests have changed so often from one session to another is one of a pool.
_CHANGES_OF_A_POOL = 3

# Seconds for which a thread reads what the application has left of a body.
_SKIP_TIME = 0.05


class Connection(gthread.TConn):  # type: ignore[misc]
    """gunicorn's connection, with the bytes of the request that is arriving."""

    sock: Any
    parser: Any

    def __init__(self, limits: tuple[float, int], *args: Any) -> None:
        super().__init__(*args)
        self.client_timeout, self.max_header_bytes = limits
        #: Whether what comes, TLS apart, is HTTP/1: of nothing else a request is kept.
        self.is_followed = (
            self.cfg.http2_cleartext == "off"
            and self.cfg.proxy_protocol == "off"
            and self.cfg.protocol == "http"
        )
        #: Whether the bytes on the socket are those of HTTP/1.
        self.is_plain = self.is_followed and not self.cfg.is_ssl
        #: Whether TLS is still to be agreed on.
        self.needs_handshake = bool(self.cfg.is_ssl)
        #: What has to happen on the socket before anything can be done.
        self.waits_for = selectors.EVENT_READ
        self.data_ready = True  # gunicorn's thread need not wait for the first byte
        self.sock = ClientSocket(self.sock, self.client_timeout, self.is_plain)
        #: Whether a part of the threads that is for slow requests counts this one.
        self.counts_as_slow = False
        #: The session that the last request named, and how often that has changed.
        self.session: str | None = None
        self.changes = 0
        #: The request as it is given to another worker; None where it is answered here.
        self.offer: Offer | None = None
        #: The request while it waits for calls of its session, and the session whose call has a
        #: place of those that one session may have.
        self.held: Held | None = None
        self.share: str | None = None
        #: Whether another worker may have a copy of the socket.
        self.may_have_copies = False
        self.begin()

    def begin(self, surplus: bytes = b"") -> None:
        """Begins with the next request; `surplus` has been read with the last one."""
        self.request = ArrivingRequest(self.max_header_bytes)
        if surplus:
            self.request.add(surplus)
        #: Whether the request has been told to send its body.
        self.is_continued = False
        #: Whether a thread has seen some of it.
        self.has_begun = False
        #: Whether its head has not come in time.
        self.is_late = False
        #: Called when its body has not come in time, before the application learns of it.
        self.on_late_body: Callable[[], object] | None = None
        #: Whether the client has ended its side while the request waited for a thread.
        self.has_left = False
        #: Whether the answer is a standing stream, which ends when it is told to.
        self.is_standing = False
        #: Whether the request is not to be passed to another worker, as it has been already.
        self.stays = False
        #: Whether another worker has passed the request here.
        self.was_passed = False
        #: Whether it was counted for its caller when it was read before, here or there.
        self.was_counted = False
        self.since = self.progress = time.monotonic()
        self._body_since: float | None = None
        self._body_until: float | None = None
        self._got = 0

    # --- in the main thread, and in a thread that stays ------------------------------------------

    def receive(self) -> bool:
        """Takes what has come; False if the client has left. A thread waits for `STAY` seconds."""
        try:
            data = self.sock.recv(PIECE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return True
        except OSError:
            return False
        self.request.add(data)
        self.progress = time.monotonic()
        if self._body_since is None and self.request.shape is Shape.BODY:
            self._body_since = self.progress
        return bool(data)

    def is_left(self) -> bool:
        """Whether the client has ended its side, and nothing is left to read."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def is_for_a_thread(self) -> bool:
        """Whether a thread can read the request, or is needed to read it."""
        return not self.is_followed or self.request.shape in (Shape.WHOLE, Shape.OTHER)

    @property
    def is_slow(self) -> bool:
        """Whether a thread may have to wait for the rest of the request."""
        is_odd = self.request.shape is Shape.OTHER
        return not self.is_followed or (is_odd and not self.stays)  # what was passed has come whole

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
        slowest = self._body_since + self.request.body_bytes / SLOWEST_BODY
        return self.client_timeout + min(self.progress, slowest)

    def end(self) -> None:
        """Ends our side, with TLS by the alert for that (RFC 8446 section 6.1). Never blocks.

        Raises OSError or ValueError where the client has left, or the socket is closed.
        """
        self.sock.setblocking(False)
        if isinstance(self.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()  # it would have the client's alert, too, for which nobody waits
        self.sock.shutdown(socket.SHUT_WR)

    # --- a request that is answered later, or by another worker ----------------------------------

    @property
    def is_put_off(self) -> bool:
        """Whether the thread that has read the request does not answer it."""
        return self.offer is not None or self.held is not None

    def to_read_again(self, request: bytes, session: str, is_counted: bool) -> Passed:
        """A request that was read, to be read once more, with what has come behind it."""
        ahead = self.parser.unreader.take_buffered()
        return Passed(request + ahead, session, self.changes, is_counted)

    def names(self, session: str) -> bool:
        """The request names a session; whether the connection may go where that lives.

        It does with its first session, and when two requests in a row have named the same one. A
        connection that keeps changing is one of a pool, which would be passed back and forth.
        """
        is_next = self.session is not None and self.session != session
        self.session = session
        self.changes += is_next
        return not (is_next or self.stays) and self.changes < _CHANGES_OF_A_POOL

    def take_over(self, passed: Passed) -> None:
        """Begins with a request that another worker has passed here."""
        self.begin(passed.data)
        self.session, self.changes = passed.session, passed.changes
        self.stays = self.was_passed = True
        self.was_counted = passed.is_counted

    def take_back(self, passed: Passed) -> None:
        """Begins once more with a request that nobody else has begun."""
        self.offer = self.held = None
        self.parser.mesg = None  # it is to be parsed once more
        self.sock.setblocking(False)
        was_passed = self.was_passed
        self.take_over(passed)
        self.was_passed = was_passed

    def close(self, graceful: bool = False) -> None:
        """Closes the connection; it ends with that, unless another worker has it.

        That has to be said, as another worker may still have a copy of the socket.
        """
        if self.offer is not None and self.offer.receipt is not None:
            self.offer.receipt.close()
        elif self.may_have_copies:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        super().close()

    # --- in a thread for handshakes --------------------------------------------------------------

    @property
    def is_in_handshake(self) -> bool:
        """Whether the client has begun to agree on TLS, and has not come to the end."""
        return self.needs_handshake and isinstance(self.sock, ssl.SSLSocket)

    def shake_hands(self) -> bool:
        """Goes on with the handshake as far as that goes at once; False if nobody began it.

        Raises OSError where it fails, and what `with_tls` raises.
        """
        self.waits_for = selectors.EVENT_READ
        if not self.is_in_handshake:
            if not self._has_sent_something():
                return False
            self.sock = with_tls(self.sock, self.cfg)
        try:
            self.sock.do_handshake()
            self.needs_handshake = False
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self.waits_for = selectors.EVENT_WRITE
        self.progress = time.monotonic()
        return True

    def _has_sent_something(self) -> bool:
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    # --- in a thread -----------------------------------------------------------------------------

    def init(self) -> None:
        """Gives gunicorn's parser what has come; from now on every wait has an end."""
        if not self.initialized:
            if self.cfg.is_ssl:  # else gunicorn would take the socket over once more
                self.parser = get_parser(self.cfg, self.sock, self.client)
            super().init()
            if not self.is_http2:
                self.parser.unreader = PatientUnreader(self)
        if not self.is_plain:
            self.sock.settimeout(self.client_timeout)
        if self.request.data:
            self.has_begun = True
            self._got = self.request.body_bytes
            self.parser.unreader.unread(self.request.take())

    def begin_body(self) -> None:
        """The head is read; what comes next is the body."""
        self._body_since = self._body_since or time.monotonic()

    def is_called_since(self, before: float) -> bool:
        """Whether a client has been waiting for an answer since before that time. Any thread."""
        since = self._body_since
        return since is not None and not self.is_standing and since < before

    def skip_body(self) -> bool:
        """Reads what the application has left of a body; whether the connection can be kept."""
        if getattr(self.parser.mesg.body.reader, "length", None) != 0:
            self._body_until = time.monotonic() + _SKIP_TIME
            if not self.parser.finish_body(deadline=self._body_until):
                return False
        self.parser.mesg = None  # else the parser would look for the end of that body again
        return True

    def chunk(self, size: int) -> bytes:
        """Bytes from the socket within the time that the request still has.

        Where the head is late it ends, where the body is late TimeoutError is raised.
        """
        before = self.sock.gettimeout()
        left = self._time_left() if before is None else min(before, self._time_left())
        self.sock.settimeout(max(left, 0.001))
        try:
            data: bytes = self.sock.recv(size)
        except TimeoutError:
            if self._body_since is not None:
                if self.on_late_body is not None:
                    self.on_late_body()
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
        slowest = self._body_since + self.client_timeout + self._got / SLOWEST_BODY
        until = slowest if self._body_until is None else min(slowest, self._body_until)
        return min(self.client_timeout, until - now)

    def finish(self) -> None:
        """Begins with the next request, once the last one is answered."""
        self.begin(self.parser.unreader.take_buffered())

    @property
    def has_unread_bytes(self) -> bool:
        """Whether there are bytes of the next request that do not make the socket readable."""
        return bool(self.request.data)


class ClientSocket(socket.socket):
    """A client's socket: nothing that a thread does on it takes longer than so many `seconds`.

    Python's own time limits cost a system call for each read and each write. So a socket on which
    bytes are plain is made blocking, and gets its limit where the client keeps a thread waiting.
    """

    def __init__(self, accepted: socket.socket, seconds: float, is_plain: bool) -> None:
        kind = (accepted.family, accepted.type, accepted.proto)
        super().__init__(*kind, fileno=accepted.detach())
        self._seconds = seconds
        self._limit = None if is_plain else seconds
        if is_plain:
            seconds, microseconds = divmod(round(STAY * 1_000_000), 1_000_000)
            limit = struct.pack("ll", seconds, microseconds)
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        super().setblocking(False)

    def setblocking(self, flag: bool) -> None:
        """Makes it wait, or not; without a system call where nothing changes."""
        timeout = self._limit if flag else 0.0
        if self.gettimeout() != timeout:
            self.settimeout(timeout)

    def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
        """Sends all of it; raises TimeoutError."""
        if self.gettimeout() is not None:
            super().sendall(data, flags)
            return
        try:
            sent = self.send(data, flags | _DONT_WAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            with self._limited():
                super().sendall(memoryview(data)[sent:], flags)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Sends a file; raises TimeoutError."""
        with self._limited():
            return super().sendfile(file, offset, count)

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        before = self.gettimeout()
        self.settimeout(self._seconds)
        try:
            yield
        finally:
            self.settimeout(before)


class PatientUnreader(Unreader):  # type: ignore[misc]
    """gunicorn's source of bytes, with the deadlines of a connection.

    It has no attribute `sock`: where there is one, gunicorn's parser sets its own time limit.
    """

    def __init__(self, conn: Connection) -> None:
        super().__init__()
        self._conn = conn

    def chunk(self, size_hint: int | None = None) -> bytes:
        """The next bytes; none where the client has left or its head is late."""
        return self._conn.chunk(max(PIECE, min(size_hint or 0, _LARGEST_PIECE)))
