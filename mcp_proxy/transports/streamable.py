"""Streamable HTTP in front of a stdio server: MCP 2025-03-26, 2025-06-18 and 2025-11-25.

One endpoint. POST carries a message to the server and its answer back, as JSON if the answer is the
first thing the server says, as an event stream otherwise; GET opens the session's standing stream;
DELETE ends the session. References are to "Streamable HTTP" in the transports page of the revision.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import msgspec

from mcp_proxy.backends.base import Backend, Delivery, Exchange
from mcp_proxy.edge.disconnects import ClientConnection
from mcp_proxy.edge.reply import Reply, empty_reply, json_reply, stream_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    InvalidRequest,
    MethodNotAllowed,
    MissingSession,
    NotAcceptable,
    NotFound,
    ProxyError,
    UnsupportedMediaType,
)
from mcp_proxy.resumption.replay import ResumedStream
from mcp_proxy.resumption.writing import child_of, is_standing
from mcp_proxy.storage.session import PROTOCOL_VERSION, Session
from mcp_proxy.transports import handshake
from mcp_proxy.transports.event_stream import EventStream
from mcp_proxy.transports.observed import ObservedExchange
from mcp_proxy.transports.opening import Opening
from mcp_proxy.transports.stdio import StdioTransport
from mcp_proxy.wire import headers, jsonrpc, revisions
from mcp_proxy.wire.jsonrpc import Batch, Notification, Request, Response

KIND = "streamable"

_PATHS = frozenset({"", "/", "/mcp", "/mcp/"})
_METHODS = "GET, POST, DELETE"


class StreamableProxy(StdioTransport):
    """A WSGI application that serves a stdio server over streamable HTTP."""

    def __repr__(self) -> str:
        return f"<StreamableProxy {self.sessions!r} {self.manager!r}>"

    def handle(self, request: ClientRequest) -> Reply:
        if request.path not in _PATHS:
            raise NotFound
        if request.method == "POST":
            return self._post(request)
        if request.method == "GET":
            return self._get(request)
        if request.method == "DELETE":
            return self._delete(request)
        raise MethodNotAllowed(_METHODS)

    # --- POST ------------------------------------------------------------------------------------

    def _post(self, request: ClientRequest) -> Reply:
        _require_negotiable(request)
        message = jsonrpc.parse(request.read_body(self.settings.max_body_bytes))
        if isinstance(message, Request):
            try:
                return self._request(request, message)
            except ProxyError as error:
                error.request_id = message.id
                raise
        session = self._session(request)
        if isinstance(message, list):
            return self._batch(request, session, message)
        request.rpc = message.method if isinstance(message, Notification) else "response"
        self.pass_on(session, message)
        return empty_reply(202)

    def _request(self, request: ClientRequest, message: Request) -> Reply:
        request.rpc = message.method
        self.edge.require_open()
        meta = jsonrpc.meta_of(message)
        if isinstance(meta.protocol_version, str):
            raise _not_spoken(meta.protocol_version)
        if message.method == handshake.INITIALIZE:
            return self._initialize(request, message)
        session = self._session(request)
        exchange: Exchange = self._send(request, session, [message])
        change = _change_of(message)
        if change is not None:
            exchange = self._remembering(exchange, session.id, change)
        return self._answer(request, exchange, message, session)

    def _send(
        self, request: ClientRequest, session: Session, messages: Sequence[Request]
    ) -> Exchange:
        accepts_stream = request.accepts(headers.EVENT_STREAM)
        timeout = self.settings.request_timeout

        def send(backend: Backend) -> Exchange:
            return backend.send(messages, accepts_stream, timeout)

        return self.open_exchange(session, send)

    def _initialize(self, request: ClientRequest, message: Request) -> Reply:
        """Opens a session: one child, asked by the client itself; recorded once it has accepted."""
        bridge = self.sessions.start()
        session_id = self.manager.mint_id()
        opening = Opening(self.sessions, bridge, session_id, KIND, message)
        try:
            inner = bridge.send(
                [message], request.accepts(headers.EVENT_STREAM), self.settings.request_timeout
            )
            exchange = ObservedExchange(inner, opening.on_response, opening.on_close)
            reply = self._answer(request, exchange, message)
        except BaseException:
            opening.on_close()
            raise
        if opening.was_refused:
            return reply
        request.session = session_id
        return reply._replace(headers=[*reply.headers, (headers.SESSION_ID, session_id)])

    def _batch(self, request: ClientRequest, session: Session, batch: Batch) -> Reply:
        """An array, which 2025-03-26 allows: its calls are answered together."""
        if not revisions.allows_batches(session.metadata.get(PROTOCOL_VERSION, "")):
            raise InvalidRequest("Batches are served for sessions at revision 2025-03-26 only")
        calls = [message for message in batch if isinstance(message, Request)]
        if any(call.method == handshake.INITIALIZE for call in calls):
            raise InvalidRequest("initialize must not be part of a batch")
        request.rpc = f"batch of {len(batch)}"
        if calls:
            self.edge.require_open()
        for message in batch:
            if not isinstance(message, Request):
                self.pass_on(session, message)
        if not calls:
            return empty_reply(202)
        return self._answer(request, self._send(request, session, calls), None, session)

    # --- the answer ------------------------------------------------------------------------------

    def _answer(
        self,
        request: ClientRequest,
        exchange: Exchange,
        message: Request | None,
        session: Session | None = None,
    ) -> Reply:
        """JSON if nothing but the answer comes, and soon; an event stream otherwise.

        `message` is None for a batch, whose answer is an array; `session` is None before there is
        one.
        """
        try:
            return self._json_or_stream(request, exchange, message, _primes(session))
        except BaseException:
            exchange.close()
            raise

    def _json_or_stream(
        self, request: ClientRequest, exchange: Exchange, message: Request | None, primes: bool
    ) -> Reply:
        may_stream = request.accepts(headers.EVENT_STREAM)
        may_be_json = request.accepts(headers.JSON)
        # An exchange ends by itself, when its time is over; a client that takes JSON alone waits.
        patience = self.settings.sse_after if may_stream else threading.TIMEOUT_MAX
        until = time.monotonic() + patience
        answers: list[Delivery] = []
        while may_be_json and not exchange.is_over:
            delivery = exchange.receive(until - time.monotonic())
            if delivery is None or not delivery.is_response:
                early = [*answers, delivery] if delivery is not None else answers
                return self._stream(request, exchange, message, early, primes)
            answers.append(delivery)
        if not may_be_json:
            return self._stream(request, exchange, message, [], primes)
        exchange.close()
        return _as_json(answers, message)

    def _stream(
        self,
        request: ClientRequest,
        exchange: Exchange,
        message: Request | None,
        early: Sequence[Delivery],
        primes: bool,
    ) -> Reply:
        exchange.begin()
        body = EventStream(
            exchange,
            ClientConnection(request.environ),
            self.settings.keepalive_interval,
            early=early,
            request_id=None if message is None else message.id,
            primes=primes,
        )
        return stream_reply(body)

    def _remembering(
        self, exchange: Exchange, session_id: str, change: handshake.Change
    ) -> Exchange:
        """The same exchange; once the server has agreed, the change is recorded."""

        def on_response(delivery: Delivery) -> None:
            answer = jsonrpc.parse_message(delivery.data)
            if isinstance(answer, Response) and answer.result is not msgspec.UNSET:
                handshake.remember(self.manager, session_id, change)

        return ObservedExchange(exchange, on_response)

    # --- GET and DELETE --------------------------------------------------------------------------

    def _get(self, request: ClientRequest) -> Reply:
        """The session's standing stream, "Listening for Messages from the Server", or another one
        that broke off, "Resumability and Redelivery".
        """
        if not request.accepts(headers.EVENT_STREAM):
            raise NotAcceptable("Accept must name text/event-stream")
        self.edge.require_open()
        session = self._session(request)
        after = request.header("Last-Event-ID")
        with self.edge.slots.opening():
            exchange = self._resumed(session, after) if after else self._standing(session, None)
        body = EventStream(
            exchange,
            ClientConnection(request.environ),
            self.settings.keepalive_interval,
            primes=_primes(session),
            on_close=self.edge.slots.release,
        )
        return stream_reply(body)

    def _standing(self, session: Session, after: str | None) -> Exchange:
        return self.sessions.on_backend(session, lambda backend: backend.listen(after))

    def _resumed(self, session: Session, after: str) -> Exchange:
        """The stream that an event belongs to, from there on; only events of this session count."""
        event = self.sessions.events.find(session.id, after)
        if event is None:
            raise InvalidRequest("Last-Event-ID names no event that is kept for this session")
        if is_standing(event.stream):
            return self._standing(session, after)
        child = child_of(event.stream)
        return ResumedStream(
            self.sessions.events,
            session.id,
            event,
            lambda: self.sessions.is_orphaned(session.id, child),
            self.settings.request_timeout,
            lambda: self.edge.is_draining,
        )

    def _delete(self, request: ClientRequest) -> Reply:
        self.sessions.end(self._session(request))
        return empty_reply(204)

    def _session(self, request: ClientRequest) -> Session:
        """The session that a request names; raises what the client is to be told otherwise."""
        session_id = request.session_id
        if session_id is None:
            raise MissingSession
        version = request.protocol_version
        if version is not None and not revisions.is_legacy(version):
            raise InvalidRequest(f"MCP-Protocol-Version {version!r} is not supported")
        session = self.manager.load(session_id)
        if session.type != KIND:
            raise InvalidRequest(f"The session belongs to another transport ({session.type})")
        return session


def _primes(session: Session | None) -> bool:
    """Whether the client of a session knows events without data."""
    version = None if session is None else session.metadata.get(PROTOCOL_VERSION)
    return version is not None and revisions.primes_streams(version)


def _require_negotiable(request: ClientRequest) -> None:
    """Raises where the client sent no JSON, or takes neither JSON nor an event stream."""
    content_type = request.content_type
    if content_type is not None and not headers.is_json(content_type):
        raise UnsupportedMediaType
    if not request.accepts(headers.JSON) and not request.accepts(headers.EVENT_STREAM):
        raise NotAcceptable


def _not_spoken(version: str) -> ProxyError:
    """The answer to a modern request: at once, and not one that only modern servers give.

    A client that probes reads anything but -32020 to -32022 as "legacy" and sends initialize
    (MCP 2026-07-28, versioning, "Backward Compatibility").
    """
    spoken = ", ".join(revisions.LEGACY)
    return InvalidRequest(f"Revision {version} is not served here; initialize at one of {spoken}")


def _change_of(message: Request) -> handshake.Change | None:
    try:
        return handshake.change_of(message)
    except msgspec.DecodeError:
        return None  # the server will say what is wrong with it


def _as_json(answers: Sequence[Delivery], message: Request | None) -> Reply:
    """One answer as an object, several as an array; a failure of the backend as its HTTP status."""
    if message is None:
        return json_reply(jsonrpc.encode_batch([answer.data for answer in answers]))
    (answer,) = answers
    if answer.failure is not None:
        raise answer.failure
    return json_reply(answer.data)
