"""Streamable HTTP in front of a stdio server: MCP 2025-03-26, 2025-06-18 and 2025-11-25.

One endpoint. POST carries a message to the server and its answer back, as JSON if the answer is the
first thing the server says, as an event stream otherwise; GET opens the session's standing stream;
DELETE ends the session. References are to "Streamable HTTP" in the transports page of the revision.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from msgspec import UNSET

from mcp_proxy.backends.exchange import Backend, Exchange, ServerMessage
from mcp_proxy.backends.owned import OwnedBackend, caller_headers
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.disconnects import ClientConnection
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.guard import require_own_site
from mcp_proxy.edge.reply import Reply, empty_reply, json_reply, stream_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    Cancelled,
    ClientLeft,
    EncodedBody,
    InvalidRequest,
    MethodNotAllowed,
    MissingSession,
    NotAcceptable,
    RequestId,
    SessionEnded,
    StorageUnavailable,
    StreamWithoutSession,
    UnsupportedMediaType,
)
from mcp_proxy.ownership.owner import Owner
from mcp_proxy.resumption.replay import Replay
from mcp_proxy.resumption.writing import child_of, is_standing
from mcp_proxy.sessions import handshake
from mcp_proxy.storage.session import MOVED, PROTOCOL_VERSION, Session
from mcp_proxy.traces import Tracing
from mcp_proxy.transports.event_stream import EventStream
from mcp_proxy.transports.stateless import StatelessFront, is_modern
from mcp_proxy.transports.stateless_group import StatelessGroup
from mcp_proxy.transports.stdio import StdioTransport, pass_by_id, pass_new, pass_to_owner
from mcp_proxy.wire import headers, jsonrpc, refusals, revisions
from mcp_proxy.wire.handshake import CHANGES, INITIALIZE, Change, change_of
from mcp_proxy.wire.jsonrpc import Batch, Message, Notification, Request, Response

KIND = "streamable"

_PATHS = frozenset({"", "/", "/mcp", "/mcp/"})
_METHODS = "GET, POST, DELETE"


class StreamableProxy(StdioTransport):
    """A WSGI application that serves a stdio server over streamable HTTP."""

    endpoint = ""
    stateless: StatelessFront
    #: What answers modern requests where several servers are served together.
    together: StatelessGroup | None = None

    def __repr__(self) -> str:
        return f"<StreamableProxy {self.owner!r} {self.manager!r}>"

    def is_endpoint(self, path: str) -> bool:
        return path in _PATHS

    def _set_up(self, owner: Owner, edge: Edge, options: ProxyOptions) -> None:
        super()._set_up(owner, edge, options)
        self.stateless = StatelessFront(owner, edge, options)

    def change(self, options: ProxyOptions, is_other: bool) -> None:
        super().change(options, is_other)
        self.stateless.change(options, is_other)
        if self.together is not None:
            self.together.change(options)

    def end_streams(self) -> None:
        super().end_streams()
        if self.together is not None:
            self.together.end_streams()

    def end_unless_busy(self) -> bool:
        has_ended = super().end_unless_busy()
        if has_ended:
            self.stateless.close()
        return has_ended

    def shut_down(self) -> None:
        self.stateless.close()
        super().shut_down()

    def handle(self, request: ClientRequest) -> Reply:
        if request.path not in _PATHS:
            raise self.not_found(request)
        if "HTTP_SEC_FETCH_SITE" in request.environ:
            require_own_site(request.environ)
        try:
            if self.owner.caller_env is None and self.headers_of is None:
                return self.serve(request)
            return self.for_caller(request, self.serve)
        except SessionEnded:
            pass_by_id(self.owner, request, request.session_id, request.method == "GET")
            raise

    def serve(self, request: ClientRequest) -> Reply:
        """The answer to a request for the endpoint; raises ProxyError."""
        if request.method == "POST":
            return self._post(request)
        if request.session_id is None and revisions.is_modern(request.protocol_version or ""):
            raise MethodNotAllowed("POST")
        if request.method == "GET":
            return self._get(request)
        if request.method == "DELETE":
            return self._delete(request)
        raise MethodNotAllowed(_METHODS)

    # --- POST ------------------------------------------------------------------------------------

    def _post(self, request: ClientRequest) -> Reply:
        if request.content_type is not None and not headers.is_json(request.content_type):
            raise UnsupportedMediaType
        if request.is_encoded:
            raise EncodedBody
        if not request.accepts_json and not request.accepts_stream:
            raise NotAcceptable
        message = jsonrpc.parse(request.read_body(self.options.max_body_bytes))
        request.message = message
        if Tracing.tracer is not None:
            request.begin_spans(Tracing.tracer, message)
        if self.rate_limit is not None:
            self.rate_limit.count(self.server_name, request, message)
        return self.answer(request, message)

    def answer(self, request: ClientRequest, message: Message | Batch) -> Reply:
        """The answer to what a POST carries; raises ProxyError."""
        if isinstance(message, Request):
            return self._request(request, message)
        if isinstance(message, Notification) and is_modern(request, message):
            return empty_reply(202)  # a modern client takes back by leaving
        session = self._session(request)
        pass_to_owner(self.owner, request, session)
        if isinstance(message, list):
            return self._batch(request, session, message)
        request.rpc = message.method if isinstance(message, Notification) else "response"
        self.pass_on(request, session, message)
        return empty_reply(202)

    def _request(self, request: ClientRequest, message: Request) -> Reply:
        request.rpc, request.params = message.method, message.params
        self.edge.require_open()
        if is_modern(request, message):
            self.require_values(request)
            front = self.stateless if self.together is None else self.together
            return front.answer(request, message)
        if message.method == INITIALIZE:
            return self._initialize(request, message)
        session = self._session(request)
        pass_to_owner(self.owner, request, session)
        if request.admit(session.id):
            raise Cancelled
        exchange = self._exchange(request, [message])
        if message.method in CHANGES:
            self._remember_changes(exchange, session)
        self.owner.send(session, exchange)
        return self._answer(request, exchange, message.id, session)

    def _remember_changes(self, exchange: Exchange, session: Session) -> None:
        """Has each change that the requests of an exchange make recorded once the server agrees."""
        changes: dict[RequestId, Change] = {}
        for request in exchange.requests:
            change = change_of(request)
            if change is not None:
                changes[request.id] = change

        def remember(message: ServerMessage) -> None:
            answer = jsonrpc.parse_message(message.data)
            if isinstance(answer, Response) and answer.id in changes and answer.result is not UNSET:
                change = changes[answer.id]
                handshake.remember(self.manager, session.id, change, exchange.has_left)

        exchange.on_response = remember

    def _initialize(self, request: ClientRequest, message: Request) -> Reply:
        """Begins a session: one child, asked by the client; recorded once it has accepted."""
        self.require_values(request)
        pass_new(request)
        request.stay()
        binding = self.binding(request)
        bridge = self.owner.start(request.has_left)
        pending = PendingSession(
            self.owner, bridge, self.manager.mint_id(), message, request.has_left, binding
        )
        exchange = self._exchange(request, [message])
        exchange.on_response = pending.on_response
        exchange.on_close = pending.on_close
        try:
            bridge.send(exchange)
            exchange.set_deadline(request.started + self.options.request_timeout)
            reply = self._answer(request, exchange, message.id)
        except BaseException:
            exchange.close()
            raise
        if pending.was_refused:
            return reply
        request.session = pending.session_id
        named = (headers.SESSION_ID, pending.session_id)
        return reply._replace(headers=[*reply.headers, named])

    def _batch(self, request: ClientRequest, session: Session, batch: Batch) -> Reply:
        """An array, which 2025-03-26 allows: its calls are answered together.

        Those that were cancelled while it waited have no answer, unless there are no others.
        """
        if not revisions.allows_batches(session.metadata.get(PROTOCOL_VERSION, "")):
            raise InvalidRequest("Batches are served for sessions at revision 2025-03-26 only")
        calls = [message for message in batch if isinstance(message, Request)]
        if any(call.method == INITIALIZE for call in calls):
            raise InvalidRequest("initialize must not be part of a batch")
        request.rpc = f"batch of {len(batch)}"
        is_waited_for = bool(calls)
        if is_waited_for:
            self.edge.require_open()
            cancelled = request.admit(session.id)
            calls = [call for call in calls if call.id not in cancelled]
        for message in batch:
            if not isinstance(message, Request):
                self.pass_on(request, session, message)
        if not is_waited_for:
            return empty_reply(202)
        if not calls:
            raise Cancelled
        exchange = self._exchange(request, calls)
        self._remember_changes(exchange, session)
        self.owner.send(session, exchange)
        return self._answer(request, exchange, None, session)

    def _exchange(self, request: ClientRequest, requests: Sequence[Request]) -> Exchange:
        exchange = Exchange(
            requests,
            request.accepts_stream,
            self.options.request_timeout,
            headers=caller_headers.get(),
        )
        exchange.has_left, exchange.spans = request.has_left, request.spans
        return exchange

    # --- the answer ------------------------------------------------------------------------------

    def _answer(
        self,
        request: ClientRequest,
        exchange: Exchange,
        request_id: RequestId | None,
        session: Session | None = None,
    ) -> Reply:
        """JSON if nothing but the answer comes, and soon; an event stream otherwise.

        `request_id` is None for a batch, whose answer is an array; `session` is None before there
        is one. The head of the answer to an initialize says whether there is one now: it waits for
        that for `sse_after` seconds, whatever the client takes and the server says before.
        """
        request.is_relayed, request.backend = exchange.is_relayed, exchange.backend
        try:
            is_first = session is None
            waits = request.accepts_json or is_first
            early = self._received_early(request, exchange, is_first) if waits else []
            if exchange.is_over and is_first and early[-1].failure is not None:
                raise early[-1].failure
            if exchange.is_over and request.accepts_json and early[0].is_response:
                exchange.close()
                return _as_json(request, early, is_batch=request_id is None)
            exchange.begin_stream()
            body = EventStream(
                exchange,
                ClientConnection(request.environ),
                self.options.keepalive_interval,
                early=early,
                request_id=request_id,
                primes=_primes(session),
                on_failure=request.note,
                on_response=request.answered,
            )
            return stream_reply(body)
        except BaseException:
            exchange.close()
            raise

    def _received_early(
        self, request: ClientRequest, exchange: Exchange, is_first: bool
    ) -> list[ServerMessage]:
        """What comes before it is known whether the answer has to be a stream.

        That is known when all answers are there, when something else comes before them (but for
        that to an initialize), and when nothing comes for `sse_after` seconds. A client that takes
        JSON alone waits; the exchange ends by itself, when its time is over.
        """
        received: list[ServerMessage] = []
        waits = self.options.sse_after if request.accepts_stream else threading.TIMEOUT_MAX
        until = time.monotonic() + waits
        while not exchange.is_over:
            message = exchange.receive(until - time.monotonic())
            if message is None:
                break
            received.append(message)
            if not message.is_response and not is_first:
                break
        return received

    # --- GET and DELETE --------------------------------------------------------------------------

    def _get(self, request: ClientRequest) -> Reply:
        """The session's standing stream, "Listening for Messages from the Server", or another one
        that broke off, "Resumability and Redelivery".
        """
        if request.session_id is None:
            raise StreamWithoutSession
        if not request.accepts_stream:
            raise NotAcceptable("Accept must name text/event-stream")
        self.edge.require_open()
        session = self._session(request)
        pass_to_owner(self.owner, request, session, is_stream=True)
        after = request.header("Last-Event-ID")
        self.edge.streams.acquire()
        try:
            exchange = (
                self._resumed(request, session, after)
                if after
                else self._standing(request, session, None)
            )
        except BaseException:
            self.edge.streams.release()
            raise
        exchange.on_close = self.edge.streams.release
        request.is_standing = True
        body = EventStream(
            exchange,
            request.standing_connection(),
            self.options.keepalive_interval,
            primes=_primes(session),
            on_failure=request.note,
            watcher=self.edge.disconnects,
        )
        return stream_reply(body)

    def _standing(self, request: ClientRequest, session: Session, after: str | None) -> Exchange:
        def listen(backend: Backend) -> Exchange:
            exchange = Exchange()
            exchange.has_left = request.has_left
            backend.listen(exchange, after)
            return exchange

        return self.owner.on_backend(session, listen, request.has_left)

    def _resumed(self, request: ClientRequest, session: Session, after: str) -> Exchange:
        """The stream that an event belongs to, from there on; only events of this session count."""
        event = self.owner.events.find(session.id, after)
        if event is None and MOVED in session.metadata:
            # Its events stayed behind, and clients give their standing stream up at a refusal.
            return self._standing(request, session, None)
        if event is None:
            raise InvalidRequest("Last-Event-ID names no event that is kept for this session")
        if is_standing(event.stream):
            return self._standing(request, session, after)
        return Replay(
            self.owner.events,
            session.id,
            event,
            partial(self.owner.is_lost, session.id, child_of(event.stream)),
            self.options.request_timeout,
            lambda: self.edge.is_draining,
        ).exchange

    def _delete(self, request: ClientRequest) -> Reply:
        try:
            session = self._session(request)
        except StorageUnavailable:
            binding = self.binding(request)
            self.owner.end_without_store(request.session_id or "", KIND, binding)
            raise
        pass_to_owner(self.owner, request, session)
        self.owner.end(session)
        return empty_reply(204)

    def _session(self, request: ClientRequest) -> Session:
        """The session that a request names; raises what the client is to be told otherwise."""
        if request.session_id is None:
            raise MissingSession
        session = self._load(request.session_id)
        self.require_own(request, session)
        request.record = session.metadata
        if session.type != KIND:
            raise InvalidRequest(f"The session belongs to another transport ({session.type})")
        version = request.protocol_version
        if version is None or revisions.is_legacy(version):
            return session
        if version == session.metadata.get(PROTOCOL_VERSION):  # client and server know it
            return session
        raise InvalidRequest(f"MCP-Protocol-Version {version!r} is not supported")


class PendingSession:
    """A session that does not exist yet: recorded when the server accepts, given up otherwise."""

    def __init__(
        self,
        owner: Owner,
        bridge: OwnedBackend,
        session_id: str,
        message: Request,
        has_left: Callable[[], bool],
        binding: Mapping[str, str],
    ) -> None:
        self.session_id = session_id
        #: Whether the server, or we, said no: then there is no session and no id to tell.
        self.was_refused = False
        self._owner = owner
        self._bridge = bridge
        self._message = message
        self._has_left = has_left
        self._binding = binding
        self._is_decided = False

    def on_response(self, message: ServerMessage) -> None:
        """Records the session, or ends the child that refused or failed.

        Raises ClientLeft where nobody is there any more to learn of the session.
        """
        self._is_decided = True
        if self._has_left():
            self._owner.discard(self._bridge, message.failure)
            raise ClientLeft
        answer = jsonrpc.parse_message(message.data)
        if isinstance(answer, Response) and answer.result is not UNSET:
            session = handshake.opened(self.session_id, KIND, self._message, answer, self._binding)
            self._owner.establish(session, self._bridge)
            self._owner.backoff.note_success()
        else:
            self.was_refused = True
            self._owner.discard(self._bridge, message.failure)

    def on_close(self) -> None:
        """A client that left before the answer knows no session id: nobody could use the child."""
        if not self._is_decided:
            self._is_decided = True
            self._owner.discard(self._bridge)


def _primes(session: Session | None) -> bool:
    """Whether the client of a session knows events without data."""
    version = None if session is None else session.metadata.get(PROTOCOL_VERSION)
    return version is not None and revisions.primes_streams(version)


def _as_json(request: ClientRequest, answers: Sequence[ServerMessage], is_batch: bool) -> Reply:
    """One answer as an object, several as an array; raises the failure if there is nothing else."""
    if is_batch:
        failures = [each.failure for each in answers if each.failure and each.failure.kind]
        extra = [(headers.FAILURE, failure.kind) for failure in failures]
        for failure in failures:
            request.note(failure)
        if len(failures) == len(answers):
            raise failures[0]
        return json_reply(jsonrpc.encode_batch([answer.data for answer in answers]), 200, extra[:1])
    (answer,) = answers
    if answer.failure is not None:
        raise answer.failure
    if refusals.TOLD_BY in answer.data:
        refusals.require_none(answer.data)
    return json_reply(answer.data)
