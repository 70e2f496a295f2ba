"""What surrounds every request: checks before, errors and the log line after.

This is where a transport meets WSGI: environ in, `start_response` and a body out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.guard import Guard
from mcp_proxy.edge.logs import current_request, log_access
from mcp_proxy.edge.reply import Body, Reply, empty_reply, json_reply
from mcp_proxy.edge.request import ClientRequest, RequestIds
from mcp_proxy.errors import Draining, Overloaded, ProxyError
from mcp_proxy.wire import jsonrpc

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

Handler = Callable[[ClientRequest], Reply]


class Edge:
    """One for a worker's application, shared by its transports. Thread-safe."""

    def __init__(self, settings: ProxyConfig) -> None:
        self.slots = StreamSlots(settings.stream_limit)
        self.is_draining = False
        self._ids = RequestIds()
        self._guard = Guard(settings.allowed_origins, settings.allowed_hosts)

    def require_open(self) -> None:
        """Raises Draining when this replica takes no new work; answers to running work are none."""
        if self.is_draining:
            raise Draining

    def serve(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        handle: Handler,
        is_own: bool = False,
    ) -> Iterable[bytes]:
        """Answers one request by what `handle` returns or raises, if it may come in at all.

        Our own endpoints (`is_own`) are open to probes under any Host.
        """
        request = ClientRequest(environ, self._ids)
        token = current_request.set(request.id)
        try:
            reply = self._answer(request, handle, is_own)
            headers = [*reply.headers, ("X-Request-ID", request.id)]
            if "HTTP_ORIGIN" in environ:
                headers += self._guard.cors_headers(environ)
            start_response(reply.status_line, headers)
            return self._finish(request, reply)
        finally:
            current_request.reset(token)

    def _answer(self, request: ClientRequest, handle: Handler, is_own: bool) -> Reply:
        try:
            if is_own:
                return handle(request)
            self._guard.check(request.environ)
            if request.method == "OPTIONS" and "HTTP_ORIGIN" in request.environ:
                return empty_reply(204, self._guard.preflight_headers())
            return handle(request)
        except ProxyError as error:
            log.debug("%s: %s", type(error).__name__, error)
            return render(error)
        except Exception:
            log.exception("a request failed in a way that was not foreseen")
            return render(ProxyError())

    def _finish(self, request: ClientRequest, reply: Reply) -> Iterable[bytes]:
        if isinstance(reply.body, bytes):
            log_access(request, reply.status)
            return [reply.body]
        return _LoggedBody(request, reply.status, reply.body)


class _LoggedBody:
    """A stream whose log lines carry the request's id, and whose end is logged."""

    def __init__(self, request: ClientRequest, status: int, body: Body) -> None:
        self._request = request
        self._status = status
        self._body = body
        self._is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        current_request.set(self._request.id)
        return iter(self._body)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._body.close()
        finally:
            log_access(self._request, self._status)
            current_request.set("")


# --- errors: The one place where errors become HTTP.


def render(error: ProxyError) -> Reply:
    """The answer to an error that was met before the response began: its status, and JSON-RPC."""
    return json_reply(as_message(error), error.status, error.headers)


def as_message(error: ProxyError) -> bytes:
    """The JSON-RPC error that says what `error` says."""
    return jsonrpc.encode_error(error.code, error.message, error.request_id)


# --- slots: The cap on standing streams: each holds a thread, and calls must always find one.


class StreamSlots:
    """`limit` places; thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()  # guards _taken
        self._taken = 0

    def __repr__(self) -> str:
        return f"<StreamSlots {self._taken}/{self.limit}>"

    def take(self) -> None:
        """Takes a place; raises Overloaded when there is none."""
        with self._lock:
            if self._taken >= self.limit:
                raise Overloaded(f"All {self.limit} standing streams of this worker are taken")
            self._taken += 1

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Takes a place, which stays taken unless the block raises; raises Overloaded."""
        self.take()
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives a place back; once for each that was taken."""
        with self._lock:
            self._taken -= 1
