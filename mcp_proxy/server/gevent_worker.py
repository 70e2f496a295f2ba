"""gunicorn's gevent worker, patient with slow clients for a while and not for ever.

A greenlet is cheap, so each connection has one and nothing waits in a poller. What differs from
`gunicorn.workers.ggevent.GeventWorker`:

- A head has to come within `client_timeout`, a body makes progress within it and 1 KiB a second on
  the whole; what is late is answered 408. Each part of an answer has to be taken within it.
- A connection may be idle for `keepalive`, a new one for `client_timeout`.
- A TLS handshake is done by the connection's own greenlet, within the same time; one that fails is
  a line in the log. HTTP/2 is not offered.
- Beyond `worker_connections` connections are accepted all the same, and as many others closed on
  which no request has arrived for longest (`crowd`). Where no file is left beside those that are
  kept back, accepting pauses for a moment.
- A worker that stops accepts no more at once, and ends the connections on which no request has
  arrived, handshakes included; the others end with their answers.
- Of a body that the application has not read a little is read, as a connection is worth that.
- Several Cookie headers are joined by the semicolon of cookies.
- An answer that the application breaks off on purpose ends its connection without a traceback.
- What is refused before the application sees it is a JSON-RPC error.

It relies on this in gunicorn, 27.0 or later. `run` makes a server of each listener by
`server_class`, if there is one, with a pool of `worker_connections`, and waits for `pool` of what
that returns. gevent's server calls `do_read` to accept, until that gives None. `handle` reads from
`client.recv`, and from nothing else, and closes `client`; between two requests of a connection it
calls `handle_request`, under `timeout_ctx` the parser. That calls `wsgi` with `client` as the
`gunicorn.socket` of the environ. A request whose `force_close` was called ends its connection.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import gevent
from gevent.server import StreamServer
from gunicorn.workers import ggevent

from mcp_proxy.edge.forwarded import join_cookies
from mcp_proxy.errors import ProxyError
from mcp_proxy.server.answers import PIECE, not_read, refusal, refusal_of
from mcp_proxy.server.arriving import SLOWEST_BODY
from mcp_proxy.server.crowd import SURE, SWEEP, Bound
from mcp_proxy.server.deadlines import require_deadlines, set_deadlines
from mcp_proxy.server.forking import release_signals
from mcp_proxy.server.tls import HandshakeFailures, with_tls

# Seconds in which a request may still arrive at a worker that stops.
_LAST_REQUESTS = 2.0

# Seconds for which a connection that was shut down is read.
_CLOSING_TIME = 2.0

# Greenlets that there may be: as many as there are connections, which have another bound.
_GREENLETS = 1_000_000

_NO_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class GeventWorker(ggevent.GeventWorker):  # type: ignore[misc]
    """The worker class behind the setting `gevent`."""

    alive: bool
    wsgi: Any

    #: Seconds within which a client sends its head, and makes progress with the rest.
    client_timeout = 30.0
    #: Not needed here: a request waits for no thread.
    request_timeout = 600.0

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Called by gunicorn before there is a worker; exits where a deadline does not fit."""
        require_deadlines()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_deadlines(self)
        #: The connections on which a request is awaited or arriving.
        self.reading: set[PatientSocket] = set()
        #: Those whose request is being answered.
        self.answering: set[PatientSocket] = set()
        #: Those that were shut down and are read for a moment, the oldest first.
        self.closing: dict[PatientSocket, None] = {}
        #: How many connections there may be; gunicorn's pool holds however many there are.
        self.bound = Bound(self.cfg.worker_connections, self.log)
        self.worker_connections = _GREENLETS
        self._count = 0
        self._servers: list[StreamServer] = []
        # The greenlets that do a TLS handshake.
        self._shaking_hands: set[Any] = set()
        self._handshake_failures = HandshakeFailures(self.log)
        if "h2" in self.cfg.http_protocols:
            self.log.warning("This worker class does not offer HTTP/2 over TLS")
            self.cfg.set("http_protocols", "h1")

    def init_signals(self) -> None:
        """As gunicorn's; SIGHUP is the master's, and one that reaches a worker does nothing.

        It is not ignored: children of the worker would inherit that.
        """
        super().init_signals()
        signal.signal(signal.SIGHUP, lambda number, frame: None)
        signal.siginterrupt(signal.SIGHUP, False)
        release_signals()

    def run(self) -> None:
        """Runs until the worker stops."""
        self.wsgi = partial(_called, self.wsgi)
        gevent.spawn(self._watch)
        super().run()

    def _watch(self) -> None:
        """Makes room, and at the end closes what has sent no whole request."""
        while self.alive:
            gevent.sleep(SWEEP)
            self._handshake_failures.report()
            self._make_room()
        for client in self.answering:
            client.request.force_close()
        gevent.sleep(_LAST_REQUESTS)
        gevent.killall(list(self._shaking_hands), block=False)
        for client in list(self.reading):
            client.end()

    def handle_exit(self, sig: Any, frame: Any) -> None:
        """Stops the worker, which accepts no more at once: gunicorn's loop looks each second."""
        super().handle_exit(sig, frame)
        for server in self._servers:
            gevent.spawn(server.close)

    def _make_room(self) -> None:
        """Closes connections that are too many: of those without progress for a second the oldest.

        Those on which a request has begun to arrive, or none ever came, go before kept ones.
        """
        lacks_files = self.bound.lacks_files
        wanted = self.bound.excess(self._count - len(self.closing))
        if lacks_files:
            for client in list(self.closing)[:wanted]:
                client.cut()
        before = time.monotonic() - SURE
        silent = [client for client in self.reading if client.is_silent_since(before)]
        silent.sort(key=lambda client: (client.is_kept, client.progress))
        for client in silent[: max(0, wanted)]:
            client.end()
        if lacks_files:
            for server in self._servers:
                if server.started:
                    server.start_accepting()

    def server_class(self, listener: Any, spawn: Any, **_: Any) -> Any:
        """A server whose connections are handled here, those with TLS as well."""
        name = listener.getsockname()  # for which gunicorn asks when it may be closed already
        named = SimpleNamespace(getsockname=lambda: name)
        server = _Server(listener, handle=partial(self.handle, named), spawn=spawn)
        server.bound = self.bound
        self._servers.append(server)
        if self.cfg.workers > 1:
            server.max_accept = 1
        return server

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serves one connection to its end."""
        self._count += 1
        try:
            self._handle(listener, client, addr)
        finally:
            self._count -= 1

    def _handle(self, listener: Any, client: Any, addr: Any) -> None:
        client.settimeout(self.client_timeout)
        if self.cfg.is_ssl:
            client = self._with_tls(client, addr)
            if client is None:
                return
        # gevent's own class would make the socket wait for ever.
        super(ggevent.GeventWorker, self).handle(listener, PatientSocket(self, client), addr)

    def _with_tls(self, client: Any, addr: Any) -> Any:
        """The connection once its client has agreed on TLS; None where that has failed."""
        tls, greenlet = client, gevent.getcurrent()
        self._shaking_hands.add(greenlet)
        try:
            with gevent.Timeout(self.client_timeout, TimeoutError("it did not end in time")):
                tls = with_tls(client, self.cfg)
                tls.do_handshake()
                return tls
        except gevent.GreenletExit:  # the worker stops
            tls.close()
        except Exception as error:  # gunicorn's hook may raise anything
            self._handshake_failures.add(addr, error)
            tls.close()
        finally:
            self._shaking_hands.discard(greenlet)
        return None

    def timeout_ctx(self) -> Any:
        """Nothing: the socket knows how long it may take."""
        return contextlib.nullcontext()

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """Answers one request."""
        sock.begin_body(req)
        self.answering.add(sock)
        try:
            super().handle_request(listener_name, req, sock, addr)
            if not _is_skipped(req.body):
                raise StopIteration
        except TimeoutError:
            if not sock.has_sent:
                sock.sendall(refusal("408 Request Timeout", "The body did not arrive in time"))
            raise StopIteration from None
        finally:
            self.answering.discard(sock)
            if sock.is_late:
                line = not_read(req, addr, sock.taken, self.client_timeout)
                self.log.warning("%s", line)
        sock.begin()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answers a request that gunicorn refuses, or that has failed, with a JSON-RPC error."""
        written = refusal_of(partial(super().handle_error, req), addr, exc)
        with contextlib.suppress(OSError):
            client.sendall(written)


def _called(app: Any, environ: dict[str, Any], start_response: Any) -> Any:
    """What the application returns, to which Cookie headers come as they are meant."""
    join_cookies(environ["gunicorn.socket"].request.headers, environ)
    body = app(environ, start_response)
    return body if isinstance(body, environ["wsgi.file_wrapper"]) else _Body(body)


class _Body:
    """What the application returns; one that breaks off says why itself, and gunicorn nothing."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        has_begun = False
        try:
            for piece in self._body:
                yield piece
                has_begun = True
        except ProxyError as error:
            if not has_begun:
                raise
            raise BrokenPipeError(errno.EPIPE, "The answer is broken off") from error

    def close(self) -> None:
        """Ends it where it has an end."""
        if hasattr(self._body, "close"):
            self._body.close()


def _is_skipped(body: Any) -> bool:
    """Reads what the application has left of a body, if that is little; whether none is left.

    gunicorn reads all of it in pieces of 1 KiB, for each of which it copies up to a MiB of what has
    come already: seconds, in which nobody else is served.
    """
    return body.failed or len(body.read(PIECE)) < PIECE


class _Server(StreamServer):  # type: ignore[misc]
    """gevent's server, which stops accepting before there is no file left."""

    bound: Bound

    def do_read(self) -> Any:
        """A connection with its address; None where there is none, or no file for it."""
        if not self.bound.lacks_files:
            try:
                accepted = super().do_read()
            except OSError as error:
                if error.errno not in _NO_FILE:
                    raise
                self.bound.note_no_file()
            else:
                if accepted:
                    self.bound.has_files_after(accepted[0].fileno())
                return accepted
        self.stop_accepting()  # until the worker has made room
        return None


class PatientSocket:
    """A client's socket: what has to come on it has a deadline, and what is sent has, too."""

    def __init__(self, worker: GeventWorker, sock: Any) -> None:
        self._worker = worker
        self._sock = sock
        self._is_new = True
        self._is_ended = False
        #: Whether some of the answer was sent.
        self.has_sent = False
        #: Bytes of it that the system has taken, and whether it did not take the next in time.
        self.taken = 0
        self.is_late = False
        self.begin()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def begin(self) -> None:
        """The next request may come."""
        #: What is being answered, once its head has come.
        self.request: Any = None
        self._since: float | None = None  # when its head, or its body, began
        self._got = 0
        #: When something came last, or the wait for it began.
        self.progress = time.monotonic()

    @property
    def is_kept(self) -> bool:
        """Whether a request was answered, and the next one has not begun to arrive."""
        return not self._is_new and self._since is None

    def is_silent_since(self, before: float) -> bool:
        """Whether nothing has come since before that time of a request that has not arrived."""
        return self.request is None and not self._is_ended and self.progress < before

    def begin_body(self, request: Any) -> None:
        """The head has come; what comes next is the body."""
        self.request = request
        self._since = time.monotonic()
        self._is_new = self.has_sent = self.is_late = False
        self.taken = 0

    def recv(self, size: int) -> bytes:
        """What comes next; nothing where the client has left, or has been given up.

        Raises TimeoutError where a body is late.
        """
        if self._is_ended:
            return b""
        self._sock.settimeout(max(0.001, self._time_left()))
        self._worker.reading.add(self)
        try:
            data: bytes = self._sock.recv(size)
        except TimeoutError:
            self._is_ended = True
            if self.request is not None:
                self.request.force_close()  # where the next one begins is unknown
                raise
            self._refuse_late_head()
            return b""
        except OSError:
            if not self._is_ended:
                raise
            data = b""  # `end` has woken this greenlet
        finally:
            self._worker.reading.discard(self)
        if self._is_ended and self.request is None:
            self._refuse_late_head()
            return b""
        self.progress = time.monotonic()
        self._since = self._since or self.progress
        self._got += len(data)
        return data

    def _time_left(self) -> float:
        limit = self._worker.client_timeout
        if self._since is None:
            return limit if self._is_new else float(self._worker.cfg.keepalive)
        left = self._since + limit - time.monotonic()
        if self.request is None:
            return left
        return min(limit, left + self._got / SLOWEST_BODY)

    def _refuse_late_head(self) -> None:
        if self._since is not None:
            with contextlib.suppress(OSError):
                self.sendall(refusal("408 Request Timeout", "The head did not arrive in time"))

    def end(self) -> None:
        """Ends the wait for a request that has not arrived."""
        self._is_ended = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Ends our side, and reads the other for a moment to its end.

        Closed with unread bytes the connection would be reset, and the client might lose the end of
        its answer (RFC 9112 section 9.6).
        """
        until = time.monotonic() + _CLOSING_TIME
        self._worker.closing[self] = None
        with contextlib.suppress(OSError, ValueError):
            self._sock.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0 and self._worker.alive:
                self._sock.settimeout(left)
                if not self._sock.recv(PIECE):
                    break
        self._worker.closing.pop(self, None)
        self._sock.close()

    def cut(self) -> None:
        """Ends the wait for the client's end of a connection that was shut down."""
        self._worker.closing.pop(self, None)
        self._sock.close()

    def sendall(self, data: bytes) -> None:
        """Sends all of it; raises BrokenPipeError where the client does not take it."""
        self._sock.settimeout(self._worker.client_timeout)
        self.has_sent = True
        view = memoryview(data)
        try:
            for at in range(0, len(data), PIECE):
                self._sock.sendall(view[at : at + PIECE])
                self.taken += len(view[at : at + PIECE])
        except TimeoutError as error:
            self._is_ended = self.is_late = True
            raise BrokenPipeError(errno.EPIPE, "The client has not taken it in time") from error
