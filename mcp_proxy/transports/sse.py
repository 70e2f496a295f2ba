"""HTTP+SSE, the wire of MCP 2024-11-05, in front of a stdio server.

A GET of `/sse` opens a session: its stream begins with the URI for the client's messages, and
everything the server says leaves on it, answers and failures included. A POST to that URI is
acknowledged with 202 and no more. The stream is the session: when it ends, so do the server and the
record; who holds the stream asks no store for it.

A POST may reach another replica than the one with the stream and the server; then it is relayed. A
request that cannot be, through no fault of the client, is 503: there is no way to the stream.
References are to "HTTP with SSE" in the transports page of 2024-11-05.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import parse_qs

from mcp_proxy import metrics
from mcp_proxy.backends.exchange import Backend, Exchange, ServerMessage
from mcp_proxy.backends.owned import OwnedBackend
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.edge import Edge, as_message
from mcp_proxy.edge.forwarded import mount_of
from mcp_proxy.edge.guard import require_own_site
from mcp_proxy.edge.operations import Operations, kind_of
from mcp_proxy.edge.reply import Reply, empty_reply, stream_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    BackendLost,
    BackendUnavailable,
    BackendUnreached,
    EncodedBody,
    InvalidRequest,
    MethodNotAllowed,
    NotAcceptable,
    NoThread,
    ProxyError,
    RateLimited,
    SessionEnded,
    StorageUnavailable,
    UnsupportedMediaType,
)
from mcp_proxy.ownership.backoff import Backoff
from mcp_proxy.ownership.owner import Owner
from mcp_proxy.storage.session import BACKEND_URL, ENV_DIGEST, Session, new_session
from mcp_proxy.traces import Tracing
from mcp_proxy.transports.event_stream import EventStream
from mcp_proxy.transports.stdio import StdioTransport, pass_by_id, pass_new, pass_to_owner
from mcp_proxy.wire import headers, jsonrpc, sse
from mcp_proxy.wire.jsonrpc import Message, Notification, Request
from mcp_proxy.wire.outcomes import CLIENT_LEFT
from mcp_proxy.wire.urls import WORKER_SCHEME

KIND = "sse"

#: Where the stream is, and where messages go, below the mount.
STREAM_PATH = "/sse"
MESSAGES_PATH = "/messages"

# Seconds between two attempts to reach the replica that holds a stream.
_PAUSE = 0.1

# Both spellings are in use.
_ID_PARAMETERS = ("session_id", "sessionId")


class _Stream(NamedTuple):
    """What a session's stream leads to, and whose it is."""

    bridge: OwnedBackend
    principal: str | None
    env_digest: str | None


class SSEProxy(StdioTransport):
    """A WSGI application that serves a stdio server over HTTP+SSE."""

    endpoint = STREAM_PATH

    def _set_up(self, owner: Owner, edge: Edge, options: ProxyOptions) -> None:
        super()._set_up(owner, edge, options)
        # By their id, the sessions whose stream is here. Each operation is atomic.
        self._streams: dict[str, _Stream] = {}

    def __repr__(self) -> str:
        return f"<SSEProxy streams={len(self._streams)} {self.owner!r} {self.manager!r}>"

    def handle(self, request: ClientRequest) -> Reply:
        path = request.path.rstrip("/")
        if "HTTP_SEC_FETCH_SITE" in request.environ:
            require_own_site(request.environ)
        if path == MESSAGES_PATH:
            if request.method != "POST":
                raise MethodNotAllowed("POST")
            return self.for_caller(request, self._post)
        if path == STREAM_PATH:
            # A client of a later revision that tries a POST first is told at once: it comes back
            # with a GET (MCP 2025-11-25, transports, "Backwards Compatibility").
            if request.method != "GET":
                raise MethodNotAllowed("GET")
            return self.for_caller(request, self._get)
        raise self.not_found(request)

    def refuse(self, request: ClientRequest) -> Reply:
        """On the session's stream, if that is here: nobody reads the answer to a POST."""
        if request.method != "POST":
            raise NoThread
        message = jsonrpc.parse_message(request.read_body(self.options.max_body_bytes))
        failure = NoThread()
        if not isinstance(message, Request):
            request.message = message
            raise failure
        failure.request_id = message.id
        reply = self._say(request, failure)
        if reply is None:
            raise failure
        return reply

    def _say(self, request: ClientRequest, failure: ProxyError) -> Reply | None:
        """What acknowledges a request whose failure leaves on the session's stream; None where that
        is not here.
        """
        bridge = self._bridge_of(request, _session_id(request))
        if bridge is None or not bridge.say(as_message(failure)):
            return None
        request.note(failure)
        return empty_reply(202, [*failure.headers, (headers.FAILURE, failure.kind)])

    # --- GET -------------------------------------------------------------------------------------

    def _get(self, request: ClientRequest) -> Reply:
        _require_acceptable(request)
        self.edge.require_open()
        self.require_values(request)
        pass_new(request, is_stream=True)
        self.edge.streams.acquire()
        exchange = Exchange()
        exchange.on_close = self.edge.streams.release
        try:
            session = self._begin(exchange, request)
            request.session, request.is_standing = session.id, True
            body = EventStream(
                exchange,
                request.standing_connection(),
                self.options.keepalive_interval,
                first=self._endpoint(request, session),
                on_failure=request.note,
                watcher=self.edge.disconnects,
            )
            return stream_reply(body)
        except BaseException as error:
            exchange.close()
            if isinstance(error, ProxyError):
                _as_unavailable(error)
            raise

    def _begin(self, exchange: Exchange, request: ClientRequest) -> Session:
        """A new session, whose child speaks on `exchange`; it ends when that is closed."""
        binding = self.binding(request)
        bridge = self.owner.start(request.has_left)
        try:
            answers = _Answers(self.owner.backoff, self.server_name)
            exchange.on_response = answers
            if answers.wants_requests:
                exchange.on_submit = answers.begin
            bridge.listen(exchange)
        except BaseException:
            self.owner.discard(bridge)
            raise
        session = new_session(self.manager.mint_id(), KIND, **binding)
        session = self.owner.establish(session, bridge)
        exchange.on_close = lambda: self._end(session, answers)
        stream = _Stream(bridge, self.bound_to(request), session.metadata.get(ENV_DIGEST))
        self._streams[session.id] = stream
        return session

    def _endpoint(self, request: ClientRequest, session: Session) -> bytes:
        """The first event: the URI for messages, as the client sees this application."""
        mount = mount_of(request.environ, self.options.trusted_proxies)
        uri = f"{mount}{MESSAGES_PATH}?{_ID_PARAMETERS[0]}={session.id}"
        return sse.encode(sse.Event(event=b"endpoint", data=uri.encode()))

    def _end(self, session: Session, answers: _Answers) -> None:
        self._streams.pop(session.id, None)
        answers.close()
        try:
            self.owner.end_left(session)
        finally:
            self.edge.streams.release()

    # --- POST ------------------------------------------------------------------------------------

    def _post(self, request: ClientRequest) -> Reply:
        if request.content_type is not None and not headers.is_json(request.content_type):
            raise UnsupportedMediaType
        if request.is_encoded:
            raise EncodedBody
        message = jsonrpc.parse_message(request.read_body(self.options.max_body_bytes))
        if not isinstance(message, Request):
            request.message = message  # a request's answer leaves on the session's stream instead
        elif Tracing.tracer is not None:
            message = Tracing.tracer.in_context(message, request.environ)
        try:
            self._deliver(request, message)
        except ProxyError as error:
            if isinstance(message, Request):
                error.request_id = message.id
                reply = self._say(request, error) if isinstance(error, RateLimited) else None
                if reply is not None:
                    return reply
                _as_unavailable(error)
            raise
        return empty_reply(202)

    def _deliver(self, request: ClientRequest, message: Message) -> None:
        request.rpc = getattr(message, "method", "response")
        request.session = session_id = _session_id(request)

        def act(backend: Backend) -> None:
            if isinstance(message, Request):
                backend.submit(message, self.options.request_timeout, request.has_left)
            elif isinstance(message, Notification):
                backend.notify(message, request.has_left)
            else:
                backend.respond(message, request.has_left)

        if isinstance(message, Request):
            request.params = message.params
        request.is_answered_elsewhere = isinstance(message, Request)
        bridge = self._bridge_of(request, session_id)
        if bridge is None:
            self._deliver_elsewhere(request, session_id, act, message)
            return
        if self.rate_limit is not None:
            self.rate_limit.count(self.server_name, request, message)
        request.pass_to(self.owner.replica.id, session_id)
        request.backend = bridge.location
        try:
            act(bridge)
        except BackendUnreached as error:
            raise SessionEnded from error  # the stream ends with the server

    def _bridge_of(self, request: ClientRequest, session_id: str) -> OwnedBackend | None:
        """The server of a session whose stream is here; None where it is not, or is not the
        caller's.
        """
        stream = self._streams.get(session_id)
        if stream is None or stream.principal != self.bound_to(request):
            return None
        is_bound = self.owner.caller_env is not None and stream.principal is None
        if is_bound and self.binding(request).get(ENV_DIGEST) != stream.env_digest:
            return None
        return stream.bridge

    def _deliver_elsewhere(
        self,
        request: ClientRequest,
        session_id: str,
        act: Callable[[Backend], None],
        message: Message,
    ) -> None:
        """Delivers a message to the replica that holds the stream.

        A request is tried for `connect_timeout` while the store or that replica is out of reach.
        """
        is_request, limit = isinstance(message, Request), self.rate_limit
        until = time.monotonic() + (self.options.connect_timeout if is_request else 0)
        while True:
            try:
                session = self._session(request, session_id)
                pass_to_owner(self.owner, request, session)
                request.is_relayed = self.owner.relay is not None
                if limit is not None:  # a worker that is given the request counts it itself
                    limit.count(self.server_name, request, message)
                    limit = None
                self.owner.on_backend(session, act, request.has_left)
                return
            except SessionEnded:
                pass_by_id(self.owner, request, session_id)
                raise
            except (StorageUnavailable, BackendUnavailable):
                if time.monotonic() >= until or request.has_left():
                    raise
            time.sleep(_PAUSE)

    def _session(self, request: ClientRequest, session_id: str) -> Session:
        """The session of this id; raises what the client is to be told otherwise."""
        session = self.manager.load(session_id)
        self.require_own(request, session)
        url = session.metadata.get(BACKEND_URL)
        if url is None:
            raise SessionEnded  # handed over by a worker that stops, and its stream with it
        if session.type != KIND or not url.startswith(WORKER_SCHEME):
            raise InvalidRequest("The session belongs to another transport")
        return session


def _session_id(request: ClientRequest) -> str:
    """The session that the URI names; raises InvalidRequest where it names none."""
    text: str = request.environ.get("QUERY_STRING", "")
    query = parse_qs(text)
    for name in _ID_PARAMETERS:
        if name in query:
            return query[name][0]
    raise InvalidRequest("session_id is missing: post to the URI of the endpoint event")


def _as_unavailable(error: ProxyError) -> None:
    """Gives what is not the client's fault the one status that clients of this wire understand."""
    if error.kind and not isinstance(error, RateLimited):
        error.status = 503
        error.headers = error.headers or [("Retry-After", "1")]


class _Answers:
    """Has readiness know whether a server answers, or exits before it has answered anything.

    The answers are counted, and the requests traced, where that is wanted.
    """

    def __init__(self, backoff: Backoff, server: str) -> None:
        counters = metrics.current()
        tracer = Tracing.tracer
        about = {"mcp_proxy.server": server}
        self._operations = (
            None if counters is None else Operations(counters, server, is_shared=True)
        )
        self._spans = None if tracer is None else tracer.spans([], about, ends_when_received=True)
        self._backoff = backoff
        self._is_over = False

    @property
    def wants_requests(self) -> bool:
        """Whether anybody wants to know of what is asked."""
        return self._operations is not None or self._spans is not None

    def begin(self, request: Request) -> Request:
        """A request has come, and goes to the server as it is returned."""
        if self._operations is not None:
            self._operations.begin(request)
        if self._spans is None:
            return request
        self._spans.begin(request)
        (sent,) = self._spans.sent([request], {"network.transport": "pipe"})
        return sent

    def close(self) -> None:
        """The client has left."""
        if self._operations is not None:
            self._operations.close(CLIENT_LEFT)
        if self._spans is not None:
            self._spans.close(CLIENT_LEFT)

    def __call__(self, message: ServerMessage) -> None:
        if self._operations is not None:
            self._operations.answered(message.data, message.failure)
        if self._spans is not None:
            self._spans.received(message.data, kind_of(message.failure))
        if self._is_over:
            return
        self._is_over = True
        if isinstance(message.failure, BackendLost):
            self._backoff.note_failure(message.failure)
        elif message.failure is None:
            self._backoff.note_success()


def _require_acceptable(request: ClientRequest) -> None:
    """Refuses a client whose Accept excludes event streams. Without Accept it is served."""
    taken = request.accepts_stream or request.accepts("*/*")
    if request.header("Accept") is not None and not taken:
        raise NotAcceptable("Accept must name text/event-stream")
