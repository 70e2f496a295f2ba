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
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Self

from mcp_proxy.backends.exchange import no_answer
from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.background import Workers
from mcp_proxy.config import ProxyOptions, require_certificates
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
    ClientError,
    ConfigError,
    Draining,
    NoThread,
    ProxyError,
    RedirectRefused,
    RequestId,
    SessionEnded,
    SessionUnknown,
    StorageError,
    in_seconds,
)
from mcp_proxy.replica import Replica
from mcp_proxy.sessions import handshake
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.sessions.refresh import SessionRefresher
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import COOKIES, UNSENT, Session
from mcp_proxy.transparent import sse_sessions
from mcp_proxy.transparent.balancing import Balancer, Resolver, resolve
from mcp_proxy.transparent.forwarding import (
    ForwardedBody,
    InitializeReader,
    hold_back,
    is_lost_session,
    relocated,
    unbuffered,
)
from mcp_proxy.transparent.own_calls import OwnCalls, Watch
from mcp_proxy.transparent.reachability import Reachability
from mcp_proxy.transparent.session_affinity import KIND, Route, SessionAffinity
from mcp_proxy.transparent.unknown_sessions import UnknownSessions
from mcp_proxy.transports.base import Transport, scoped, storage_for
from mcp_proxy.wire import cookies, headers, jsonrpc, revisions
from mcp_proxy.wire.handshake import INITIALIZE, INITIALIZED
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Batch, Message, Notification, Request, Response
from mcp_proxy.wire.urls import Target, is_endpoint, parse_target, request_target

log = logging.getLogger(__name__)

# The most attempts for a request while backends lose its session.
_ATTEMPTS = 3

# Where HTTP+SSE (2024-11-05) usually lives.
_SSE_PATHS = ("/sse", sse_sessions.MESSAGES_PATH)

# A client that is answered 200 here takes the server for one of the legacy era, for good.
_DISCOVER = "server/discover"

# Requests of 2026-07-28 that are answered by a standing stream.
_LISTENING = ("subscriptions/listen", "events/stream")

# Seconds between two attempts to reach the backend of a stream.
_PAUSE = 0.2

# Seconds for a backend that was too slow to take the cancellation.
_CANCEL_TIME = 1.0

_STOPPING = "The proxy has stopped before the server answered"


class Inbound(NamedTuple):
    """A client's request. `message` is None where the body has no JSON-RPC message.

    `until` is when it is given up, by the monotonic clock: None for what is answered.
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


class TransparentProxy(Transport):
    """A WSGI application in front of one or several HTTP MCP servers.

    `target_url` is one absolute URL or several; its path is that of the MCP endpoint. Without
    `session_storage` sessions are in memory. A session's record may name as its backend a target,
    an address that a target resolves to, or a URL in `allowed_backends`; `*` there, the default,
    allows all http(s) URLs. `verify` is passed to requests. Nothing starts before the first
    request; `close` ends everything that was started. The constructor raises ConfigError.
    """

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
        self._set_up(
            targets,
            manager,
            Edge(options),
            options,
            allowed_backends,
            verify,
            resolver,
            Workers(),
            Replica(),
        )

    @classmethod
    def _shared(
        cls,
        target_url: str | Sequence[str],
        manager: SessionManager,
        edge: Edge,
        options: ProxyOptions,
        allowed_backends: Sequence[str],
        verify: bool | str,
        workers: Workers,
        replica: Replica,
    ) -> Self:
        """A transport of an application, with the edge, threads and replica of the application."""
        transport = cls.__new__(cls)
        targets = as_targets(target_url)
        transport._set_up(
            targets, manager, edge, options, allowed_backends, verify, None, workers, replica
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
        workers: Workers,
        replica: Replica,
    ) -> None:
        self.options = options
        self.manager = manager
        self.edge = edge
        self._workers = workers
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
        self._unknown = UnknownSessions(self.balancer, calls, manager, edge.asks)
        self._warning = OnceAMinute()
        self._redirect_warning = OnceAMinute()
        self._affinity = SessionAffinity(
            targets[0],
            self.balancer,
            calls,
            manager,
            allowed_backends,
            replica,
            options.sticky_cookies,
            options.request_timeout,
        )
        self._sse = sse_sessions.SseSessions(
            manager, self._affinity, self.refresher, options.trusted_proxies
        )
        self._policy = HeaderPolicy(
            options.trusted_proxies, options.forward_headers, options.preserve_host
        )
        self._lock = threading.Lock()  # guards _calls
        self._calls: dict[HttpCall, bool] = {}  # running; whether each is a standing stream

    def __repr__(self) -> str:
        return f"<TransparentProxy calls={len(self._calls)} {self.balancer!r} {self.manager!r}>"

    # --- life ------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        with self._lock:
            return not all(self._calls.values())

    def end_streams(self) -> None:
        with self._lock:
            streams = [call for call, is_standing in self._calls.items() if is_standing]
        for call in streams:
            call.abort(Draining())

    def shut_down(self) -> None:
        """Aborts the running calls, stops the threads and closes idle connections."""
        self.refresher.stop()
        with self._lock:
            calls = dict(self._calls)
        for call, is_standing in calls.items():
            call.abort(Draining() if is_standing else BackendDraining(_STOPPING))
        self.disconnects.stop()
        self.reachability.stop()
        self.balancer.stop()
        self._client.close()

    def threads_reason(self) -> str | None:
        return self._workers.not_ready_reason()

    def server_reason(self) -> str | None:
        """Why every backend fails, None if one does not.

        Backends are asked for a connection only, by another thread.
        """
        return self.reachability.not_ready_reason(self.balancer.candidates(wait=0))

    # --- where a request goes --------------------------------------------------------------------

    def handle(self, request: ClientRequest) -> Reply:
        if "HTTP_SEC_FETCH_SITE" in request.environ:
            path = request.path
            is_ours = any(is_endpoint(target, None, path) for target in self._targets)
            if is_ours or path.rstrip("/") in _SSE_PATHS:
                require_own_site(request.environ)
        body = request.read_body(self.options.max_body_bytes)
        message = _message_in(request, body)
        inbound = Inbound(request, body, message)
        if not (message is None or isinstance(message, Request) or _has_request(message)):
            until = time.monotonic() + self.options.connect_timeout
            inbound = inbound._replace(until=until)
        if isinstance(inbound.message, (Request, Notification)):
            request.rpc, request.params = inbound.message.method, inbound.message.params
        is_discover = inbound.message is not None and request.rpc == _DISCOVER
        request.message = None if is_discover else inbound.message
        try:
            return self._dispatch(inbound)
        except ProxyError as error:
            error.request_id = inbound.id
            if error.kind and request.session_id is not None and request.rpc == INITIALIZED:
                self._affinity.unsent.keep(request.session_id, request.has_left)
            if is_discover:
                error.code = INTERNAL_ERROR
            raise

    def refuse(self, request: ClientRequest) -> Reply:
        """By a status where the answer to a POST is not read; nothing can be looked up here."""
        if request.method == "POST":
            message = jsonrpc.parse(request.read_body(self.options.max_body_bytes))
            if _has_request(message) and sse_sessions.may_name_session(request):
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
            if request.rpc in _LISTENING and inbound.id is not None:
                self.edge.require_open()
                inbound = inbound._replace(listens=True)
            return self._without_session(inbound)
        if request.method == "POST" and request.environ.get("QUERY_STRING"):
            carried = request.message
            if message is not None and _has_request(message):
                request.message = None  # the answer would leave on the session's stream instead
            session = self._sse.session_of(request)
            if session is not None:
                return self._in_sse_session(inbound, session)
            request.message = carried
        if isinstance(message, Request) and message.method == INITIALIZE:
            self.edge.require_open()
            return self._initialize(inbound, message)
        if request.session_id is None:
            return self._without_session(inbound)
        try:
            session = self.manager.load(request.session_id)
        except SessionUnknown as error:
            return self._in_unknown_session(inbound, request.session_id, error)
        return self._in_session(inbound, session)

    def _without_session(self, inbound: Inbound) -> Reply:
        """Sends a request to a target; nothing is looked up, stored or minted."""
        return self._reply(inbound, self._first_reached(inbound))

    def _first_reached(self, inbound: Inbound) -> HttpCall:
        """The call at the first backend that can be reached."""
        return self.balancer.first_reached(
            lambda address: self._call(inbound, Route(address, None))
        )

    def _in_sse_session(self, inbound: Inbound, session: Session) -> Reply:
        """Sends a message of 2024-11-05 to the backend that holds its session's stream.

        A request is tried for `connect_timeout` while that cannot be reached. The session ends with
        its stream alone: whoever holds that notices.
        """
        request = inbound.request
        target = self._sse.target_of(request, session)
        route = self._affinity.route(session)._replace(session_id=None)
        is_request = isinstance(inbound.message, Request)
        until = time.monotonic() + (self.options.connect_timeout if is_request else 0)
        while True:
            try:
                return self._reply(inbound, self._call(inbound, route, target))
            except BackendUnreached as error:
                if time.monotonic() >= until or request.has_left():
                    self.balancer.note_failure(route.address, error)
                    error.status = 503
                    error.headers = [("Retry-After", "1")]
                    raise
            time.sleep(_PAUSE)
            if self._sse.session_of(request) is None:
                raise SessionEnded

    def _initialize(self, inbound: Inbound, message: Request) -> Reply:
        call = self._first_reached(inbound)
        backend_sid = call.header(headers.SESSION_ID)
        if backend_sid is not None and not headers.FIELD_VALUE.fullmatch(backend_sid):
            backend_sid = None  # the client does not get it either
        if call.status >= 300 or backend_sid is None:
            return self._reply(inbound, call)
        with _closed_on_error(call):
            opened = handshake.opened(backend_sid, KIND, message, None)
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
        if inbound.request.method == "DELETE":
            return self._delete(inbound, session)
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
        failure: ProxyError = BackendUnreached("The server cannot be reached")
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
            with _closed_on_error(call):
                if is_lost_session(call):
                    raise SessionEnded
        return call

    def _delete(self, inbound: Inbound, session: Session) -> Reply:
        """Ends the session at its backend; one that cannot be reached has ended it already."""
        try:
            call = self._answer_in(inbound, session)
        except SessionEnded:
            self._affinity.forget(session.id)
            raise
        except RedirectRefused:
            raise  # the server is there, and has the session
        except BackendError:
            self._affinity.forget(session.id)
            return empty_reply(204)
        with _closed_on_error(call):
            if call.status < 300 or call.status == 404:
                self._affinity.forget(session.id)
        return self._reply(inbound, call, session)

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
        is_followed = False
        if target is None:
            path, query = raw_path(request.environ), request.environ.get("QUERY_STRING", "")
            target = request_target(self._target, route.address, path, query)
            is_followed = is_endpoint(self._target, route.address, path)
        call = HttpCall(self._client, route.address, request.method, target, outbound, inbound.body)
        return self._sent(inbound, call, is_followed)

    def _sent(self, inbound: Inbound, call: HttpCall, is_followed: bool) -> HttpCall:
        request = inbound.request
        is_standing = inbound.listens or (request.method == "GET" and request.accepts_stream)
        has_request = inbound.message is not None and inbound.until is None
        while True:
            self._track(call, is_standing)
            call.on_close(partial(self._untrack, call))
            with _closed_on_error(call):
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
        transform = reader.feed if reader is not None else None
        is_stream = call.media_type == headers.EVENT_STREAM
        with _closed_on_error(call):
            reply_headers = self._headers_for(inbound.request, call, session)
            if is_stream or (inbound.message is None and call.media_type != headers.JSON):
                call.limit_silence()  # a download, too, may take any time
            if is_stream and session is not None:
                call.on_close(self.refresher.hold(session.id))
            is_get = inbound.request.method == "GET"
            if is_get or inbound.listens:
                self._track(call, is_stream)
                inbound.request.is_standing = is_stream
            if is_stream and is_get:
                self._count_stream(call)
                rewriter = self._sse.rewriter(inbound.request, call)
                if rewriter is not None:
                    transform = rewriter.feed
            if is_stream and (is_get or inbound.listens):
                self._let_stand(inbound.request, call)
        if call.status >= 400:
            inbound.request.reason = "the server's own answer"
        if (whole := call.whole) is not None:
            call.close()
            if transform is not None:
                whole = transform(whole) + transform(b"")
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
        )
        return Reply(call.status, reply_headers, body)

    def _headers_for(
        self, request: ClientRequest, call: HttpCall, session: Session | None
    ) -> Headers:
        """The backend's headers as the client is to see them."""
        found = self._policy.inbound(call.headers, None if session is None else session.id)
        if "HTTP_ORIGIN" in request.environ:
            found = without_cors(found)  # the edge speaks for us
        if call.header("Location") is not None:
            mount = mount_of(request.environ, self.options.trusted_proxies)
            found = relocated(found, call, mount)
        return unbuffered(found) if call.media_type == headers.EVENT_STREAM else found

    def _count_stream(self, call: HttpCall) -> None:
        """Counts a standing stream until its call is closed; raises Overloaded."""
        self.edge.streams.acquire()
        call.on_close(self.edge.streams.release)

    def _let_stand(self, request: ClientRequest, call: HttpCall) -> None:
        """Lifts the read timeout of a standing stream; a client that is cut off is given up."""
        call.wait_for_ever()
        ClientConnection(request.environ).give_up_after(2 * self.options.keepalive_interval)


@contextlib.contextmanager
def _closed_on_error(call: HttpCall) -> Iterator[None]:
    """Closes a call whose answer will not reach the client."""
    try:
        yield
    except BaseException:
        call.close()
        raise


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
    if request.method != "POST" or not headers.is_json(request.content_type or ""):
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
    """Whether a request is of the stateless era: by its body if it has one, else by its header."""
    if request.method != "POST":
        return revisions.is_modern(request.protocol_version or "")
    if not isinstance(message, (Request, Notification)):
        return False
    try:
        version = message.meta.protocol_version
    except ClientError:
        return False
    return isinstance(version, str) and revisions.is_modern(version)


def _has_request(message: Message | Batch) -> bool:
    """Whether this is a request, or a batch with one."""
    parts = message if isinstance(message, list) else [message]
    return any(isinstance(part, Request) for part in parts)


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
