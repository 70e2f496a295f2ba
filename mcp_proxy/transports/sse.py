"""HTTP+SSE, the wire of MCP 2024-11-05, in front of a stdio server.

A GET of `/sse` opens a session: its stream begins with the URI for the client's messages, and
everything the server says leaves on it, answers included. A POST to that URI is acknowledged with
202 and no more. The stream is the session: when it ends, so do the server and the record.

A POST may reach another replica than the one with the stream and the server; then it is relayed.
References are to "HTTP with SSE" in the transports page of 2024-11-05.
"""

from __future__ import annotations

from urllib.parse import parse_qs

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.edge.disconnects import ClientConnection
from mcp_proxy.edge.forwarded import mount_of
from mcp_proxy.edge.guard import require_own_site
from mcp_proxy.edge.reply import Reply, empty_reply, stream_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    BackendLost,
    InvalidRequest,
    MethodNotAllowed,
    NotAcceptable,
    NotFound,
    ProxyError,
    SessionEnded,
    UnsupportedMediaType,
)
from mcp_proxy.ownership.backoff import Backoff
from mcp_proxy.storage.session import BACKEND_URL, Session, new_session
from mcp_proxy.transports.event_stream import EventStream
from mcp_proxy.transports.stdio import StdioTransport
from mcp_proxy.wire import headers, jsonrpc, sse
from mcp_proxy.wire.jsonrpc import Message, Request
from mcp_proxy.wire.urls import WORKER_SCHEME

KIND = "sse"

#: Where the stream is, and where messages go, below the mount.
STREAM_PATH = "/sse"
MESSAGES_PATH = "/messages"

# Both spellings are in use.
_ID_PARAMETERS = ("session_id", "sessionId")


class SSEProxy(StdioTransport):
    """A WSGI application that serves a stdio server over HTTP+SSE."""

    def __repr__(self) -> str:
        return f"<SSEProxy {self.owner!r} {self.manager!r}>"

    def handle(self, request: ClientRequest) -> Reply:
        path = request.path.rstrip("/")
        if "HTTP_SEC_FETCH_SITE" in request.environ:
            require_own_site(request.environ)
        if path == MESSAGES_PATH:
            if request.method != "POST":
                raise MethodNotAllowed("POST")
            return self._post(request)
        if path == STREAM_PATH:
            # A client of a later revision that tries a POST first is told at once: it comes back
            # with a GET (MCP 2025-11-25, transports, "Backwards Compatibility").
            if request.method != "GET":
                raise MethodNotAllowed("GET")
            return self._get(request)
        raise NotFound

    # --- GET -------------------------------------------------------------------------------------

    def _get(self, request: ClientRequest) -> Reply:
        _require_acceptable(request)
        self.edge.require_open()
        self.edge.streams.acquire()
        exchange = Exchange()
        exchange.on_close = self.edge.streams.release
        try:
            session = self._begin(exchange)
            request.session = session.id
            body = EventStream(
                exchange,
                ClientConnection(request.environ),
                self.options.keepalive_interval,
                first=self._endpoint(request, session),
                on_failure=request.note,
            )
            return stream_reply(body)
        except BaseException:
            exchange.close()
            raise

    def _begin(self, exchange: Exchange) -> Session:
        """A new session, whose child speaks on `exchange`; it ends when that is closed."""
        bridge = self.owner.start()
        try:
            exchange.on_response = _FirstAnswer(self.owner.backoff)
            bridge.listen(exchange)
        except BaseException:
            self.owner.discard(bridge)
            raise
        session = self.owner.establish(new_session(self.manager.mint_id(), KIND), bridge)
        exchange.on_close = lambda: self._end(session)
        return session

    def _endpoint(self, request: ClientRequest, session: Session) -> bytes:
        """The first event: the URI for messages, as the client sees this application."""
        mount = mount_of(request.environ, self.options.trusted_proxies)
        uri = f"{mount}{MESSAGES_PATH}?{_ID_PARAMETERS[0]}={session.id}"
        return sse.encode(sse.Event(event=b"endpoint", data=uri.encode()))

    def _end(self, session: Session) -> None:
        try:
            self.owner.end_left(session)
        finally:
            self.edge.streams.release()

    # --- POST ------------------------------------------------------------------------------------

    def _post(self, request: ClientRequest) -> Reply:
        if request.content_type is not None and not headers.is_json(request.content_type):
            raise UnsupportedMediaType
        message = jsonrpc.parse_message(request.read_body(self.options.max_body_bytes))
        if not isinstance(message, Request):
            request.message = message  # a request's answer leaves on the session's stream instead
        try:
            self._pass_on(request, message)
        except ProxyError as error:
            error.request_id = message.id if isinstance(message, Request) else None
            raise
        return empty_reply(202)

    def _pass_on(self, request: ClientRequest, message: Message) -> None:
        request.rpc = getattr(message, "method", "response")
        session = self._session(request)
        if not isinstance(message, Request):
            self.tell(session, message)
            return
        timeout = self.options.request_timeout
        request.params = message.params
        self.owner.on_backend(session, lambda backend: backend.submit(message, timeout))

    def _session(self, request: ClientRequest) -> Session:
        """The session that the URI names; raises what the client is to be told otherwise."""
        query = parse_qs(request.environ.get("QUERY_STRING", ""))
        for name in _ID_PARAMETERS:
            if name in query:
                request.session = query[name][0]
                break
        else:
            raise InvalidRequest("session_id is missing: post to the URI of the endpoint event")
        session = self.manager.load(request.session)
        url = session.metadata.get(BACKEND_URL)
        if url is None:
            raise SessionEnded  # handed over by a worker that stops, and its stream with it
        if session.type != KIND or not url.startswith(WORKER_SCHEME):
            raise InvalidRequest("The session belongs to another transport")
        return session


class _FirstAnswer:
    """Has readiness know whether a server answers, or exits before it has answered anything."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._is_over = False

    def __call__(self, message: ServerMessage) -> None:
        if self._is_over:
            return
        self._is_over = True
        if isinstance(message.failure, BackendLost):
            self._backoff.note_failure(message.failure.message)
        elif message.failure is None:
            self._backoff.note_success()


def _require_acceptable(request: ClientRequest) -> None:
    """Refuses a client whose Accept excludes event streams. Without Accept it is served."""
    taken = request.accepts_stream or request.accepts("*/*")
    if request.header("Accept") is not None and not taken:
        raise NotAcceptable("Accept must name text/event-stream")
