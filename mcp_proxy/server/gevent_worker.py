"""gunicorn's gevent worker, patient with slow clients for a while and not for ever.

A greenlet is cheap, so each connection has one and nothing waits in a poller. What differs from
`gunicorn.workers.ggevent.GeventWorker`:

- A head has to come within `client_timeout`, a body makes progress within it and 1 KiB a second on
  the whole; what is late is answered 408. Each part of an answer has to be taken within it.
- A connection may be idle for `keepalive`, a new one for `client_timeout`.
- A TLS handshake is done by the connection's own greenlet, within the same time; one that fails is
  a line in the log. HTTP/2 is not offered.
- A worker that stops ends the connections on which no request has arrived, handshakes included.
- What is refused before the application sees it is a JSON-RPC error.

It relies on this in gunicorn, 27.0 or later. `run` makes a server of each listener by
`server_class`, if there is one, and waits for `pool` of what that returns. `handle` reads from
`client.recv`, and from nothing else, and closes `client`; between two requests of a connection it
calls `handle_request`, under `timeout_ctx` the parser.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from functools import partial
from typing import Any

import gevent
from gevent.server import StreamServer
from gunicorn.workers import ggevent

from mcp_proxy.server.answers import PIECE, refusal, refusal_of
from mcp_proxy.server.arriving import SLOWEST_BODY
from mcp_proxy.server.deadlines import require_deadlines, set_deadlines
from mcp_proxy.server.tls import HandshakeFailures, with_tls

# Seconds in which a request may still arrive at a worker that stops.
_LAST_REQUESTS = 2.0

# Seconds for which a connection that was shut down is read.
_CLOSING_TIME = 2.0

# Seconds between two looks at whether the worker stops.
_LOOK = 0.5


class GeventWorker(ggevent.GeventWorker):  # type: ignore[misc]
    """The worker class behind the setting `gevent`."""

    alive: bool

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
        # The greenlets that do a TLS handshake.
        self._shaking_hands: set[Any] = set()
        self._handshake_failures = HandshakeFailures(self.log)
        if "h2" in self.cfg.http_protocols:
            self.log.warning("This worker class does not offer HTTP/2 over TLS")
            self.cfg.set("http_protocols", "h1")

    def run(self) -> None:
        """Runs until the worker stops."""
        gevent.spawn(self._watch)
        super().run()

    def _watch(self) -> None:
        """Reports failed handshakes, and at the end closes what has sent no whole request."""
        while self.alive:
            gevent.sleep(_LOOK)
            self._handshake_failures.report()
        gevent.sleep(_LAST_REQUESTS)
        gevent.killall(list(self._shaking_hands), block=False)
        for client in list(self.reading):
            client.end()

    def server_class(self, listener: Any, spawn: Any, **_: Any) -> Any:
        """A server whose connections are handled here, those with TLS as well."""
        server = StreamServer(listener, handle=partial(self.handle, listener), spawn=spawn)
        if self.cfg.workers > 1:
            server.max_accept = 1
        return server

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serves one connection to its end."""
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
        try:
            super().handle_request(listener_name, req, sock, addr)
        except TimeoutError:
            if not sock.has_sent:
                sock.sendall(refusal("408 Request Timeout", "The body did not arrive in time"))
            raise StopIteration from None
        sock.begin()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answers a request that gunicorn refuses, or that has failed, with a JSON-RPC error."""
        written = refusal_of(partial(super().handle_error, req), addr, exc)
        with contextlib.suppress(OSError):
            client.sendall(written)


class PatientSocket:
    """A client's socket: what has to come on it has a deadline, and what is sent has, too."""

    def __init__(self, worker: GeventWorker, sock: Any) -> None:
        self._worker = worker
        self._sock = sock
        self._is_new = True
        self._is_ended = False
        #: Whether some of the answer was sent.
        self.has_sent = False
        self.begin()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def begin(self) -> None:
        """The next request may come."""
        self._request: Any = None
        self._since: float | None = None  # when its head, or its body, began
        self._got = 0

    def begin_body(self, request: Any) -> None:
        """The head has come; what comes next is the body."""
        self._request = request
        self._since = time.monotonic()
        self._is_new = self.has_sent = False

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
            if self._request is not None:
                self._request.force_close()  # where the next one begins is unknown
                raise
            self._refuse_late_head()
            return b""
        finally:
            self._worker.reading.discard(self)
        self._since = self._since or time.monotonic()
        self._got += len(data)
        return data

    def _time_left(self) -> float:
        limit = self._worker.client_timeout
        if self._since is None:
            return limit if self._is_new else float(self._worker.cfg.keepalive)
        left = self._since + limit - time.monotonic()
        if self._request is None:
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
        with contextlib.suppress(OSError, ValueError):
            self._sock.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0 and self._worker.alive:
                self._sock.settimeout(left)
                if not self._sock.recv(PIECE):
                    break
        self._sock.close()

    def sendall(self, data: bytes) -> None:
        """Sends all of it; raises BrokenPipeError where the client does not take it."""
        self._sock.settimeout(self._worker.client_timeout)
        self.has_sent = True
        view = memoryview(data)
        try:
            for at in range(0, len(data), PIECE):
                self._sock.sendall(view[at : at + PIECE])
        except TimeoutError as error:
            self._is_ended = True
            raise BrokenPipeError(errno.EPIPE, "The client has not taken it in time") from error
