"""A reverse proxy for MCP servers that speak HTTP themselves, with session-sticky routing.

Bytes pass unchanged. The proxy reads the session id, whether a POST is an initialize, the era in
its `_meta`, and the answer to an initialize. An initialize chooses a backend and records it; a
request with a session id goes to the recorded backend, on every replica; every other request, such
as a modern one (2026-07-28), goes to a target without a look-up.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Self

from mcp_proxy import metrics
from mcp_proxy.auth.access_tokens import AccessTokens
from mcp_proxy.auth.authenticator import Authenticator
from mcp_proxy.auth.principal import Authenticate
from mcp_proxy.backends.exchange import no_answer
from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.config import ProxyOptions, require_certificates
from mcp_proxy.edge.caller_limit import CallerLimit
from mcp_proxy.edge.disconnects import ClientConnection, DisconnectWatcher
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.forwarded import HeaderPolicy, mount_of, raw_path
from mcp_proxy.edge.guard import require_own_site, without_cors
from mcp_proxy.edge.logs import OnceAMinute
from mcp_proxy.edge.reply import Reply, empty_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    INTERNAL_ERROR,
    BackendDraining,
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    BadAnswer,
    Cancelled,
    ClientError,
    ClientLeft,
    ConfigError,
    Draining,
    EncodedBody,
    MethodNotAllowed,
    NoThread,
    ProxyError,
    RateLimited,
    RedirectRefused,
    RequestId,
    SessionEnded,
    SessionUnknown,
    StorageError,
    StorageUnavailable,
    in_seconds,
)
from mcp_proxy.ownership.owner import ReplicaParts
from mcp_proxy.sessions import handshake
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.sessions.refresh import SessionRefresher
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import COOKIES, UNSENT, Session
from mcp_proxy.traces import Tracing
from mcp_proxy.transparent import sse_sessions
from mcp_proxy.transparent.balancing import Balancer, Resolver, resolve
from mcp_proxy.transparent.bridging import EraBridge
from mcp_proxy.transparent.forwarding import (
    MAX_HELD,
    ForwardedBody,
    InitializeReader,
    closed_on_error,
    hold_back,
    is_lost_session,
    relocated,
    unbuffered,
)
from mcp_proxy.transparent.hidden_tools import Found, HiddenTools, uncompressed
from mcp_proxy.transparent.own_calls import OwnCalls, Watch, taken_along
from mcp_proxy.transparent.protected_resource import PublicName, with_body
from mcp_proxy.transparent.reachability import Reachability
from mcp_proxy.transparent.session_affinity import KIND, Route, SessionAffinity
from mcp_proxy.transparent.tasks import Tasks
from mcp_proxy.transparent.unknown_sessions import UnknownSessions
from mcp_proxy.transports.base import Transport, scoped, storage_for
from mcp_proxy.wire import cookies, headers, jsonrpc, revisions
from mcp_proxy.wire.handshake import INITIALIZE, INITIALIZED
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Batch, Message, Notification, Request, Response
from mcp_proxy.wire.tools import ToolFilter
from mcp_proxy.wire.urls import Address, Target, is_endpoint, parse_target, request_target

if TYPE_CHECKING:
    from mcp_proxy.spans import CallSpans

log = logging.getLogger(__name__)

# The most attempts for a request while backends lose its session.
_ATTEMPTS = 3

# Where HTTP+SSE (2024-11-05) usually lives.
_SSE_PATHS = ("/sse", sse_sessions.MESSAGES_PATH)

# A client that is answered 200 here takes the server for one of the legacy era, for good.
_DISCOVER = "server/discover"

# Requests of 2026-07-28 that are answered by a standing stream.
_LISTENING = ("subscriptions/listen", "events/stream")

# Seconds between two attempts to reach the store, or the backend of a stream.
_PAUSE = 0.2

# Seconds for a backend that was too slow to take the cancellation.
_CANCEL_TIME = 1.0

_STOPPING = "The proxy has stopped before the server answered"


class Inbound(NamedTuple):
    """A client's request. `message` is None where the body has no JSON-RPC message.

    `until` is when it is given up, by the monotonic clock: None for what is answered, but a DELETE.
    `listens` says that a POST asks for a standing stream.
    """

    request: ClientRequest
    body: bytes
    message: Message | Batch | None
    until: float | None = None
    listens: bool = False

    @property
    def id(self) -> RequestId | None:
        """The JSON-RPC id of the answer, None where the body is not a single request."""
        return self.message.id if isinstance(self.message, Request) else None

    @property
    def ids(self) -> list[RequestId]:
        """The ids of all requests in the body."""
        if isinstance(self.message, Request):
            return [self.message.id]
        if not isinstance(self.message, list):
            return []
        return [part.id for part in self.message if isinstance(part, Request)]

    def without(self, cancelled: Collection[RequestId]) -> Inbound:
        """The same without some requests, if it is a batch: nobody is to answer them any more (MCP
        2025-03-26, cancellation).
        """
        if not isinstance(self.message, list):
            return self
        left = [
            part
            for part in self.message
            if not isinstance(part, Request) or part.id not in cancelled
        ]
        return self._replace(body=jsonrpc.encoded(left), message=left)


class TransparentProxy(Transport):
    """A WSGI application in front of one or several HTTP MCP servers.

    `target_url` is one absolute URL or several; its path is that of the MCP endpoint. Without
    `session_storage` sessions are in memory. A session's record may name as its backend a target,
    an address that a target resolves to, or a URL in `allowed_backends`; `*` there, the default,
    allows all http(s) URLs. `verify` is passed to requests. Nothing starts before the first
    request; `close` ends everything that was started. The constructor raises ConfigError.
    """

    rate_limit: CallerLimit | None

    def __init__(
        self,
        target_url: str | Sequence[str],
        session_storage: Storage | None = None,
        *,
        name: str | None = None,
        allowed_backends: Sequence[str] = ("*",),
        verify: bool | str = True,
        resolver: Resolver | None = None,
        options: ProxyOptions = ProxyOptions(),
        authenticate: Authenticate | None = None,
    ) -> None:
        storage = storage_for(session_storage, options)
        targets = as_targets(target_url)
        require_urls(allowed_backends)
        if isinstance(verify, str):
            require_certificates("verify", verify)
        elif not isinstance(verify, bool):
            raise ConfigError(f"verify is True, False or a file of CAs, not {verify!r}")
        if resolver is not None and not callable(resolver):
            raise ConfigError(f"resolver is a function of host and port, not {resolver!r}")
        manager = SessionManager(
            scoped(storage, name, sorted(target.url for target in targets)),
            unknown_status=options.unknown_status,
        )
        self._own_parts: ReplicaParts | None = ReplicaParts(storage.mailboxes())
        workers = self._own_parts.workers
        self.tokens = AccessTokens.of(options, workers, verify or True)
        authenticator = Authenticator.of(options, authenticate, workers, self.tokens)
        self._set_up(
            targets,
            manager,
            Edge(options, workers, authenticator),
            options,
            allowed_backends,
            verify,
            resolver,
            self._own_parts,
        )
        self.server_name = name or self.server_name

    @classmethod
    def _shared(
        cls,
        target_url: str | Sequence[str],
        manager: SessionManager,
        edge: Edge,
        options: ProxyOptions,
        allowed_backends: Sequence[str],
        verify: bool | str,
        parts: ReplicaParts,
        tools: ToolFilter | None = None,
    ) -> Self:
        """A transport of an application, with the edge, threads and replica of the application."""
        transport = cls.__new__(cls)
        targets = as_targets(target_url)
        transport._own_parts = None
        transport._set_up(
            targets, manager, edge, options, allowed_backends, verify, None, parts, tools
        )
        return transport

    def _set_up(
        self,
        targets: Sequence[Target],
        manager: SessionManager,
        edge: Edge,
        options: ProxyOptions,
        allowed_backends: Sequence[str],
        verify: bool | str,
        resolver: Resolver | None,
        parts: ReplicaParts,
        tools: ToolFilter | None = None,
    ) -> None:
        workers = self._workers = parts.workers
        self.options = options
        self.manager = manager
        self.edge = edge
        self._client = HttpClient(
            options.connect_timeout, options.threads, verify, options.backend_proxy
        )
        self.reachability = Reachability(self._client.probe, workers)
        self.balancer = Balancer(
            targets,
            manager.storage.ttl,
            resolver or resolve,
            reachability=self.reachability,
            proxy_of=self._client.proxy_of,
        )
        self.disconnects = DisconnectWatcher(workers)
        self.refresher = SessionRefresher(manager, manager.storage.ttl, workers)
        self._targets = targets
        self._target = targets[0]
        calls = OwnCalls(self._client, targets[0], options.request_timeout)
        served = " ".join(target.url for target in targets)
        self.rate_limit = CallerLimit.of(options, served, manager.storage.rate_counter)
        self._unknown = UnknownSessions(self.balancer, calls, manager, edge.asks)
        self._warning = OnceAMinute()
        self._redirect_warning = OnceAMinute()
        self._path_warning = OnceAMinute()
        self._affinity = SessionAffinity(
            targets[0],
            self.balancer,
            calls,
            manager,
            allowed_backends,
            parts.replica,
            options.sticky_cookies,
            options.request_timeout,
        )
        self._tasks = Tasks(self.balancer, self._affinity, manager.storage)
        self._sse = sse_sessions.SseSessions(
            manager, self._affinity, self.refresher, options.trusted_proxies
        )
        self._policy = HeaderPolicy(
            options.trusted_proxies, options.forward_headers, options.preserve_host, edge.withheld
        )
        self._public = _public_name(options, edge, targets)
        self._bridge = self._new_bridge(parts, tools) if options.bridge else None
        self._hidden = None if tools is None else HiddenTools(tools)
        self._lock = threading.Lock()  # guards _calls
        self._calls: dict[HttpCall, bool] = {}  # running; whether each is a standing stream

    @property
    def bridge(self) -> EraBridge | None:
        """What begins conversations with the server for others; None where nothing is bridged."""
        return self._bridge

    def client_headers(self, request: ClientRequest) -> Mapping[str, str]:
        """The headers of a client's request that the server gets."""
        return taken_along(self._policy.of_client(request.environ))

    def own_headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """A client's headers for the server, with those that the server is to have of us."""
        return self._policy.changed(headers)

    def _new_bridge(self, parts: ReplicaParts, tools: ToolFilter | None) -> EraBridge:
        return EraBridge(
            tuple(target.url for target in self._targets),
            self._target,
            self._client,
            self.balancer,
            self._policy,
            self.manager,
            parts,
            self.edge,
            self.options,
            tools,
        )

    def __repr__(self) -> str:
        return f"<TransparentProxy calls={len(self._calls)} {self.balancer!r} {self.manager!r}>"

    # --- life ------------------------------------------------------------------------------------

    def is_endpoint(self, path: str) -> bool:
        return True  # an HTTP server may have it anywhere

    @property
    def is_busy(self) -> bool:
        with self._lock:
            is_busy = not all(self._calls.values())
        return is_busy or (self._bridge is not None and self._bridge.front.is_busy)

    def end_streams(self) -> None:
        with self._lock:
            streams = [call for call, is_standing in self._calls.items() if is_standing]
        for call in streams:
            call.abort(Draining())
        if self._bridge is not None:
            self._bridge.front.end_streams()

    def end_session(self, session_id: str) -> bool:
        session = self.manager.peek(session_id)
        if session is None:
            return False
        if self._bridge is not None and self._bridge.has(session):
            return self._bridge.front.end_session(session_id)
        route = self._affinity.route(session)
        self._affinity.forget(session_id)
        self._count_ended(session)
        self._affinity.discard(route.address, route.session_id, {}, session.metadata.get(COOKIES))
        return True

    def hand_over(self) -> None:
        if self._bridge is not None:
            self._bridge.front.hand_over()

    def end_unless_busy(self) -> bool:
        with self._lock:
            is_busy = not all(self._calls.values())
        if is_busy or (self._bridge is not None and self._bridge.front.owner.is_busy):
            return False
        self.end_streams()
        self.shut_down()
        return True

    def give_way(self) -> None:
        if self._bridge is not None:
            self._bridge.front.give_way()

    def shut_down(self) -> None:
        """Aborts the running calls, stops the threads and closes idle connections."""
        self.refresher.stop()
        with self._lock:
            calls = dict(self._calls)
        for call, is_standing in calls.items():
            call.abort(Draining() if is_standing else BackendDraining(_STOPPING))
        if self._bridge is not None:
            self._bridge.close()
        self.disconnects.stop()
        self.reachability.stop()
        self.balancer.stop()
        self._client.close()
        if self._own_parts is not None:
            self.edge.close()
            self._own_parts.close()

    def threads_reason(self) -> str | None:
        return self._workers.not_ready_reason()

    def server_reason(self) -> str | None:
        """Why every backend fails, None if one does not.

        Backends are asked for a connection only, by another thread.
        """
        return self.reachability.not_ready_reason(self.balancer.candidates(wait=0))

    # --- where a request goes --------------------------------------------------------------------

    def handle(self, request: ClientRequest) -> Reply:
        if "HTTP_SEC_FETCH_SITE" in request.environ and self._is_for_clients(request.path):
            require_own_site(request.environ)
        checked = self._checked(request, request.read_body(self.options.max_body_bytes))
        if isinstance(checked, Reply):
            return checked
        body, message = checked
        inbound = Inbound(request, body, message)
        if message is not None and not _has_request(message):
            until = time.monotonic() + self.options.connect_timeout
            inbound = inbound._replace(until=until)
        if isinstance(inbound.message, (Request, Notification)):
            request.rpc, request.params = inbound.message.method, inbound.message.params
        is_discover = inbound.message is not None and request.rpc == _DISCOVER
        request.message = None if is_discover else inbound.message
        if Tracing.tracer is not None:
            request.begin_spans(Tracing.tracer, message)
        try:
            if self.rate_limit is not None:
                self._count(self.rate_limit, inbound)
            if request.principal is not None and self._is_for_stream(request):
                return self._in_own_stream(inbound)
            return self._dispatch(inbound)
        except ProxyError as error:
            error.request_id = inbound.id
            if error.kind and request.session_id is not None and request.rpc == INITIALIZED:
                self._affinity.unsent.keep(
                    request.session_id, request.has_left, request.principal_name
                )
            if is_discover and error.kind:
                error.code = INTERNAL_ERROR
            error.headers = self._challenges(list(error.headers), request, None)
            raise
        finally:
            request.stay()  # else a stream would keep the body

    def _is_guarded(self, request: ClientRequest) -> bool:
        """Whether not everybody may send everything, or as much as they like."""
        is_known = request.principal is not None
        return is_known or self._hidden is not None or self.rate_limit is not None

    def _checked(
        self, request: ClientRequest, body: bytes
    ) -> tuple[bytes, Message | Batch | None] | Reply:
        """What goes on of a body, and the message in it; or the answer, where nothing does.

        Where callers are known what goes to the endpoint is written anew, and what cannot be read
        is refused: the server may read the same bytes in another way, or by another method.
        """
        if request.method != "POST":
            if body and self._is_guarded(request):
                raise MethodNotAllowed("GET, POST, DELETE")
            return body, None
        if self._hidden is not None:
            checked = self._hidden.checked(request, body, self._is_endpoint(request.path))
            if isinstance(checked, Reply) and self.rate_limit is not None:
                self.rate_limit.take(self.server_name, request, 1)
            return checked
        if request.principal is None or not self._is_endpoint(request.path):
            return body, _message_in(request, body)
        if request.is_encoded:
            raise EncodedBody
        message = jsonrpc.parse(body)
        return jsonrpc.encoded(message), message

    def _count(self, limit: CallerLimit, inbound: Inbound) -> None:
        """Counts the requests of a POST; what is no message of ours may be one to the server.

        Raises RateLimited, whose status counts where the answer to the POST is not read.
        """
        request, message = inbound.request, inbound.message
        try:
            if message is None and request.method == "POST":
                limit.take(self.server_name, request, 1)
            elif message is not None:
                limit.count(self.server_name, request, message)
        except RateLimited:
            if sse_sessions.may_name_session(request):
                request.message = None
            raise

    def _is_for_clients(self, path: str) -> bool:
        """Whether a request for this path is an MCP client's, as far as that can be known."""
        return self._is_endpoint(path) or path.rstrip("/") in _SSE_PATHS

    def _is_endpoint(self, path: str) -> bool:
        """Whether a request for this path is for the MCP endpoint of a target."""
        return any(is_endpoint(target, None, path) for target in self._targets)

    def refuse(self, request: ClientRequest) -> Reply:
        """By a status where the answer to a POST is not read; nothing can be looked up here."""
        if request.method == "POST":
            message = jsonrpc.parse(request.read_body(self.options.max_body_bytes))
            is_older = sse_sessions.may_name_session(request)
            if is_older:
                sse_sessions.name_session(request)
            if is_older and _has_request(message):
                failure = NoThread()
                failure.request_id = message.id if isinstance(message, Request) else None
                raise failure
            request.message = message
        raise NoThread

    def _dispatch(self, inbound: Inbound) -> Reply:
        request, message = inbound.request, inbound.message
        if request.method == "GET" and request.accepts_stream:
            self.edge.require_open()  # a standing stream, which would outlast the drain
        if _is_modern(request, message):
            request.session = None  # a header that names one means nothing here
            if request.rpc in _LISTENING and inbound.id is not None:
                self.edge.require_open()
                inbound = inbound._replace(listens=True)
            return self._modern(inbound)
        if request.method == "POST" and request.environ.get("QUERY_STRING"):
            carried = request.message
            if message is not None and _has_request(message):
                request.message = None  # the answer would leave on the session's stream instead
            reply = self._in_sse_session(inbound)
            if reply is not None:
                return reply
            request.message = carried
        if isinstance(message, Request) and message.method == INITIALIZE:
            self.edge.require_open()
            return self._initialize(inbound, message)
        if request.session_id is None:
            return self._without_session(inbound)
        try:
            session = self.manager.load(request.session_id)
            self.manager.require_own(session, request.principal_name)
            request.record = session.metadata
        except SessionUnknown as error:
            return self._in_unknown_session(inbound, request.session_id, error)
        if self._bridge is not None and self._bridge.has(session):
            if message is None:
                return self._bridge.serve(request)
            return self._bridge.answer(request, message)
        return self._in_session(inbound, session)

    def _is_for_stream(self, request: ClientRequest) -> bool:
        """Whether a server may take a POST for a message to somebody's stream of 2024-11-05.

        The URI alone says to whose, by its query or its path, and the body may say anything.
        """
        if request.method != "POST":
            return False
        return not self._is_endpoint(request.path) or sse_sessions.names_session(request)

    def _in_own_stream(self, inbound: Inbound) -> Reply:
        """Sends a message to the stream that its URI names; raises what is said of an unknown one
        where that is not the caller's.
        """
        message = inbound.message
        if message is not None and _has_request(message):
            inbound.request.message = None
        reply = self._in_sse_session(inbound)
        if reply is not None:
            return reply
        if self._path_warning.is_due():
            log.warning(
                "a POST that is for no stream of its caller was refused: with authentication "
                "messages go to the MCP endpoint, whose path target_url has to have"
            )
        raise self.manager.unknown()

    def _modern(self, inbound: Inbound) -> Reply:
        """Sends a modern message to a target, or over the bridge where none knows such messages."""
        bridge, message = self._bridge, inbound.message
        if bridge is None or not isinstance(message, (Request, Notification)):
            return self._without_session(inbound)
        if bridge.takes_modern(inbound.request, message):
            return bridge.answer(inbound.request, message)
        try:
            call = self._first_reached(inbound, bridge.is_legacy)
        except BackendUnreached:
            if not any(map(bridge.is_legacy, self.balancer.backends())):
                raise
            return bridge.answer(inbound.request, message)
        with closed_on_error(call):
            if bridge.is_refusal_of_modern(call):
                # A notification needs no server there; a task may have led to one that is known.
                if isinstance(message, Notification) or bridge.is_legacy(call.tried):
                    call.close()
                    return bridge.answer(inbound.request, message)
                if bridge.is_for_others(inbound.request, message, call):
                    call.close()
                    return self._modern(inbound)
        return self._reply(inbound, call)

    def _without_session(self, inbound: Inbound) -> Reply:
        """Sends a request to a target; nothing is looked up, stored or minted."""
        call = self._first_reached(inbound)
        if self._public is not None:
            with closed_on_error(call):
                metadata = self._public.metadata(inbound.request, call)
                if metadata is not None:
                    found = self._headers_for(inbound.request, call, None)
                    call.close()
                    return Reply(call.status, with_body(found, metadata), metadata)
        return self._reply(inbound, call)

    def _first_reached(
        self, inbound: Inbound, but: Callable[[Address], bool] | None = None
    ) -> HttpCall:
        """The call at the first backend that can be reached, `but` some excepted, or that has the
        task in question.
        """

        binding = self.manager.binding(inbound.request.principal_name)
        self._tasks.require_own(inbound.message, binding)

        def act(address: Address) -> HttpCall:
            return self._call(inbound, Route(address, None))

        return self._tasks.asked(inbound.message, act, but) or self.balancer.first_reached(act, but)

    def _in_sse_session(self, inbound: Inbound) -> Reply | None:
        """Sends a message of 2024-11-05 to the backend that holds its session's stream; None where
        the URI names no such session.

        A request is tried for `connect_timeout` while the store or that backend cannot be reached:
        its client sends nothing after a failure. The session ends with its stream alone: whoever
        holds that notices.
        """
        request, is_known = inbound.request, False
        is_request = inbound.message is not None and _has_request(inbound.message)
        until = time.monotonic() + (self.options.connect_timeout if is_request else 0)
        while True:
            try:
                session = self._sse.session_of(request)
                if session is None:
                    if is_known:
                        raise SessionEnded
                    return None
                is_known = True
                target = self._sse.target_of(request, session)
                route = self._affinity.route(session)._replace(session_id=None)
                return self._reply(inbound, self._call(inbound, route, target))
            except (StorageUnavailable, BackendUnreached) as error:
                if time.monotonic() >= until or request.has_left():
                    if isinstance(error, BackendUnreached):
                        self.balancer.note_failure(route.address, error)
                        error.status = 503
                        error.headers = [("Retry-After", "1")]
                    raise
            time.sleep(_PAUSE)

    def _initialize(self, inbound: Inbound, message: Request) -> Reply:
        binding = self.manager.binding(inbound.request.principal_name)
        call = self._initialized_by(inbound, message)
        if isinstance(call, Reply):
            return call
        backend_sid = call.header(headers.SESSION_ID)
        if backend_sid is not None and not headers.FIELD_VALUE.fullmatch(backend_sid):
            backend_sid = None  # the client does not get it either
        if call.status >= 300 or backend_sid is None:
            with closed_on_error(call):
                if self._bridge is not None and self._bridge.may_know_no_sessions(call):
                    reply = self._bridge.answer_initialize(inbound.request, message, call)
                    if reply is not None:
                        call.close()
                        return reply
            return self._reply(inbound, call)
        with closed_on_error(call):
            opened = handshake.opened(backend_sid, KIND, message, None, binding)
            if call.sets_cookie:
                found = cookies.kept("", call.headers, self.options.sticky_cookies, time.time())
                opened = opened.with_metadata(**{COOKIES: found or None})
            try:
                session = self._affinity.record(opened, call.address, backend_sid)
            except StorageError:
                call.close()
                outbound = self._policy.outbound(inbound.request.environ)
                sticky = opened.metadata.get(COOKIES)
                self._affinity.discard(call.address, backend_sid, outbound, sticky)
                raise
        inbound.request.session = session.id
        reader = InitializeReader(
            call.media_type, lambda answer: self._affinity.complete(session, answer)
        )
        return self._reply(inbound, call, session, reader)

    def _initialized_by(self, inbound: Inbound, message: Request) -> HttpCall | Reply:
        """The call that an initialize has become, or its answer over the bridge, where backends
        are known to refuse it and others cannot be reached.
        """
        bridge = self._bridge
        if bridge is None:
            return self._first_reached(inbound)
        if bridge.takes_initialize():
            reply = bridge.answer_initialize(inbound.request, message)
            if reply is not None:
                return reply
        try:
            return self._first_reached(inbound, bridge.is_modern)
        except BackendUnreached:
            if not any(map(bridge.is_modern, self.balancer.backends())):
                raise
            reply = bridge.answer_initialize(inbound.request, message)
            if reply is None:
                raise
            return reply

    def _in_unknown_session(
        self, inbound: Inbound, session_id: str, error: SessionUnknown
    ) -> Reply:
        """Serves a session without a record where a backend knows it; raises `error` otherwise."""
        if not self.options.asks:
            if error.status == 400 and self._warning.is_due():
                log.warning(
                    "a session id that was never issued here was refused with 400; if this proxy "
                    "has restarted, unknown_session_status=ask takes up what the server still knows"
                )
            raise error
        if inbound.request.method != "GET" and not isinstance(inbound.message, Request):
            raise error
        outbound = self._policy.outbound(inbound.request.environ)
        request = inbound.request
        watch = self._watch_of(request)
        found = self._unknown.find(session_id, outbound, request.has_left, watch)
        if isinstance(found, Session):
            return self._in_session(inbound, found)
        return self._reply(inbound, self._call(inbound, Route(found, session_id)))

    # --- in a session ----------------------------------------------------------------------------

    def _in_session(self, inbound: Inbound, session: Session) -> Reply:
        request, message = inbound.request, inbound.message
        if inbound.ids and (cancelled := request.admit(session.id)):
            if cancelled.issuperset(inbound.ids):
                self._send_rest(inbound.without(cancelled), session)
                raise Cancelled
            inbound = inbound.without(cancelled)
        if isinstance(message, Notification) and request.cancels_waiting(session.id, message):
            return empty_reply(202)
        if request.method == "DELETE":
            return self._delete(inbound, session)
        return self._forwarded(inbound, session)

    def _send_rest(self, inbound: Inbound, session: Session) -> None:
        """Sends what is left of a batch without its requests, and wants no answer."""
        if isinstance(inbound.message, list) and inbound.message:
            until = time.monotonic() + self.options.connect_timeout
            body = self._forwarded(inbound._replace(until=until), session).body
            if not isinstance(body, bytes):
                body.close()

    def _forwarded(self, inbound: Inbound, session: Session) -> Reply:
        """The answer of the session's backend, brought back or replaced where it is lost."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._reply(inbound, self._answer_in(inbound, session), session)
            except SessionEnded as error:
                if _is_about_the_past(inbound.message):
                    raise BadAnswer("The server has lost the session") from error
                outbound = self._policy.outbound(inbound.request.environ)
                limit = None if inbound.until is None else self._time_left(inbound.until)
                session = self._affinity.reinitialize(
                    session,
                    outbound,
                    limit,
                    inbound.request.has_left,
                    self._watch_of(inbound.request),
                )
            except (BackendUnreached, BackendDraining):
                raise
            except BackendLost:
                # The request may have been executed. If the backend is lost, the next request finds
                # out; if not, the session still exists. Only a GET is harmless to repeat.
                if inbound.request.method != "GET":
                    raise
        try:
            return self._reply(inbound, self._answer_in(inbound, session), session)
        except SessionEnded:
            self._affinity.forget(session.id)  # no backend keeps it: the client must initialize
            raise

    def _answer_in(self, inbound: Inbound, session: Session) -> HttpCall:
        """The answer of the session's backend, or of another one that knows the session.

        Raises SessionEnded where those that were reached do not know it.
        """
        route = self._affinity.route(session)
        if route.is_usable:
            try:
                return self._asked(inbound, session, route)
            except BackendUnreached as error:
                self.balancer.note_failure(route.address, error)
        return self._elsewhere(inbound, session, route)

    def _elsewhere(self, inbound: Inbound, session: Session, route: Route) -> HttpCall:
        """As `_answer_in`, where the session's backend cannot be reached."""
        failure: ProxyError = self.balancer.failure([route.address])
        for address in self.balancer.instead_of(route.address):
            try:
                there = route._replace(address=address)
                call = self._asked(inbound, session, there)
            except BackendUnreached as error:
                self.balancer.note_failure(address, error)
                if not isinstance(failure, SessionEnded):
                    failure = error
            except SessionEnded as error:
                failure = error
            else:
                if call.status < 300:
                    self._affinity.move(session, call.address)
                return call
        raise failure

    def _asked(self, inbound: Inbound, session: Session, route: Route) -> HttpCall:
        """The answer of one backend; raises SessionEnded where it does not know the session."""
        is_untold = UNSENT in session.metadata or session.id in self._affinity.unsent.ids
        if is_untold and inbound.message is not None and inbound.request.rpc != INITIALIZED:
            outbound = self._policy.outbound(inbound.request.environ)
            watch = self._watch_of(inbound.request)
            self._affinity.send_initialized(session, route, outbound, watch)
        call = self._call(inbound, route)
        if call.sets_cookie:
            self._affinity.follow_cookies(session, call.headers)
        if call.status in (400, 404):
            with closed_on_error(call):
                if is_lost_session(call) or self._is_modern_now(inbound, session, route, call):
                    raise SessionEnded
        return call

    def _is_modern_now(
        self, inbound: Inbound, session: Session, route: Route, call: HttpCall
    ) -> bool:
        """Whether a request was refused since its backend knows no sessions any more."""
        bridge = self._bridge
        if bridge is None or not bridge.may_know_no_sessions(call):
            return False
        outbound = self._policy.outbound(inbound.request.environ)
        watch = self._watch_of(inbound.request)
        return self._affinity.is_modern_now(session, route, outbound, watch)

    def _delete(self, inbound: Inbound, session: Session) -> Reply:
        """Ends the session at its backend, and here whatever becomes of that.

        A backend has `connect_timeout` for all of its answer: one that cannot be reached has ended
        the session already, one that is silent will not miss it. A client that leaves meanwhile
        does not want it either.
        """
        inbound = inbound._replace(until=time.monotonic() + self.options.connect_timeout)
        try:
            call = self._answer_in(inbound, session)
            with closed_on_error(call):
                if call.status < 300:
                    call.read_ahead(MAX_HELD)
        except (SessionEnded, ClientLeft):
            self._affinity.forget(session.id)
            raise
        except RedirectRefused:
            raise  # the server is there, and has the session
        except BackendError as error:
            self._affinity.forget(session.id)
            inbound.request.note(error)
            return empty_reply(204)
        with closed_on_error(call):
            if call.status < 300 or call.status == 404:
                self._affinity.forget(session.id)
                self._count_ended(session)
        return self._reply(inbound, call, session)

    def _count_ended(self, session: Session) -> None:
        counters = metrics.current()
        if counters is not None:
            seconds = time.time() - session.created_at
            counters.observe(metrics.SESSIONS_ENDED, seconds, self.server_name)
            counters.recent.end_session(session.id, self.server_name)

    # --- one call --------------------------------------------------------------------------------

    def _call(
        self,
        inbound: Inbound,
        route: Route,
        target: str | None = None,
    ) -> HttpCall:
        """The call, its response received up to the body, a small one in JSON to its end; redirects
        of the MCP endpoint are followed.

        `target` is path and query where they differ from the request's. Raises BackendError,
        ClientLeft, Draining, and SessionEnded where the backend's id of the session cannot be sent.
        """
        request = inbound.request
        outbound = self._policy.outbound(request.environ)
        outbound.pop(headers.SESSION_ID, None)
        if route.session_id is not None:
            if not headers.FIELD_VALUE.fullmatch(route.session_id):
                raise SessionEnded  # no backend can be asked for it
            outbound[headers.SESSION_ID] = route.session_id
        if route.cookies is not None:
            outbound["Cookie"] = cookies.sent_with(outbound.get("Cookie"), route.cookies)
        if request.method == "GET":
            sse_sessions.withhold(request, outbound)
        if self._hidden is not None:
            outbound = uncompressed(outbound)
        is_followed = False
        if target is None:
            path, query = raw_path(request.environ), request.environ.get("QUERY_STRING", "")
            target = request_target(self._target, route.address, path, query)
            is_followed = is_endpoint(self._target, route.address, path)
        body = inbound.body
        if request.spans is not None:
            body = _traced(request.spans, inbound, route.address, outbound)
        call = HttpCall(self._client, route.address, request.method, target, outbound, body)
        return self._sent(inbound, call, is_followed)

    def _sent(self, inbound: Inbound, call: HttpCall, is_followed: bool) -> HttpCall:
        request = inbound.request
        is_standing = inbound.listens or (request.method == "GET" and request.accepts_stream)
        has_request = inbound.message is not None and inbound.until is None
        while True:
            self._track(call, is_standing)
            call.on_close(partial(self._untrack, call))
            with closed_on_error(call):
                if inbound.listens:  # no backend is asked in vain
                    self._count_stream(call)
                connection = ClientConnection(request.environ)
                call.on_close(self.disconnects.watch(connection, call.abort))
                limit = self.options.request_timeout
                if inbound.until is not None:
                    limit = min(limit, self._time_left(inbound.until))
                try:
                    call.send(limit)
                    if has_request and call.media_type == headers.JSON and call.status < 300:
                        hold_back(call)
                except BackendTimeout:
                    self._cancel(inbound, call)
                    raise
            try:
                successor = call.redirected() if is_followed else None
            except RedirectRefused as error:
                if not _is_of_mcp(inbound):
                    return call
                call.close()
                if self._redirect_warning.is_due():
                    log.warning("%s", error)
                raise
            if successor is None:
                return call
            call.close()
            if successor.address.scheme != call.address.scheme:
                self.balancer.note_tls(call.address, successor.address.port)
            call = successor

    def _time_left(self, until: float) -> float:
        """Seconds for a message that nobody waits for; raises BackendTimeout when they are over."""
        left = until - time.monotonic()
        if left <= 0:
            limit = in_seconds(self.options.connect_timeout)
            raise BackendTimeout(f"The server did not take it within {limit}")
        return max(round(left, 1), 0.1)  # a sentence may name it

    def _cancel(self, inbound: Inbound, call: HttpCall) -> None:
        """Sends the backend a cancellation of a session's requests that have timed out."""
        notices = list(map(_cancellation_of, inbound.ids))
        if headers.SESSION_ID not in call.request_headers or not notices:
            return
        is_batch = isinstance(inbound.message, list)
        notice = HttpCall(
            self._client,
            call.address,
            "POST",
            call.target,
            call.request_headers,
            jsonrpc.encode_batch(notices) if is_batch else notices[0],
        )
        with contextlib.suppress(ProxyError):  # a backend may ignore cancellations, too
            notice.send(_CANCEL_TIME)
        notice.close()

    def _watch_of(self, request: ClientRequest) -> Watch:
        """For calls of ours that a request waits for: they end when its client leaves."""
        return partial(self.disconnects.watch, ClientConnection(request.environ))

    def _track(self, call: HttpCall, is_standing: bool) -> None:
        with self._lock:
            self._calls[call] = is_standing

    def _untrack(self, call: HttpCall) -> None:
        with self._lock:
            self._calls.pop(call, None)

    def _reply(
        self,
        inbound: Inbound,
        call: HttpCall,
        session: Session | None = None,
        reader: InitializeReader | None = None,
    ) -> Reply:
        """The reply for the client, made of the backend's response."""
        first = b""
        is_stream = call.media_type == headers.EVENT_STREAM
        with closed_on_error(call):
            if reader is None:
                binding = self.manager.binding(inbound.request.principal_name)
                transform = self._tasks.reader(inbound.message, call, binding)
            else:
                transform = reader.feed
            reply_headers = self._headers_for(inbound.request, call, session)
            is_waited_for = inbound.message is None and inbound.until is None
            if is_stream or (is_waited_for and call.media_type != headers.JSON):
                call.limit_silence()  # a download, too, may take any time
            if is_stream and session is not None:
                call.on_close(self.refresher.hold(session.id))
            if inbound.listens or inbound.request.method == "GET":
                self._note_standing(inbound, call, is_stream)
            rewriter = self._sse.rewriter(inbound.request, call)
            if rewriter is not None:
                transform = rewriter.feed
                first = self._sse.begin(call, rewriter)
            if self._hidden is not None:
                found = Found(reply_headers, transform, first)
                reply_headers, transform, first = self._hidden.shown(
                    inbound.request, inbound.message, call, found
                )
        inbound.request.backend = call.address.url
        if call.status >= 400:
            inbound.request.reason = "the server's own answer"
        if (whole := call.whole) is not None:
            call.close()
            if transform is not None:
                whole = first + transform(whole) + transform(b"")
            return Reply(call.status, reply_headers, whole)

        def on_failure(failure: ProxyError) -> None:
            if isinstance(failure, BackendTimeout):
                failure = no_answer(self.options.request_timeout)
                self._cancel(inbound, call)
            inbound.request.note(failure)

        body = ForwardedBody(
            call,
            inbound.ids,
            on_failure,
            transform,
            self.options.keepalive_interval,
            lambda: self._client.probe(call.address) is None,
            first,
            inbound.request.answered,
        )
        return Reply(call.status, reply_headers, body)

    def _headers_for(
        self, request: ClientRequest, call: HttpCall, session: Session | None
    ) -> Headers:
        """The backend's headers as the client is to see them."""
        found = self._policy.inbound(call.headers, None if session is None else session.id)
        if "HTTP_ORIGIN" in request.environ:
            found = without_cors(found)  # the edge speaks for us
        found = self._challenges(found, request, call)
        if call.header("Location") is not None:
            mount = mount_of(request.environ, self.options.trusted_proxies)
            found = relocated(found, call, mount)
        return unbuffered(found) if call.media_type == headers.EVENT_STREAM else found

    def _challenges(self, found: Headers, request: ClientRequest, call: HttpCall | None) -> Headers:
        """Headers whose challenges are such that clients can meet them, as far as we know."""
        if self.edge.authenticator is not None:
            return [(n, value) for n, value in found if n.lower() != "www-authenticate"]
        return found if self._public is None else self._public.challenges(found, request, call)

    def _note_standing(self, inbound: Inbound, call: HttpCall, is_stream: bool) -> None:
        """Has an answer be a standing stream if it is one; raises Overloaded."""
        self._track(call, is_stream)
        inbound.request.is_standing = is_stream
        if is_stream:
            if not inbound.listens:  # else it was counted before it was asked for
                self._count_stream(call)
            self._let_stand(inbound.request, call)

    def _count_stream(self, call: HttpCall) -> None:
        """Counts a standing stream until its call is closed; raises Overloaded."""
        self.edge.streams.acquire()
        call.on_close(self.edge.streams.release)

    def _let_stand(self, request: ClientRequest, call: HttpCall) -> None:
        """Lifts the read timeout of a standing stream; a client that is cut off is given up."""
        call.wait_for_ever()
        connection = request.standing_connection()
        connection.give_up_after(2 * self.options.keepalive_interval)
        if request.principal is not None:  # how long it is known who that is
            call.on_close(self.disconnects.watch(connection, call.abort))


def _traced(
    spans: CallSpans, inbound: Inbound, address: Address, outbound: dict[str, str]
) -> bytes:
    """The body with which a request goes to a server as a part of its trace; the headers get the
    context, too. A batch has it in the headers alone.
    """
    message = inbound.message
    parts = message if isinstance(message, list) else [message]
    requests = [part for part in parts if isinstance(part, Request)]
    attributes: dict[str, str | int] = {
        "network.transport": "tcp",
        "network.protocol.name": "http",
        "server.address": address.name or address.host,
        "server.port": address.port,
        "mcp_proxy.backend": address.url,
    }
    sent = spans.sent(requests, attributes)
    outbound.update({name.title(): value for name, value in spans.headers().items()})
    if not isinstance(message, Request):
        return inbound.body
    return jsonrpc.with_params(inbound.body, sent[0].params)


def _public_name(options: ProxyOptions, edge: Edge, targets: Sequence[Target]) -> PublicName | None:
    """What stands for the servers in what they say of themselves for OAuth; None for nothing.

    While we authenticate, what a server wants of its callers is no business of theirs.
    """
    if options.public_url is None or edge.authenticator is not None:
        return None
    return PublicName(options.public_url, targets)


def as_targets(target_url: str | Sequence[str]) -> list[Target]:
    """The targets of one URL or several; raises ConfigError for an invalid URL, or none."""
    try:
        urls = [target_url] if isinstance(target_url, str) else list(target_url)
    except TypeError:
        urls = []
    texts = [url for url in urls if isinstance(url, str)]
    targets = [target for url in texts if (target := parse_target(url)) is not None]
    if not urls or len(targets) < len(urls):
        raise ConfigError("target_url takes absolute http:// or https:// URLs")
    return targets


def require_urls(allowed_backends: Sequence[str]) -> None:
    """Raises ConfigError unless each is a URL or `*`; a text would be taken for its letters."""
    is_list = isinstance(allowed_backends, Sequence) and not isinstance(allowed_backends, str)
    urls = [url for url in allowed_backends if url != "*"] if is_list else []
    if not is_list or not all(isinstance(url, str) and parse_target(url) for url in urls):
        raise ConfigError(
            "allowed_backends takes a list of absolute http:// or https:// URLs, or *"
        )


# --- the facts that routing needs of requests and answers ----------------------------------------


def _message_in(request: ClientRequest, body: bytes) -> Message | Batch | None:
    """The message or batch in a POST, None where its body is not valid JSON-RPC."""
    if not headers.is_json(request.content_type or ""):
        return None
    try:
        return jsonrpc.parse(body)
    except ClientError:
        return None  # the backend will report the error


def _is_of_mcp(inbound: Inbound) -> bool:
    """Whether a request for the MCP endpoint is an MCP client's, and no browser's."""
    request = inbound.request
    if request.method == "GET":
        return request.accepts_stream
    return inbound.message is not None or request.method == "DELETE"


def _is_modern(request: ClientRequest, message: Message | Batch | None) -> bool:
    """Whether a request is of the stateless era: by its body if it has one, else by its header.

    A notification need not say it in its body: without a session its header counts, too.
    """
    if request.method != "POST":
        return revisions.is_modern(request.protocol_version or "")
    if not isinstance(message, (Request, Notification)):
        return False
    try:
        version = message.meta.protocol_version
    except ClientError:
        return False
    if isinstance(version, str):
        return revisions.is_modern(version)
    has_header = isinstance(message, Notification) and request.session_id is None
    return has_header and revisions.is_modern(request.protocol_version or "")


def _has_request(message: Message | Batch) -> bool:
    """Whether this is a request, or a batch with one."""
    if isinstance(message, list):
        return any(isinstance(part, Request) for part in message)
    return isinstance(message, Request)


def _is_about_the_past(message: Message | Batch | None) -> bool:
    """Whether a message concerns requests that a lost server took along: a new one knows none."""
    if isinstance(message, list):
        return all(map(_is_about_the_past, message))
    if isinstance(message, Notification):
        return message.method == jsonrpc.CANCELLED
    return isinstance(message, Response)


def _cancellation_of(request_id: RequestId) -> bytes:
    """The notification that cancels a request after its time limit."""
    params = {"requestId": request_id, "reason": "The proxy's time limit has passed"}
    return jsonrpc.encode(Notification(jsonrpc.CANCELLED, jsonrpc.as_payload(params)))
