"""gunicorn's thread worker, made faster for small requests on kept-alive connections.

Seven things differ from `gunicorn.workers.gthread.ThreadWorker`:

- A thread that has answered waits at the connection for a moment while enough others are free: the
  next request of a busy client then need not go through the main loop, its queues and its poller.
- The head of a response and the first piece of its body are sent in one write.
- A worker without a free thread stops accepting, so that another worker takes the connection,
  however many connections are idle.
- A connection that is not kept is shut down and then read by the poller until the client has closed
  it, for two seconds at most; gunicorn's main loop would wait for each such client in turn.
- All threads are started before the first request, and a worker that gets fewer serves with those.
- Where the system has no file for another connection, accepting pauses for a moment.
- Settings are plain attributes once the worker runs; gunicorn looks one up in a registry fifty
  times per request.

It relies on this in gunicorn, 27.0 or later: the main loop calls `enqueue_req`, `finish_request`,
and `set_accept_enabled` each time around while the worker should accept and does not, and
`murder_pending` each time around; it hands what happens on a socket to the callback with which that
is registered in `poller`, and counts connections in `nr_conns`, for which a worker that stops
waits; `handle` returns False for a connection that is not to be kept and True for one that is,
whose surplus bytes are in `parser.unreader.buf`;
`wsgi.create` takes a `response_class`, whose `write` sends head and body by `sock.sendall`; an
attribute of `cfg` hides the setting of that name. `handle_request` is gunicorn's own with that
class. gunicorn handles signals, timeouts and bad requests.
"""

from __future__ import annotations

import contextlib
import errno
import select
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any

from gunicorn.http import wsgi
from gunicorn.workers import gthread

from mcp_proxy.wire import jsonrpc

#: Seconds for which a thread waits at a connection on which it has answered.
STAY = 0.05

# Seconds for which a connection that was shut down is read: closed with unread bytes it would be
# reset, and the client might lose the end of its answer (RFC 9112 section 9.6).
_CLOSING_TIME = 2.0

# Seconds for which a worker does not accept when the system has no file for a connection.
_PAUSE = 0.5

# JSON-RPC's code for what is no request.
_INVALID_REQUEST = -32600

_NO_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# A piece of at least this many bytes is sent on its own, not copied behind the head.
_LARGE = 64 * 1024


class _Gathering:
    """Replaces a socket and collects the bytes to send."""

    def __init__(self) -> None:
        self.data = b""

    def sendall(self, data: bytes) -> None:
        self.data += data


class JoinedResponse(wsgi.Response):  # type: ignore[misc]
    """A response whose head is sent together with the first piece of the body.

    An empty piece sends the head at once. Used by one thread.
    """

    sock: Any

    def write(self, arg: bytes) -> None:
        """Sends a piece of the body; gunicorn names the parameter."""
        if self.headers_sent or not 0 < len(arg) < _LARGE:
            super().write(arg)
            return
        sock, self.sock = self.sock, _Gathering()
        try:
            super().write(arg)
        finally:
            gathered, self.sock = self.sock.data, sock
        sock.sendall(gathered)


class KeepaliveWorker(gthread.ThreadWorker):  # type: ignore[misc]
    """The worker class behind the setting `gthread`."""

    alive: bool
    tpool: ThreadPoolExecutor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Connections that have a thread or wait for one; counted by the main thread.
        self.busy = 0
        #: The threads that there are.
        self.threads: int = self.cfg.threads
        # When accepting goes on for which the system had no file, None if it had.
        self._pauses_until: float | None = None
        #: Connections that were shut down and are read until their time is over, oldest first.
        self.closing: dict[gthread.TConn, None] = {}

    # --- in the main thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Runs the main loop until the worker stops."""
        settings = (name for name in self.cfg.settings if not hasattr(type(self.cfg), name))
        self.cfg.__dict__.update({name: getattr(self.cfg, name) for name in settings})
        self._start_threads()
        super().run()

    def _start_threads(self) -> None:
        """Starts all threads of the pool; a quarter fewer than there can be, if that is too few.

        That quarter is left to the application.
        """
        started = _start_all(self.tpool, self.threads)
        if started == self.threads:
            return
        self.tpool.shutdown()
        wanted, self.threads = self.threads, max(1, started * 3 // 4)
        self.log.warning(
            "Only %d of %d threads can be started; %d are used", started, wanted, self.threads
        )
        self.tpool = ThreadPoolExecutor(self.threads)
        _start_all(self.tpool, self.threads)

    def accept(self, listener: Any) -> None:
        """Accepts a connection; where there is no file for it, accepting pauses."""
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            self._pause(error)
        else:
            if self._pauses_until is not None:
                self.log.info("Accepting goes on")
            self._pauses_until = None

    def _pause(self, error: OSError) -> None:
        if self._pauses_until is None:
            self.log.warning("Accepting pauses: %s", error)
        self._pauses_until = time.monotonic() + _PAUSE
        self.set_accept_enabled(False)

    def enqueue_req(self, conn: gthread.TConn) -> None:
        """Hands a connection to a thread; refuses it if there is none and none can be started."""
        self.busy += 1
        try:
            super().enqueue_req(conn)
        except RuntimeError as error:
            self.busy -= 1
            self._refuse(conn, "503 Service Unavailable", f"No thread for the request: {error}")
        if self.busy >= self.threads:
            self.set_accept_enabled(False)

    def finish_request(self, conn: gthread.TConn, fs: Future[Any]) -> None:
        """Takes a connection back from a thread."""
        self.busy -= 1
        if fs.cancelled() or fs.exception() or not fs.result():
            self._shut_down(conn)
        else:
            super().finish_request(conn, fs)

    def set_accept_enabled(self, enabled: bool) -> None:
        """Starts or stops accepting; starts only while a thread is free and nothing pauses."""
        if self._pauses_until is not None and time.monotonic() < self._pauses_until:
            enabled = False
        super().set_accept_enabled(enabled and self.busy < self.threads)

    def murder_pending(self) -> None:
        """Closes connections whose time is over."""
        super().murder_pending()
        now = time.monotonic()
        for conn in [conn for conn in self.closing if conn.timeout <= now]:
            self._drop(conn)

    def _refuse(self, conn: gthread.TConn, status: str, message: str) -> None:
        """Answers a request in place of a thread, as far as that goes at once, and ends it."""
        self.log.warning("A request is answered with %s: %s", status, message)
        with contextlib.suppress(OSError):
            conn.sock.setblocking(False)
            conn.sock.send(_refusal(status, message))
        self._shut_down(conn)

    def _shut_down(self, conn: gthread.TConn) -> None:
        """Ends our side of a connection; the poller reads the other side to its end."""
        conn.timeout = time.monotonic() + _CLOSING_TIME
        self.closing[conn] = None
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
            self.poller.register(
                conn.sock, selectors.EVENT_READ, partial(self._read_on_and_forget, conn)
            )
        except (OSError, ValueError):  # the client has left, or the socket is closed already
            self._drop(conn)

    def _read_on_and_forget(self, conn: gthread.TConn, _sock: Any) -> None:
        try:
            is_over = not conn.sock.recv(_LARGE)
        except (BlockingIOError, ssl.SSLWantReadError):
            is_over = False
        except OSError:
            is_over = True
        if is_over:
            self._drop(conn)

    def _drop(self, conn: gthread.TConn) -> None:
        """Closes a connection that was shut down."""
        del self.closing[conn]
        self.nr_conns -= 1
        with contextlib.suppress(KeyError, ValueError):
            self.poller.unregister(conn.sock)
        conn.close()

    # --- in a thread of the pool -----------------------------------------------------------------

    def handle(self, conn: gthread.TConn) -> Any:
        """Answers requests of a connection for as long as this thread may wait for the next one."""
        if conn in self.closing:  # it was refused, and stayed in the queue of the pool
            return False
        outcome = super().handle(conn)
        while outcome is True and self._can_stay(conn) and _becomes_readable(conn.sock):
            outcome = super().handle(conn)
        return outcome

    def _can_stay(self, conn: gthread.TConn) -> bool:
        """Whether this thread may wait for the connection's next request.

        Enough other threads must be free, and no bytes may have been read already, by the parser or
        by TLS: those do not make a socket readable.
        """
        has_surplus = self.cfg.is_ssl or conn.parser.unreader.buf.getvalue()
        return self.alive and not has_surplus and self.busy <= self.threads // 2

    def handle_request(self, req: Any, conn: gthread.TConn) -> bool:
        """Answers one request; whether the connection is to be kept."""
        environ: dict[str, Any] = {}
        response: Any = None
        try:
            self.cfg.pre_request(self, req)
            begin = datetime.now()
            response, environ = wsgi.create(
                req, conn.sock, conn.client, conn.server, self.cfg, response_class=JoinedResponse
            )
            environ["wsgi.multithread"] = True
            self._decide_on_keeping(response)
            body = self.wsgi(environ, response.start_response)
            try:
                _send(body, response, environ)
            finally:
                self.log.access(response, req, environ, datetime.now() - begin)
                if hasattr(body, "close"):
                    body.close()
            return not response.should_close()
        except OSError:
            raise
        except (Exception, SystemExit):
            if response is None or not response.headers_sent:
                raise
            # The client would take an error page for the rest of the response that has begun.
            self.log.exception("Error handling request")
            raise StopIteration from None
        finally:
            self._tell_hook(req, environ, response)

    def _decide_on_keeping(self, response: Any) -> None:
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = False
        has_room = len(self.keepalived_conns) < self.max_keepalived
        if not (self.alive and self.cfg.keepalive and has_room):
            response.force_close()

    def _tell_hook(self, req: Any, environ: dict[str, Any], response: Any) -> None:
        try:
            self.cfg.post_request(self, req, environ, response)
        except Exception:
            self.log.exception("Exception in post_request hook")


def _start_all(pool: ThreadPoolExecutor, count: int) -> int:
    """Starts the threads of a new pool of that size; how many could be started."""
    is_over = threading.Event()
    try:
        for started in range(count):
            try:
                pool.submit(is_over.wait)  # no thread is idle meanwhile, so each starts another
            except RuntimeError:
                return started
        return count
    finally:
        is_over.set()


def _refusal(status: str, message: str) -> bytes:
    """A whole response that is a JSON-RPC error without an id."""
    body = jsonrpc.encode_error(_INVALID_REQUEST, message, None)
    head = (
        f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def _send(body: Iterable[bytes], response: Any, environ: dict[str, Any]) -> None:
    if isinstance(body, environ["wsgi.file_wrapper"]):
        response.write_file(body)
    else:
        for piece in body:
            response.write(piece)
    response.close()


def _becomes_readable(sock: Any) -> bool:
    """Whether a socket becomes readable within `STAY` seconds."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(STAY * 1000))
