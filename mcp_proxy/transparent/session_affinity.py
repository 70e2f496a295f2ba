"""Where the requests of a session go, and how a session is brought back when its backend lost it.

A session's record names its backend in `backend_url`; a record that names none, or none that can be
used, falls back to the static target. A backend that is gone, or does not know the session any
more, is replaced by a new one that is initialized as the client once did: by one replica only (see
`sessions.claims`), with the headers of the request that noticed it. The client keeps its id.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from msgspec import UNSET

from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.errors import (
    BackendError,
    BackendLost,
    BackendUnreached,
    SessionEnded,
    SessionExists,
)
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import (
    BACKEND_HOST,
    BACKEND_SID,
    BACKEND_URL,
    INIT_BODY,
    PROTOCOL_VERSION,
    Session,
)
from mcp_proxy.transparent.balancing import BackendChooser
from mcp_proxy.transparent.forwarding import InitializeObserver
from mcp_proxy.transports import handshake
from mcp_proxy.wire import headers, jsonrpc
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.urls import Address, Target, parse_target, request_target

log = logging.getLogger(__name__)

#: Seconds that a backend has for each step of a handshake: all of them well within a claim.
HANDSHAKE_TIME = claims.CLAIM_TIME / 6

_INITIALIZED = jsonrpc.encode(Notification("notifications/initialized"))

# What a request cannot take along into another session.
_OF_THE_OLD_SESSION = frozenset({"mcp-session-id", "last-event-id", "mcp-protocol-version"})

# What we read ourselves has to be readable, and says what it accepts itself.
_OURS = frozenset({"accept", "accept-encoding", "content-type", "content-encoding"})


class Route(NamedTuple):
    """Where a request goes, and under which session id; None: without one."""

    address: Address
    backend: Target | None
    session_id: str | None


class Router:
    """Routes of one transport. `allowed` are URLs that a record may name, `*` all. Thread-safe."""

    def __init__(
        self,
        static: Target,
        chooser: BackendChooser,
        client: HttpClient,
        manager: SessionManager,
        allowed: Sequence[str],
        timeout: float,
    ) -> None:
        self.static = static
        self._chooser = chooser
        self._client = client
        self._manager = manager
        self._allows_any = "*" in allowed
        self._allowed = {_place(target) for url in allowed if (target := parse_target(url))}
        self._timeout = timeout

    def route(self, session: Session) -> Route:
        """Where this session's requests go."""
        session_id = session.metadata.get(BACKEND_SID, session.id) or None
        target = self._backend(session)
        if target is None:
            return Route(self.static.address, None, session_id)
        address = target.address._replace(name=session.metadata.get(BACKEND_HOST))
        return Route(address, target, session_id)

    def _backend(self, session: Session) -> Target | None:
        if session.backend_url is None:
            return None
        target = parse_target(session.backend_url)
        if target is None:
            log.warning("a session's backend_url cannot be read; using the static target")
            return None
        is_listed = self._allows_any or _place(target) in self._allowed
        if is_listed or self._chooser.knows(target):
            return target
        log.warning("a session's backend_url is not an allowed backend; using the static target")
        return None

    def target_of(self, route: Route, path: str, query: str) -> str:
        """Path and query of a request, as the backend of `route` is to see them."""
        return request_target(self.static, route.backend, path, query)

    # --- bringing a session back -----------------------------------------------------------------

    def bring_back(self, session: Session, request_headers: Headers) -> Session:
        """The session's record with a backend that knows it, made by us or by somebody faster.

        Raises SessionEnded when the session is over or cannot be initialized again, BackendError
        when no backend can be had now.
        """
        claimed = claims.claim(self._manager, session)
        if claimed is None:
            return self._manager.load(session.id)
        body = claimed.metadata.get(INIT_BODY)
        if body is None:
            self._manager.end(session.id)
            raise SessionEnded
        try:
            address, session_id, version = self._initialize(body.encode(), request_headers)
        except BackendError:
            claims.release(self._manager, claimed)
            raise
        if claimed.metadata.get(PROTOCOL_VERSION, version) != version:
            # The client would go on in a revision that this server does not speak.
            self._manager.end(claimed.id)
            self._discard(address, session_id, request_headers)
            raise SessionEnded
        return self._settle(claimed, address, session_id, request_headers)

    def _settle(
        self, claimed: Session, address: Address, session_id: str | None, request_headers: Headers
    ) -> Session:
        result = {
            BACKEND_URL: address.url,
            BACKEND_HOST: address.name,
            BACKEND_SID: session_id or "",
        }
        if not claims.settle(self._manager, claimed, **result):
            # Ended meanwhile, or taken over by somebody who thought us dead.
            self._discard(address, session_id, request_headers)
            return claims.unclaimed(self._manager, self._manager.load(claimed.id))
        self._chooser.opened(claimed.id, address)
        log.info("a session was initialized again at %s", address.url)
        return self._manager.load(claimed.id)

    def _initialize(
        self, body: bytes, request_headers: Headers
    ) -> tuple[Address, str | None, str | None]:
        """A backend that has accepted the handshake, its id for the session, and the revision."""
        failure: BackendError = BackendLost("No backend is configured")
        for address in self._chooser.candidates():
            try:
                with self._chooser.opening(address):
                    return address, *self._handshake(address, body, request_headers)
            except BackendUnreached as error:
                failure = error
        raise failure

    def _handshake(
        self, address: Address, body: bytes, request_headers: Headers
    ) -> tuple[str | None, str | None]:
        call = self._post(address, body, request_headers)
        try:
            answer = _answer_of(call)
        finally:
            call.close()
        if call.status >= 300 or answer is None or answer.result is UNSET:
            raise BackendLost(f"The server refused to be initialized again (status {call.status})")
        version = jsonrpc.protocol_version_of(answer.result)
        session_id = call.header(headers.SESSION_ID)
        ours = [(headers.SESSION_ID, session_id), (headers.PROTOCOL_VERSION, version)]
        given = [(name, value) for name, value in ours if value is not None]
        self._post(address, _INITIALIZED, request_headers, given).close()
        return session_id, version

    def _discard(self, address: Address, session_id: str | None, request_headers: Headers) -> None:
        """Ends a backend's session that nobody will use."""
        if session_id is None:
            return
        target = request_target(self.static, None, "/mcp", "")
        given = [*_without_session(request_headers), (headers.SESSION_ID, session_id)]
        call = HttpCall(self._client, address, "DELETE", target, given, b"")
        try:
            call.send(self._timeout)
        except BackendError as error:
            log.info("the session of a deleted session was not ended at its backend: %s", error)
        finally:
            call.close()

    def _post(
        self, address: Address, body: bytes, request_headers: Headers, ours: Headers | None = None
    ) -> HttpCall:
        target = request_target(self.static, None, "/mcp", "")
        given = [(n, v) for n, v in _without_session(request_headers) if n.lower() not in _OURS]
        given += [("Accept", f"{headers.JSON}, {headers.EVENT_STREAM}")]
        given += [("Content-Type", headers.JSON), *(ours or ())]
        call = HttpCall(self._client, address, "POST", target, given, body)
        call.send(self._timeout)
        return call


def _answer_of(call: HttpCall) -> Response | None:
    """The response to an initialize, as soon as it is there."""
    answers: list[Response | None] = []
    observe = InitializeObserver(call, answers.append)
    for piece in call.pieces():
        observe(piece)
        if answers:
            break
    return answers[0] if answers else None


def _place(target: Target) -> tuple[str, str, int]:
    return target.scheme, target.host, target.port


def _without_session(request_headers: Headers) -> Headers:
    return [(n, v) for n, v in request_headers if n.lower() not in _OF_THE_OLD_SESSION]


# --- pinning: The record of a session that an HTTP backend has opened: it is pinned to that backend.

KIND = "mcp"


class Pinning:
    """Writes, completes and drops records. Thread-safe; raises StorageError."""

    def __init__(self, manager: SessionManager, chooser: BackendChooser) -> None:
        self._manager = manager
        self._chooser = chooser

    def record(self, address: Address, session_id: str, message: Request) -> Session:
        """The session's record, before the client can use its id.

        A backend's id that another session has already (two backends that count from one) is given
        to the client under an id of our own.
        """
        place = {BACKEND_URL: address.url, BACKEND_HOST: address.name}
        session = handshake.opened(session_id, KIND, message, None).with_metadata(**place)
        try:
            self._manager.create(session)
        except SessionExists:
            minted = handshake.opened(self._manager.mint_id(), KIND, message, None)
            session = minted.with_metadata(**place, **{BACKEND_SID: session_id})
            self._manager.create(session)
        self._chooser.opened(session.id, address)
        return session

    def accept(self, session: Session, answer: Response | None) -> None:
        """Completes the record, or drops it when the server said no.

        An answer that could not be read (it is compressed, or enormous) has opened the session.
        """
        version = None if answer is None else jsonrpc.protocol_version_of(answer.result)
        if answer is not None and version is None:
            self.forget(session.id)
        elif version is not None:
            self._manager.swap(session, session.with_metadata(**{PROTOCOL_VERSION: version}))

    def forget(self, session_id: str) -> None:
        """The session is over."""
        self._manager.end(session_id)
        self._chooser.closed(session_id)
