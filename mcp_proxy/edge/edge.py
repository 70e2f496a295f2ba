"""The WSGI side of every transport: checks before a request, errors and the log line after it."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from mcp_proxy.background import Workers
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.disconnects import STREAM_LOOK, DisconnectWatcher
from mcp_proxy.edge.guard import Guard
from mcp_proxy.edge.logs import current_request, log_access
from mcp_proxy.edge.reply import STATUS_LINES, Body, Reply, empty_reply, event_reply, json_reply
from mcp_proxy.edge.request import ClientRequest, RequestIds, require_path
from mcp_proxy.errors import Draining, Overloaded, ProxyError, SessionNotFound
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.headers import FAILURE
from mcp_proxy.wire.jsonrpc import Batch, Message, Request

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

Handler = Callable[[ClientRequest], Reply]

_ASKS = 10  # a second

# Our worker classes for gunicorn, by their modules: with threads, with greenlets.
_OUR_WORKERS = {
    "mcp_proxy.server.worker": "KeepaliveWorker",
    "mcp_proxy.server.gevent_worker": "GeventWorker",
}


class Edge:
    """The edge of a worker's application, shared by its transports. Thread-safe.

    `workers` is who misses its thread, which starts with a stream, when that has ended.
    """

    def __init__(self, options: ProxyOptions, workers: Workers | None = None) -> None:
        self.streams = StreamLimit(options.stream_limit)
        #: Watches the clients of standing streams in front of stdio servers.
        self.disconnects = DisconnectWatcher(workers, STREAM_LOOK)
        #: Questions of ours about session ids that are not known.
        self.asks = RateLimit(_ASKS)
        self.is_draining = False
        self._is_server_known = False
        self._failure_status = options.failure_status
        self._ids = RequestIds()
        self._guard = Guard(options.allowed_origins, options.allowed_hosts)

    def require_open(self) -> None:
        """Raises Draining when this replica takes no new work."""
        if self.is_draining:
            raise Draining

    def allows_host(self, environ: WSGIEnvironment) -> bool:
        """Whether a request's Host is one that our MCP endpoints are served under."""
        return self._guard.allows_host(environ)

    def serve(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        handle: Handler,
        is_own: bool = False,
    ) -> Iterable[bytes]:
        """Answers one request with the reply or the error of `handle`, if the guard allows it.

        Our own endpoints (`is_own`) are served under any Host, for health probes.
        """
        if not self._is_server_known:
            self._is_server_known = True
            _warn_of_foreign_worker(environ)
        request = ClientRequest(environ, self._ids)
        token = current_request.set(request.id)
        try:
            reply = self._answer(request, handle, is_own)
            try:
                headers = [*reply.headers, ("X-Request-ID", request.id)]
                if "HTTP_ORIGIN" in environ:
                    headers += self._guard.cors_headers(environ)
                start_response(STATUS_LINES[reply.status], headers)
            except BaseException:  # the server refuses a header: nobody else closes the body
                if not isinstance(reply.body, bytes):
                    reply.body.close()
                raise
            if not isinstance(reply.body, bytes):
                return _LoggedBody(request, reply.status, reply.body)
            if not is_own or reply.status >= 400:  # probes come every second
                log_access(request, reply.status)
            return [] if request.method == "HEAD" else [reply.body]
        finally:
            current_request.reset(token)

    def _answer(self, request: ClientRequest, handle: Handler, is_own: bool) -> Reply:
        try:
            require_path(request.environ)
            if is_own:
                return handle(request)
            self._guard.check(request.environ)
            if request.method == "OPTIONS" and "HTTP_ORIGIN" in request.environ:
                return empty_reply(204, self._guard.preflight_headers())
            return handle(request)
        except ProxyError as error:
            log.debug("%s: %s", type(error).__name__, error)
            return render(error, request, self._failure_status)
        except Exception:
            log.exception("a request failed unexpectedly")
            return render(ProxyError(), request, self._failure_status)


class _LoggedBody:
    """A stream whose log lines carry the request's id, and whose end is logged.

    `is_standing` is for our worker class, which does not take a standing stream for a call.
    """

    def __init__(self, request: ClientRequest, status: int, body: Body) -> None:
        self._request = request
        self._status = status
        self._body = body
        self.is_standing = request.is_standing
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


# --- the server that calls -----------------------------------------------------------------------


def _warn_of_foreign_worker(environ: WSGIEnvironment) -> None:
    """Says which setting gunicorn lacks whose worker class is none of ours.

    Nobody but gunicorn imports those.
    """
    sock = environ.get("gunicorn.socket")
    if sock is None or any(module in sys.modules for module in _OUR_WORKERS):
        return
    threads, greenlets = (".".join(of) for of in _OUR_WORKERS.items())
    ours = greenlets if type(sock).__module__.startswith("gevent") else threads
    log.warning(
        "This is a worker class of gunicorn's own: clients that are slow or silent can hold all of "
        'it. In gunicorn\'s configuration write worker_class = "%s"; for the proxy alone '
        "-c python:mcp_proxy.gunicorn_conf does that",
        ours,
    )


# --- the one place where errors become HTTP -------------------------------------------------------


def render(error: ProxyError, request: ClientRequest, failure_status: str) -> Reply:
    """The response to an error before the response began, by whose fault it is.

    The client's: the error's status. Otherwise the message that the request carried decides: a
    request gets a JSON-RPC error, with the status that `failure_status` says; what wants no answer
    counts as accepted, since clients end the session when a notification fails.
    """
    request.note(error)
    message = request.message
    if not error.kind:
        request_id = message.id if isinstance(message, Request) else error.request_id
        if isinstance(error, SessionNotFound) and error.status == 404:
            request_id = None
        body = jsonrpc.encode_error(error.code, error.message, request_id)
        return json_reply(body, error.status, error.headers)
    extra = [*error.headers, (FAILURE, error.kind)]
    if message is None:
        return json_reply(as_message(error), error.status, extra)
    answers = _answers(error, message)
    if answers is None:
        log.warning("a message was not delivered (%s): %s", error.kind, error)
        return empty_reply(202, extra)
    if failure_status == "http":
        return json_reply(answers, error.status, extra)
    return json_reply(answers, 200, extra) if request.accepts_json else event_reply(answers, extra)


def _answers(error: ProxyError, message: Message | Batch) -> bytes | None:
    """`error` under the id of a request, or of each in a batch; None where nothing is asked."""
    if isinstance(message, Request):
        return jsonrpc.encode_error(error.code, error.message, message.id)
    if not isinstance(message, list):
        return None
    ids = [part.id for part in message if isinstance(part, Request)]
    answers = [jsonrpc.encode_error(error.code, error.message, each) for each in ids]
    return jsonrpc.encode_batch(answers) if answers else None


def as_message(error: ProxyError) -> bytes:
    """`error` as a JSON-RPC error response."""
    return jsonrpc.encode_error(error.code, error.message, error.request_id)


# --- limits -----------------------------------------------------------------------------------


class StreamLimit:
    """The limit of standing streams: each holds a thread, and calls need threads, too.

    Thread-safe.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()  # guards _open
        self._open = 0

    def __repr__(self) -> str:
        return f"<StreamLimit {self._open}/{self.limit}>"

    def acquire(self) -> None:
        """Counts one more stream; raises Overloaded at the limit."""
        with self._lock:
            if self._open >= self.limit:
                raise Overloaded(f"All {self.limit} standing streams of this worker are taken")
            self._open += 1

    def release(self) -> None:
        """Counts one stream less; called once for each `acquire`."""
        with self._lock:
            self._open -= 1


class RateLimit:
    """At most `limit` of something within a second. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()  # guards _times
        self._times: deque[float] = deque([float("-inf")] * limit, maxlen=limit)

    def acquire(self) -> None:
        """Counts one more; raises Overloaded at the limit."""
        now = time.monotonic()
        with self._lock:
            if self._times[0] + 1 > now:
                raise Overloaded("Too many sessions are asked for at once; try again shortly")
            self._times.append(now)
