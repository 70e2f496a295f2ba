"""Where client and HTTP server are of different eras: what the server refuses goes over a bridge.

Bytes pass as long as the eras agree. A request of one era that a server of the other has refused,
and so has not executed, is answered by what serves stdio servers, with a conversation over HTTP in
the place of a process (`backends/upstream.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from msgspec import Raw

from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.backends.owned import called_by
from mcp_proxy.backends.upstream import Upstreams
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.forwarded import HeaderPolicy
from mcp_proxy.edge.reply import Reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    HEADER_MISMATCH,
    METHOD_NOT_FOUND,
    MISSING_CAPABILITY,
    UNSUPPORTED_REVISION,
    BackendError,
    BackendUnreached,
    BadAnswer,
    ProxyError,
)
from mcp_proxy.ownership.homes import SHARED
from mcp_proxy.ownership.owner import Owner, ReplicaParts
from mcp_proxy.servers import HttpServer
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import Session
from mcp_proxy.transparent.balancing import Balancer
from mcp_proxy.transparent.forwarding import error_in
from mcp_proxy.transparent.own_calls import taken_along
from mcp_proxy.transports import stateless
from mcp_proxy.transports.streamable import KIND, StreamableProxy
from mcp_proxy.wire import headers, modern, results, revisions
from mcp_proxy.wire.jsonrpc import Batch, Message, Notification, Request
from mcp_proxy.wire.tools import ToolFilter
from mcp_proxy.wire.urls import Address, Target, request_target

log = logging.getLogger(__name__)

#: Seconds for which it is remembered that a server refuses the requests of an era.
REMEMBERED = 600.0

# Seconds for which a modern server is not asked again why it refuses what it does.
_REMEMBERED_MODERN = 60.0

# The largest refusal that is read, in bytes.
_MAX_REFUSAL = 64 * 1024

# Statuses by which a server says that it does not know a request of the other era. It has not asked
# for authorization, or for another pace, which would be the client's to give.
_REFUSALS = frozenset({400, 404, 405, 406, 415, 422})

# What only a modern server answers.
_MODERN = frozenset({HEADER_MISMATCH, MISSING_CAPABILITY, UNSUPPORTED_REVISION})


# Which backends a new conversation is for; where none of these can be reached any may have it.
_is_meant: ContextVar[Callable[[Address], bool]] = ContextVar("is_meant", default=lambda _: True)


@contextmanager
def _meant_for(is_meant: Callable[[Address], bool]) -> Iterator[None]:
    token = _is_meant.set(is_meant)
    try:
        yield
    finally:
        _is_meant.reset(token)


class _Refusing:
    """The backends that are known to refuse something, each for a time of its own.

    Thread-safe: the table is replaced, never changed.
    """

    def __init__(self) -> None:
        self._until: Mapping[Address, float] = {}  # by the monotonic clock

    def __bool__(self) -> bool:
        return bool(self._until)

    def has(self, address: Address) -> bool:
        """Whether a backend is one of them."""
        until = self._until.get(address)
        return until is not None and time.monotonic() < until

    def note(self, call: HttpCall, seconds: float) -> None:
        """The backend of a call is one of them, and so is where it has redirected to."""
        now = time.monotonic()
        kept = {address: until for address, until in self._until.items() if now < until}
        self._until = {**kept, **dict.fromkeys((call.tried, call.address), now + seconds)}

    def clear(self) -> None:
        """None is any more."""
        self._until = {}


class _Link:
    """The way from a conversation to the backends of one transport."""

    def __init__(
        self, client: HttpClient, target: Target, balancer: Balancer, options: ProxyOptions
    ) -> None:
        self.client = client
        self.timeout = options.request_timeout
        self.sticky_cookies = options.sticky_cookies
        self._target = target
        self._balancer = balancer

    def address(self) -> Address:
        """The backend that is to be tried first: one that is meant, if it can be reached."""
        candidates, is_meant = self._balancer.candidates(), _is_meant.get()
        meant = (a for a in candidates if is_meant(a) and self._balancer.is_usable(a))
        return next(meant, candidates[0])

    def target(self, address: Address) -> str:
        """Path and query of the MCP endpoint."""
        return request_target(self._target, address, "/mcp", "")

    def note_failure(self, address: Address, error: BackendUnreached) -> None:
        """A backend could not be reached."""
        self._balancer.note_failure(address, error)


class EraBridge:
    """The bridge of one transport, for clients of either era. Thread-safe.

    Its sessions have records of their own type, in the store of the transport.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        target: Target,
        client: HttpClient,
        balancer: Balancer,
        policy: HeaderPolicy,
        manager: SessionManager,
        parts: ReplicaParts,
        edge: Edge,
        options: ProxyOptions,
        tools: ToolFilter | None = None,
    ) -> None:
        self._balancer = balancer
        link = _Link(client, target, balancer, options)
        self._upstreams = Upstreams(link, parts.workers)
        self._policy = policy
        self._name = target.address.url  # a path or query may have a secret in it
        server = HttpServer(self._name, urls, tools=tools)
        owner = Owner(server, manager, parts, options, self._upstreams)
        self.front = StreamableProxy._shared(owner, edge, options)
        self.front.rate_limit = None  # what comes here has been counted
        self._legacy = _Refusing()  # modern requests
        self._modern = _Refusing()  # initialize
        self._unbridged = _Refusing()  # the bridge, too, or modern requests for other reasons

    def __repr__(self) -> str:
        return f"<EraBridge {self.front!r}>"

    def close(self) -> None:
        """Ends every conversation."""
        self.front.stateless.close()
        self.front.owner.close()
        self._upstreams.close()

    # --- what goes over it -----------------------------------------------------------------------

    def has(self, session: Session) -> bool:
        """Whether a session, or what is none for a client, is served over the bridge."""
        return session.type in (KIND, SHARED)

    def takes_modern(self, request: ClientRequest, message: Request | Notification) -> bool:
        """Whether a modern message goes over the bridge at once.

        No backend is known to take it, or what it belongs to has begun over the bridge.
        """
        if not self._legacy:
            return False
        if self.front.stateless.is_modern:  # there are other servers than there were
            self._legacy.clear()
            return False
        backends = self._balancer.backends()
        legacy = list(filter(self._legacy.has, backends))
        if len(legacy) == len(backends):
            return True
        if not any(map(self._balancer.is_usable, legacy)) or isinstance(message, Notification):
            return False
        try:
            with called_by(self._headers_of(request)):
                return self.front.stateless.has_begun(request, message)
        except ProxyError:  # the server will say what is wrong
            return False

    def is_legacy(self, address: Address) -> bool:
        """Whether a backend is known to refuse modern requests."""
        return self._legacy.has(address)

    def is_modern(self, address: Address) -> bool:
        """Whether a backend is known to refuse initialize."""
        return self._modern.has(address)

    def takes_initialize(self) -> bool:
        """Whether every backend is known to refuse initialize."""
        return bool(self._modern) and all(map(self._modern.has, self._balancer.backends()))

    def is_refusal_of_modern(self, call: HttpCall) -> bool:
        """Whether an answer says that its server does not know the modern era.

        The body has been read then, and can be read once more.
        """
        if call.status not in _REFUSALS or self._unbridged.has(call.tried):
            return False
        error = _error_of(call)
        code = None if error is None else results.code_of(error)
        if error is not None and code == UNSUPPORTED_REVISION:
            named = results.supported_in(error)
            return bool(named) and not any(map(revisions.is_modern, named))
        return code not in _MODERN and not (call.status == 404 and code == METHOD_NOT_FOUND)

    def may_know_no_sessions(self, call: HttpCall) -> bool:
        """Whether an answer is how servers of 2026-07-28 alone refuse initialize, and whatever else
        says nothing of itself; a legacy one may have another reason for the same.

        The body has been read then, and can be read once more.
        """
        is_error_in_200 = call.status == 200 and call.whole is not None
        if call.status not in _REFUSALS and not is_error_in_200:
            return False
        error = _error_of(call)
        if error is None or results.code_of(error) not in modern.NO_HANDSHAKE:
            return False
        named = results.supported_in(error)
        return not named or any(map(revisions.is_modern, named))

    # --- answers ---------------------------------------------------------------------------------

    def answer(self, request: ClientRequest, message: Message | Batch) -> Reply:
        """The answer to a POST; raises ProxyError."""
        is_modern = isinstance(message, (Request, Notification)) and stateless.is_modern(
            request, message
        )
        meant = self._legacy if is_modern else self._modern
        with called_by(self._headers_of(request)), _meant_for(meant.has):
            return self.front.answer(request, message)

    def serve(self, request: ClientRequest) -> Reply:
        """The answer to a GET or DELETE; raises ProxyError."""
        with called_by(self._headers_of(request)), _meant_for(self._modern.has):
            return self.front.serve(request)

    def is_for_others(self, request: ClientRequest, message: Request, call: HttpCall) -> bool:
        """Whether a modern request that a backend has refused is for others: those that are not
        known to refuse such requests, or the bridge where there are none.

        Otherwise the backend had another reason, or does not take the bridge either. Raises
        ProxyError.
        """
        its = (call.tried, call.address)
        others = [a for a in self._balancer.backends() if a not in its and not self.is_legacy(a)]
        try:
            with called_by(self._headers_of(request)), _meant_for(lambda a: a in its):
                is_modern = self.front.stateless.is_for_modern(request, message, not others)
        except BackendError as error:
            log.info("[%s] refuses requests of 2026-07-28, and no bridge: %s", self._name, error)
            if isinstance(error, BadAnswer):  # else it may be away, and come back
                self._unbridged.note(call, REMEMBERED)
            return False
        if is_modern:  # it had another reason
            self._unbridged.note(call, _REMEMBERED_MODERN)
            return False
        if not self._legacy:
            log.info("[%s] requests of 2026-07-28 go over a bridge", self._name)
        self._legacy.note(call, REMEMBERED)
        return True

    def answer_initialize(
        self, request: ClientRequest, message: Request, call: HttpCall | None = None
    ) -> Reply | None:
        """The answer to an initialize that no backend takes, or that of a call has refused.

        None where the bridge is refused, too.
        """
        is_meant = self.is_modern if call is None else lambda a: a in (call.tried, call.address)
        try:
            with called_by(self._headers_of(request)), _meant_for(is_meant):
                reply = self.front.answer(request, message)
        except BackendError as error:
            log.info("[%s] refuses initialize and is not bridged: %s", self._name, error)
            self._modern.clear()
            return None
        if headers.SESSION_ID in {name for name, _ in reply.headers}:
            if not self._modern:
                log.info("[%s] speaks 2026-07-28 alone: sessions go over a bridge", self._name)
            if call is not None:
                self._modern.note(call, REMEMBERED)
            return reply
        if not isinstance(reply.body, bytes):
            reply.body.close()
        self._modern.clear()
        return None

    def on_behalf_of(self, request: ClientRequest) -> AbstractContextManager[None]:
        """Has what is done meanwhile be done for whoever has sent a request."""
        return called_by(self._headers_of(request))

    def _headers_of(self, request: ClientRequest) -> Mapping[str, str]:
        return taken_along(self._policy.outbound(request.environ))


def _error_of(call: HttpCall) -> Raw | None:
    """The JSON-RPC error in an answer, None where there is none."""
    body = call.read_ahead(_MAX_REFUSAL) if call.media_type == headers.JSON else None
    return None if body is None else error_in(body)
