"""A reverse proxy for MCP servers that speak HTTP themselves, with session-sticky routing.

Bytes pass as they are. What is looked at: whether a POST is an initialize, and the era of its
`_meta`; the session id; the answer to an initialize. What happens then: an initialize chooses a
backend and records it, a request with a session id goes where the record says, on every replica,
and everything else, modern requests (2026-07-28) above all, goes to the target without a look-up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.disconnects import ClientConnection, Departures
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.forwarded import Forwarding, raw_path
from mcp_proxy.edge.reply import Reply, empty_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    ClientLeft,
    ConfigError,
    Draining,
    ProxyError,
    SessionEnded,
)
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.sessions.refresh import SessionKeeper
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import Session
from mcp_proxy.transparent import forwarding as passing
from mcp_proxy.transparent.balancing import BackendChooser, Resolver, resolve
from mcp_proxy.transparent.proxy_class import cancellation_of, is_lost_session, is_modern, peek
from mcp_proxy.transparent.proxy_open import OpenBodies
from mcp_proxy.transparent.session_affinity import HANDSHAKE_TIME, Pinning, Route, Router
from mcp_proxy.transparent.sse_sessions import EndpointSessions, kept_back, unbuffered
from mcp_proxy.transports import handshake
from mcp_proxy.transports.base import Transport
from mcp_proxy.wire import headers
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Batch, Message, Notification, Request
from mcp_proxy.wire.urls import parse_target

# How often a request is sent, at the most, while the backends of its session get lost.
_ATTEMPTS = 3

# Seconds for a backend that was too slow to take notice of that.
_CANCEL_TIME = 1.0


class TransparentProxy(Transport):
    """A WSGI application in front of one or several HTTP MCP servers.

    `target_url` is an absolute URL, or several; a path in it is where the MCP endpoint lives.
    Without `session_storage` sessions live in memory. A session's record may name any http(s) URL
    as its backend unless `allowed_backends` says otherwise: the targets and the addresses they
    resolve to are always allowed, and the URLs in it; `*` allows all. `verify` is requests' own.
    Nothing starts before the first request; `close` ends everything that did.
    """

    def __init__(
        self,
        target_url: str | Sequence[str],
        session_storage: Storage | None = None,
        settings: ProxyConfig | None = None,
        *,
        allowed_backends: Sequence[str] = ("*",),
        resolver: Resolver = resolve,
        verify: bool | str = True,
        manager: SessionManager | None = None,
        edge: Edge | None = None,
    ) -> None:
        self.settings = settings or ProxyConfig()
        urls = [target_url] if isinstance(target_url, str) else list(target_url)
        targets = [target for url in urls if (target := parse_target(url)) is not None]
        if not urls or len(targets) < len(urls):
            raise ConfigError("target_url takes absolute http:// or https:// URLs")
        self.manager = manager or SessionManager(
            session_storage, self.settings.session_ttl, self.settings.unknown_session_status
        )
        self.edge = edge or Edge(self.settings)
        ttl = getattr(self.manager.storage, "ttl", self.settings.session_ttl)
        self.chooser = BackendChooser(targets, ttl, resolver)
        self.departures = Departures()
        self.keeper = SessionKeeper(self.manager, ttl)
        self._open = OpenBodies()
        self._client = HttpClient(self.settings.connect_timeout, self.settings.threads, verify)
        self._router = Router(
            targets[0],
            self.chooser,
            self._client,
            self.manager,
            allowed_backends,
            min(self.settings.request_timeout, HANDSHAKE_TIME),
        )
        self._pinning = Pinning(self.manager, self.chooser)
        self._endpoints = EndpointSessions(
            self.manager, self.chooser, self.keeper, self.settings.trusted_proxies
        )
        self._forwarding = Forwarding(self.settings.trusted_proxies, self.settings.forward_headers)

    def __repr__(self) -> str:
        return f"<TransparentProxy {self.chooser!r} {self.manager!r}>"

    def close(self) -> None:
        """Closes idle connections and ends the threads."""
        self.shut_down()

    @property
    def is_busy(self) -> bool:
        return self._open.calls > 0

    def end_streams(self) -> None:
        self._open.end_streams()

    def shut_down(self) -> None:
        """Ends what runs: nobody will read the rest."""
        self.keeper.close()
        self._open.end_all()
        self._client.close()

    def trouble(self) -> str | None:
        """Why no backend can be reached, None if one can: they are asked for a connection only."""
        failures = []
        for address in self.chooser.candidates():
            failure = self._client.probe(address)
            if failure is None:
                return None
            failures.append(failure)
        return "; ".join(failures)

    def handle(self, request: ClientRequest) -> Reply:
        body = request.read_body(self.settings.max_body_bytes)
        message = peek(request, body)
        if isinstance(message, (Request, Notification)):
            request.rpc = message.method
        try:
            return self._handle(request, body, message)
        except ProxyError as error:
            error.request_id = message.id if isinstance(message, Request) else None
            raise

    def _handle(
        self, request: ClientRequest, body: bytes, message: Message | Batch | None
    ) -> Reply:
        if request.method == "GET" and request.accepts(headers.EVENT_STREAM):
            self.edge.require_open()  # a standing stream, which would outlast the drain
        if is_modern(request, message):
            return self._without_session(request, body, message)
        pinned = self._endpoints.session_of(request)
        if pinned is not None:
            return self._to_endpoint(request, body, message, pinned)
        if isinstance(message, Request) and message.method == handshake.INITIALIZE:
            self.edge.require_open()
            return self._initialize(request, body, message)
        if request.session_id is not None:
            return self._in_session(request, body, message, self.manager.load(request.session_id))
        return self._without_session(request, body, message)

    # --- without a session -----------------------------------------------------------------------

    def _without_session(
        self, request: ClientRequest, body: bytes, message: Message | Batch | None
    ) -> Reply:
        """To a target, in turn; nothing is looked up, stored or minted."""
        call = self._first_reached(request, body)
        return self._reply(request, call, message)

    def _first_reached(self, request: ClientRequest, body: bytes) -> HttpCall:
        """The call at the first backend that can be reached."""
        failure: BackendError = BackendLost("No backend is configured")
        for address in self.chooser.candidates():
            try:
                with self.chooser.opening(address):
                    return self._call(request, body, Route(address, None, None))
            except BackendUnreached as error:
                failure = error
        raise failure

    def _to_endpoint(
        self,
        request: ClientRequest,
        body: bytes,
        message: Message | Batch | None,
        session: Session,
    ) -> Reply:
        """A message of 2024-11-05, to the backend that holds its session's stream."""
        target = self._endpoints.target_of(request, session)
        route = self._router.route(session)._replace(session_id=None)
        try:
            return self._reply(request, self._call(request, body, route, target=target), message)
        except BackendUnreached as error:
            self._endpoints.end(session)  # it was its stream's, and that is gone with the backend
            raise SessionEnded from error

    # --- initialize ------------------------------------------------------------------------------

    def _initialize(self, request: ClientRequest, body: bytes, message: Request) -> Reply:
        call = self._first_reached(request, body)
        session_id = call.header(headers.SESSION_ID)
        if call.status >= 300 or session_id is None:
            return self._reply(request, call, message)
        try:
            session = self._pinning.record(call.address, session_id, message)
            request.session = session.id
        except BaseException:
            call.close()
            raise
        observer = passing.InitializeObserver(
            call, lambda answer: self._pinning.accept(session, answer)
        )
        return self._reply(request, call, message, session, observer)

    # --- in a session ----------------------------------------------------------------------------

    def _in_session(
        self,
        request: ClientRequest,
        body: bytes,
        message: Message | Batch | None,
        session: Session,
    ) -> Reply:
        self.chooser.used(session.id)
        if request.method == "DELETE":
            return self._delete(request, body, session)
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._attempt(request, body, message, session)
            except (BackendUnreached, SessionEnded):
                session = self._bring_back(request, session)
            except BackendLost:
                # It may have been executed. If the backend is gone, the next request will find out;
                # if it lives, so does the session. Only a stream is harmless to ask for again.
                if request.method != "GET":
                    raise
        try:
            return self._attempt(request, body, message, session)
        except SessionEnded:
            self._pinning.forget(session.id)  # nobody keeps it: the client had better begin anew
            raise

    def _attempt(
        self,
        request: ClientRequest,
        body: bytes,
        message: Message | Batch | None,
        session: Session,
    ) -> Reply:
        """The backend's answer; raises SessionEnded where that does not know the session."""
        try:
            call = self._call(request, body, self._router.route(session))
        except BackendTimeout:
            self._cancel(request, session, message)
            raise
        explanation = passing.explanation_of(call)
        if explanation is None:
            return self._reply(request, call, message, session)
        if is_lost_session(call.status, explanation):
            raise SessionEnded
        return Reply(call.status, self._inbound(call, session), explanation)

    def _bring_back(self, request: ClientRequest, session: Session) -> Session:
        return self._router.bring_back(session, self._forwarding.outbound(request.environ))

    def _delete(self, request: ClientRequest, body: bytes, session: Session) -> Reply:
        """Ends the session where it is; a backend that is gone has ended it already."""
        try:
            call = self._call(request, body, self._router.route(session))
        except BackendError:
            self._pinning.forget(session.id)
            return empty_reply(204)
        if call.status < 300 or call.status == 404:
            self._pinning.forget(session.id)
        return self._reply(request, call, None, session)

    def _cancel(
        self, request: ClientRequest, session: Session | None, message: Message | Batch | None
    ) -> None:
        """Tells the backend that nobody waits for an answer any more."""
        if session is None or not isinstance(message, Request):
            return
        route = self._router.route(session)
        with contextlib.suppress(ProxyError):  # it will find out
            self._call(request, cancellation_of(message), route, _CANCEL_TIME).close()

    # --- one call --------------------------------------------------------------------------------

    def _call(
        self,
        request: ClientRequest,
        body: bytes,
        route: Route,
        limit: float | None = None,
        target: str | None = None,
    ) -> HttpCall:
        """The call, answered as far as its headers, redirects followed; raises BackendError."""
        unwanted = kept_back(request) | {"mcp-session-id"}
        outbound = [
            (name, value)
            for name, value in self._forwarding.outbound(request.environ)
            if name.lower() not in unwanted
        ]
        if route.session_id is not None:
            outbound.append((headers.SESSION_ID, route.session_id))
        if target is None:
            query = request.environ.get("QUERY_STRING", "")
            target = self._router.target_of(route, raw_path(request.environ), query)
        call = HttpCall(self._client, route.address, request.method, target, outbound, body)
        return self._sent(request, call, limit)

    def _sent(self, request: ClientRequest, call: HttpCall, limit: float | None) -> HttpCall:
        """`limit` is for what goes on when the client has left."""
        connection = ClientConnection(request.environ)
        is_standing = request.method == "GET" and request.accepts(headers.EVENT_STREAM)
        while True:
            forget = self.departures.watch(connection, call.abort) if limit is None else _nothing
            done = self._open.add(call, is_standing)
            try:
                call.send(limit or self.settings.request_timeout)
            except ProxyError as error:
                call.close()
                if isinstance(error, ClientLeft) and not connection.has_left():
                    raise Draining from error  # it was us who gave up
                raise
            finally:
                forget()
                done()
            successor = call.redirected()
            if successor is None:
                return call
            call.close()
            call = successor

    def _reply(
        self,
        request: ClientRequest,
        call: HttpCall,
        message: Message | Batch | None,
        session: Session | None = None,
        observer: passing.InitializeObserver | None = None,
    ) -> Reply:
        """The backend's answer for the client, from its headers on."""
        is_standing = request.method == "GET" and passing.is_event_stream(call)
        stream = self._endpoints.stream(request, call)
        body = passing.PassingBody(
            call,
            request_id=message.id if isinstance(message, Request) else None,
            observe=observer or _unobserved,
            on_timeout=lambda: self._cancel(request, session, message),
            rewrite=stream.rewrite if stream is not None else _unchanged,
        )
        if is_standing:
            body.on_close(self._slot(call))
            call.wait_for_ever()
        if stream is not None:
            body.on_close(stream.close)
        if session is not None and passing.is_event_stream(call):
            body.on_close(self.keeper.keep(session.id))
        connection = ClientConnection(request.environ)
        if is_standing:
            connection.give_up_after(2 * self.settings.keepalive_interval)
        body.on_close(self.departures.watch(connection, body.leave))
        body.on_close(self._open.add(body, is_standing))
        passed = self._inbound(call, session)
        return Reply(call.status, passed if stream is None else unbuffered(passed), body)

    def _slot(self, call: HttpCall) -> Callable[[], None]:
        """Takes a place for a standing stream and returns what gives it back."""
        try:
            self.edge.slots.take()
        except BaseException:
            call.close()
            raise
        return self.edge.slots.release

    def _inbound(self, call: HttpCall, session: Session | None) -> Headers:
        """The response's headers; the client sees no id of a session but its own."""
        passed = self._forwarding.inbound(call.headers)
        if session is None:
            return passed
        return [(n, session.id if n.lower() == "mcp-session-id" else v) for n, v in passed]


def _unchanged(piece: bytes) -> bytes:
    return piece


def _unobserved(piece: bytes) -> None:
    """Nobody wants to know what passes."""


def _nothing() -> None:
    """There is nothing to end."""
