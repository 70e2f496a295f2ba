"""The backend of each session: recorded, looked up, and replaced if it is lost.

A session's record names its backend in `backend_url`; without a usable one the static target is
used. A backend that cannot be reached, or no longer knows the session, is replaced: one replica
(see `sessions.claims`) initializes a backend with the client's initialize request and the headers
of the request that noticed the loss. The client keeps its session id.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.errors import BackendError, BadAnswer, ClientError, SessionEnded, SessionExists
from mcp_proxy.replica import Replica, has_ended
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
from mcp_proxy.transparent.balancing import Balancer
from mcp_proxy.transparent.forwarding import InitializeReader
from mcp_proxy.wire import headers, jsonrpc
from mcp_proxy.wire.handshake import INITIALIZE, INITIALIZED
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.urls import Address, Target, ascii_host, parse_target, request_target

log = logging.getLogger(__name__)

#: Seconds for each step of a handshake, so that all of them fit well into a claim.
HANDSHAKE_TIME = claims.CLAIM_TIME / 6

_INITIALIZED = jsonrpc.encode(Notification(INITIALIZED))

# Request headers that belong to one session or body, and those that we set ourselves, since we read
# the answer.
_NOT_TAKEN_ALONG = frozenset(
    {
        "Mcp-Session-Id",
        "Mcp-Protocol-Version",
        "Last-Event-Id",
        "Accept",
        "Accept-Encoding",
        "Content-Type",
        "Content-Encoding",
    }
)
_OURS = {"Accept": f"{headers.JSON}, {headers.EVENT_STREAM}", "Content-Type": headers.JSON}


class Route(NamedTuple):
    """The address for a request, and the backend's session id, None for none.

    `backend` is the target that the session's record names, None for the static target.
    """

    address: Address
    backend: Target | None
    session_id: str | None


class _Initialized(NamedTuple):
    """A session that a backend has opened."""

    address: Address
    session_id: str | None
    version: str | None


class SessionAffinity:
    """The backends of a transport's sessions. Thread-safe; raises StorageError.

    `allowed` are the URLs that a record may name besides the targets, `*` all; `timeout`, in
    seconds, is for each step of a handshake. `replica` is who claims a session here.
    """

    def __init__(
        self,
        target: Target,
        balancer: Balancer,
        client: HttpClient,
        manager: SessionManager,
        allowed: Sequence[str],
        timeout: float,
        replica: Replica,
    ) -> None:
        self._replica = replica
        self._target = target
        self._balancer = balancer
        self._client = client
        self._manager = manager
        self._allows_any = "*" in allowed
        self._allowed = {found.origin for url in allowed if (found := parse_target(url))}
        self._timeout = timeout

    # --- recorded --------------------------------------------------------------------------------

    def record(self, session: Session, address: Address, backend_sid: str) -> Session:
        """Stores a new session, whose id at its backend is `backend_sid`, and returns the record.

        An id that is taken (two backends that count from one) or malformed is replaced by one of
        our own.
        """
        where = {BACKEND_URL: address.url, BACKEND_HOST: address.name}
        session = session.with_metadata(**where)
        if not headers.is_session_id(session.id) or not self._is_created(session):
            session = msgspec.structs.replace(session, id=self._manager.mint_id())
            session = session.with_metadata(**{BACKEND_SID: backend_sid})
            self._manager.create(session)
        self._balancer.add(session.id, address)
        return session

    def _is_created(self, session: Session) -> bool:
        try:
            self._manager.create(session)
        except SessionExists:
            return False
        return True

    def complete(self, session: Session, answer: Response | None) -> None:
        """Adds the protocol version to the record, or ends the session if the server refused.

        An answer that could not be read (it is compressed or too long) counts as acceptance.
        """
        version = None if answer is None else jsonrpc.protocol_version_of(answer.result)
        if answer is not None and version is None:
            self.forget(session.id)
        elif version is not None:
            self._manager.swap(session, session.with_metadata(**{PROTOCOL_VERSION: version}))

    def forget(self, session_id: str) -> None:
        """Ends the session in the balancer and the store."""
        self._balancer.remove(session_id)
        self._manager.end(session_id)

    # --- looked up -------------------------------------------------------------------------------

    def route(self, session: Session) -> Route:
        """The route of the session's requests; the session counts as used."""
        self._balancer.touch(session.id)
        session_id = session.metadata.get(BACKEND_SID, session.id) or None
        backend = self._backend_of(session)
        if backend is None:
            return Route(self._target.address, None, session_id)
        name = session.metadata.get(BACKEND_HOST)
        return Route(Address(backend.scheme, backend.host, backend.port, name), backend, session_id)

    def _backend_of(self, session: Session) -> Target | None:
        url = session.metadata.get(BACKEND_URL)
        if url is None:
            return None
        backend, name = parse_target(url), session.metadata.get(BACKEND_HOST)
        if backend is None or (name is not None and ascii_host(name) != name):
            log.warning("a session's backend cannot be read; using the static target")
            return None
        if self._allows_any or backend.origin in self._allowed or self._balancer.knows(backend):
            return backend
        log.warning("a session's backend_url is not an allowed backend; using the static target")
        return None

    # --- initialized again -----------------------------------------------------------------------

    def reinitialize(self, session: Session, request_headers: Mapping[str, str]) -> Session:
        """The session's record after its backend was replaced, by this caller or a faster one.

        Raises SessionEnded when the session has ended or cannot be initialized again, BackendError
        when no backend could be initialized now.
        """
        claimed = claims.claim(self._manager, session, self._replica.id, has_ended)
        if claimed is None:
            return self._manager.load(session.id)
        with claims.released_on_failure(self._manager, claimed):
            return self._replace(claimed, request_headers)

    def _replace(self, claimed: Session, request_headers: Mapping[str, str]) -> Session:
        body = claimed.metadata.get(INIT_BODY, "").encode("utf-8", "replace")
        if not _is_initialize(body):
            self._manager.end(claimed.id)
            raise SessionEnded
        kept = {n: v for n, v in request_headers.items() if n.title() not in _NOT_TAKEN_ALONG}
        given = {**kept, **_OURS}
        new = self._balancer.first_reached(lambda address: self._initialize(address, body, given))
        if claimed.metadata.get(PROTOCOL_VERSION, new.version) != new.version:
            # The client would go on in a revision that this server does not speak.
            self._manager.end(claimed.id)
            self._discard(new, given)
            raise SessionEnded
        return self._settle(claimed, new, given)

    def _settle(self, claimed: Session, new: _Initialized, given: Mapping[str, str]) -> Session:
        result = {
            BACKEND_URL: new.address.url,
            BACKEND_HOST: new.address.name,
            BACKEND_SID: new.session_id or "",
        }
        if not claims.settle(self._manager, claimed, **result):
            # The session has ended meanwhile, or another replica claimed it after our deadline.
            self._discard(new, given)
            return claims.unclaimed(self._manager, self._manager.load(claimed.id), has_ended)
        self._balancer.add(claimed.id, new.address)
        log.info("a session was initialized again at %s", new.address.url)
        return self._manager.load(claimed.id)

    def _initialize(self, address: Address, body: bytes, given: Mapping[str, str]) -> _Initialized:
        call = self._send(address, "POST", given, body)
        try:
            answer = _answer_of(call)
        finally:
            call.close()
        if call.status >= 300 or answer is None or answer.result is UNSET:
            raise BadAnswer(f"The server refused to be initialized again (status {call.status})")
        version = jsonrpc.protocol_version_of(answer.result)
        session_id = call.header(headers.SESSION_ID)
        if not headers.FIELD_VALUE.fullmatch(f"{version}{session_id}"):
            raise BadAnswer("The server answered with a session id or version that cannot be sent")
        named = {headers.SESSION_ID: session_id, headers.PROTOCOL_VERSION: version}
        given = {**given, **{name: value for name, value in named.items() if value is not None}}
        self._send(address, "POST", given, _INITIALIZED).close()
        return _Initialized(address, session_id, version)

    def _discard(self, new: _Initialized, given: Mapping[str, str]) -> None:
        """Ends a backend's session that is not used."""
        if new.session_id is None:
            return
        try:
            self._send(new.address, "DELETE", {**given, headers.SESSION_ID: new.session_id}).close()
        except BackendError as error:
            log.info("an unused session was not ended at its backend: %s", error)

    def _send(
        self, address: Address, method: str, given: Mapping[str, str], body: bytes = b""
    ) -> HttpCall:
        target = request_target(self._target, None, "/mcp", "")
        call = HttpCall(self._client, address, method, target, given, body)
        call.send(self._timeout)
        while (successor := call.redirected()) is not None:
            call.close()
            call = successor
            call.send(self._timeout)
        return call


def _is_initialize(body: bytes) -> bool:
    """Whether this is a request that a backend can be sent."""
    try:
        message = jsonrpc.parse_message(body)
    except ClientError:
        return False
    return isinstance(message, Request) and message.method == INITIALIZE


def _answer_of(call: HttpCall) -> Response | None:
    """The response to an initialize, as soon as it arrives; None where the body has none."""
    answers: list[Response | None] = []
    reader = InitializeReader(call.media_type, answers.append)
    for piece in call.pieces():
        reader.feed(piece)
        if answers:
            break
    return answers[0] if answers else None
