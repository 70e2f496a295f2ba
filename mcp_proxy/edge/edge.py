"""The WSGI side of every transport: checks before a request, errors and the log line after it."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from mcp_proxy import metrics
from mcp_proxy.auth.authenticator import Authenticator
from mcp_proxy.auth.principal import NO_MEMBERS
from mcp_proxy.auth.protected_resource import ProtectedResource
from mcp_proxy.background import Workers
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.disconnects import STREAM_LOOK, DisconnectWatcher
from mcp_proxy.edge.guard import Guard
from mcp_proxy.edge.logs import OnceAMinute, access, current_request, log_access
from mcp_proxy.edge.operations import Operations, kind_of
from mcp_proxy.edge.reply import STATUS_LINES, Body, Reply, empty_reply, event_reply, json_reply
from mcp_proxy.edge.request import ClientRequest, RequestIds, require_path
from mcp_proxy.errors import (
    INTERNAL_ERROR,
    Cancelled,
    ClientLeft,
    Draining,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    Passed,
    ProxyError,
    SessionNotFound,
    Unauthenticated,
)
from mcp_proxy.metrics import CALLS, Counters
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.handshake import INITIALIZE
from mcp_proxy.wire.headers import FAILURE
from mcp_proxy.wire.jsonrpc import Batch, Message, Request
from mcp_proxy.wire.modern import DISCOVER
from mcp_proxy.wire.outcomes import CLIENT_LEFT

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

Handler = Callable[[ClientRequest], Reply]

_ASKS = 10  # a second

# Where an MCP server says what it wants of its callers for OAuth. Those have to do with us alone.
_METADATA = "/.well-known/"

# Our worker classes for gunicorn, by their modules: with threads, with greenlets.
_OUR_WORKERS = {
    "mcp_proxy.server.worker": "KeepaliveWorker",
    "mcp_proxy.server.gevent_worker": "GeventWorker",
}


class Edge:
    """The edge of a worker's application, shared by its transports. Thread-safe.

    `workers` is who misses its thread, which starts with a stream, when that has ended. Without an
    `authenticator` everybody is served.
    """

    def __init__(
        self,
        options: ProxyOptions,
        workers: Workers | None = None,
        authenticator: Authenticator | None = None,
    ) -> None:
        self.streams = StreamLimit(options.stream_limit)
        #: Watches the clients of standing streams in front of stdio servers.
        self.disconnects = DisconnectWatcher(workers, STREAM_LOOK)
        #: Questions of ours about session ids that are not known.
        self.asks = RateLimit(_ASKS)
        #: The paths of all MCP endpoints, below the mount of the application that has them.
        self.endpoints: Callable[[], list[str]] = list
        self.is_draining = False
        #: Who knows the callers; None: they stay unknown.
        self.authenticator = authenticator
        self._refused = OnceAMinute()
        self._is_server_known = False
        self._failure_status = options.failure_status
        self._ids = RequestIds()
        self._guard = Guard(options.allowed_origins, options.allowed_hosts)

    @property
    def withheld(self) -> frozenset[str]:
        """The headers, in title case, by which callers are known here, and which stop here."""
        return frozenset() if self.authenticator is None else self.authenticator.credentials

    def close(self) -> None:
        """Ends the thread of who knows the callers."""
        if self.authenticator is not None:
            self.authenticator.stop()

    def require_open(self) -> None:
        """Raises Draining when this replica takes no new work."""
        if self.is_draining:
            raise Draining

    def allows_host(self, environ: WSGIEnvironment) -> bool:
        """Whether a request's Host is one that our MCP endpoints are served under."""
        return self._guard.allows_host(environ)

    def require_allowed(self, environ: WSGIEnvironment) -> None:
        """Raises Forbidden for a Host or Origin that our MCP endpoints are not served under."""
        self._guard.check(environ)

    def serve(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        handle: Handler,
        is_own: bool = False,
        server: str | None = None,
        scopes: tuple[str, ...] = (),
        members: Mapping[str, tuple[str, ...]] = NO_MEMBERS,
    ) -> Iterable[bytes]:
        """Answers one request with the reply or the error of `handle`, if the guard allows it and
        the caller may use `server`, which is None where the request is for none; an access token
        needs these `scopes` for it. Of a group with `members` one of them is enough.

        Our own endpoints (`is_own`) are served under any Host and to everybody, for health probes.
        """
        if not self._is_server_known:
            self._is_server_known = True
            _warn_of_foreign_worker(environ)
        request = ClientRequest(environ, self._ids, server or "")
        request.is_logged = access.isEnabledFor(logging.INFO)
        token = current_request.set(request.id)
        try:
            try:
                reply = self._answer(request, handle, is_own, server, scopes, members)
            except Passed:
                start_response(STATUS_LINES[202], [])  # nobody gets it
                return []
            try:
                headers = [*reply.headers, ("X-Request-ID", request.id)]
                if "HTTP_ORIGIN" in environ:
                    headers += self._guard.cors_headers(environ)
                start_response(STATUS_LINES[reply.status], headers)
            except BaseException:  # the server refuses a header: nobody else closes the body
                if not isinstance(reply.body, bytes):
                    reply.body.close()
                raise
            counters = metrics.current()
            if counters is not None and (request.rpc or request.message is not None):
                _count(counters, request, reply)
            if request.spans is not None and isinstance(reply.body, bytes):
                failure = kind_of(request.failure)
                request.spans.answered(reply.body, failure, reply.status)
                request.spans.close(failure)
            if not isinstance(reply.body, bytes):
                return _LoggedBody(request, reply.status, reply.body)
            if not is_own or reply.status >= 400:  # probes come every second
                log_access(request, reply.status, reply.body)
            return [] if request.method == "HEAD" else [reply.body]
        finally:
            current_request.reset(token)

    def serve_metadata(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        resource: ProtectedResource,
        endpoint: str,
        scopes: tuple[str, ...] | None,
    ) -> Iterable[bytes]:
        """Answers who asks where to get a token for an endpoint, whoever that is.

        `scopes` are those that its server wants besides; None: there is no such endpoint.
        """

        def handle(request: ClientRequest) -> Reply:
            if request.method == "OPTIONS":  # the guard says what a page may send
                return empty_reply(204, [("Allow", "GET, HEAD, OPTIONS")])
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowed("GET, HEAD")
            if scopes is None:
                raise NotFound
            return json_reply(resource.document(environ, endpoint, scopes))

        return self.serve(environ, start_response, handle, is_own=True)

    def _answer(
        self,
        request: ClientRequest,
        handle: Handler,
        is_own: bool,
        server: str | None,
        scopes: tuple[str, ...],
        members: Mapping[str, tuple[str, ...]],
    ) -> Reply:
        try:
            require_path(request.environ)
            if is_own:
                return handle(request)
            self._guard.check(request.environ)
            if request.method == "OPTIONS" and "HTTP_ORIGIN" in request.environ:
                return empty_reply(204, self._guard.preflight_headers())
            if self.authenticator is not None:
                self._authenticate(self.authenticator, request, server, scopes, members)
            return handle(request)
        except ProxyError as error:
            log.debug("%s: %s", type(error).__name__, error)
            return render(error, request, self._failure_status)
        except Passed:
            raise
        except Exception:
            log.exception("a request failed unexpectedly")
            return render(ProxyError(), request, self._failure_status)

    def _authenticate(
        self,
        authenticator: Authenticator,
        request: ClientRequest,
        server: str | None,
        scopes: tuple[str, ...],
        members: Mapping[str, tuple[str, ...]],
    ) -> None:
        """Has the request know its principal; raises Unauthenticated, NotPermitted.

        A preflight has no credentials and comes before (WHATWG Fetch, section 4.8). What refuses
        strangers reads no body and keeps nothing.
        """
        if request.path.startswith(_METADATA):
            raise NotFound
        try:
            caller = authenticator.caller_of(request.environ, server, scopes, members)
            request.identify(caller)
        except Unauthenticated:
            if self._refused.is_due():
                log.warning(
                    "a caller without a valid key or token was refused (from %s); the access log "
                    "has all of them",
                    request.environ.get("REMOTE_ADDR", "?"),
                )
            raise


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
        request = self._request
        try:
            self._body.close()
        finally:
            if request.operations is not None:
                standing = "" if request.is_standing else CLIENT_LEFT
                request.operations.close(kind_of(request.failure) or standing)
            if request.spans is not None:
                request.spans.close(kind_of(request.failure) or (CLIENT_LEFT * self._is_left))
            log_access(request, self._status, is_left=self._is_left)
            current_request.set("")

    @property
    def _is_left(self) -> bool:
        """Whether the client has left before there was an answer, as far as this can know."""
        is_over = self._request.is_standing or self._request.outcome is not None
        return bool(getattr(self._body, "reports_answers", False)) and not is_over


# --- what is counted -----------------------------------------------------------------------------


def _count(counters: Counters, request: ClientRequest, reply: Reply) -> None:
    """Counts what a request with a message asks for, before the first byte of the answer.

    Of an event stream whose body tells its answers each is counted as it leaves.
    """
    failure = request.failure
    if request.session and (failure is None or request.record is not None):  # else made up, perhaps
        client = jsonrpc.names_in(request.params)[1] if request.rpc == INITIALIZE else ""
        told = "" if failure is None else str(failure)
        counters.recent.note_call(request.session, request.server, client, told)
    if request.is_answered_elsewhere and (failure is None or isinstance(failure, ClientLeft)):
        counters.count(CALLS, request.server, request.way)
        return
    operations = Operations(counters, request.server)
    message = request.message
    if message is None:  # nobody reads the answer to it here
        message = Request(0, request.rpc or "", request.params)
    operations.begin_all(message, request.started, request.way)
    if getattr(reply.body, "reports_answers", False):
        request.operations = operations
        return
    if isinstance(reply.body, bytes):
        operations.answered(reply.body, failure, reply.status)
    operations.close(kind_of(failure) or ("" if reply.status < 400 else str(reply.status)))


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
    counts as accepted, since clients end the session when a notification fails. A server/discover
    gets the error's status, lest its client takes the server for a legacy one for good.
    """
    request.note(error)
    message = request.message
    if isinstance(error, Cancelled) and message is not None:
        body = _answers(error, message) or as_message(error)
        return json_reply(body) if request.accepts_json else event_reply(body)
    if not error.kind:
        request_id = message.id if isinstance(message, Request) else error.request_id
        if isinstance(error, SessionNotFound) and error.status == 404:
            request_id = None
        body = jsonrpc.encode_error(error.code, error.message, request_id, error.data)
        return json_reply(body, error.status, error.headers)
    extra = [*error.headers, (FAILURE, error.kind)]
    if message is None:
        return json_reply(as_message(error), error.status, extra)
    if isinstance(message, Request) and message.method == DISCOVER:
        body = jsonrpc.encode_error(INTERNAL_ERROR, error.message, message.id, error.data)
        return json_reply(body, error.status, extra)
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
        return jsonrpc.encode_error(error.code, error.message, message.id, error.data)
    if not isinstance(message, list):
        return None
    ids = [part.id for part in message if isinstance(part, Request)]
    answers = [jsonrpc.encode_error(error.code, error.message, each, error.data) for each in ids]
    return jsonrpc.encode_batch(answers) if answers else None


def as_message(error: ProxyError) -> bytes:
    """`error` as a JSON-RPC error response."""
    return jsonrpc.encode_error(error.code, error.message, error.request_id, error.data)


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

    @property
    def open(self) -> int:
        """How many there are."""
        return self._open

    @property
    def free(self) -> int:
        """How many more there may be."""
        return self.limit - self._open

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
