"""The backend of each session: recorded, looked up, and replaced if it is lost.

A session's record names its backend in `backend_url`; without a usable one the static target is
used. A backend that cannot be reached, or no longer knows the session, is replaced: one replica
(see `sessions.claims`) initializes a backend with the client's initialize request and the headers
of the request that noticed the loss. The client keeps its session id.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from mcp_proxy.edge.logs import OnceAMinute
from mcp_proxy.errors import (
    BackendError,
    BadAnswer,
    ClientError,
    SessionEnded,
    SessionExists,
    StorageError,
)
from mcp_proxy.replica import Replica, has_ended
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.handshake import UnsentInitialized
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import (
    BACKEND_HOST,
    BACKEND_SID,
    BACKEND_URL,
    CLAIM,
    COOKIES,
    INIT_BODY,
    LOST_AT,
    PROTOCOL_VERSION,
    UNSENT,
    Session,
)
from mcp_proxy.transparent.balancing import Balancer
from mcp_proxy.transparent.own_calls import OwnCalls, Watch, taken_along
from mcp_proxy.wire import cookies, headers, jsonrpc
from mcp_proxy.wire.handshake import INITIALIZE
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Request, Response
from mcp_proxy.wire.urls import Address, Target, ascii_host, parse_target

log = logging.getLogger(__name__)

#: The type of the records.
KIND = "mcp"

# A session that is lost twice within so many seconds may have several servers behind one address.
_LOST_AGAIN = 60.0

# How often such an address is asked, over another connection each time, whether it knows a session.
_PINGS = 3


class Route(NamedTuple):
    """The address for a request, and the backend's session id, None for none.

    Where the address is not usable the request goes elsewhere: it was left out, or its name has
    lost it. `cookies` are those of a balancer.
    """

    address: Address
    session_id: str | None
    is_usable: bool = True
    cookies: str | None = None


class _Initialized(NamedTuple):
    """A session that a backend has opened."""

    address: Address
    session_id: str | None
    version: str | None
    cookies: str


class SessionAffinity:
    """The backends of a transport's sessions. Thread-safe; raises StorageError.

    `allowed` are the URLs that a record may name besides the targets, `*` all. `replica` is who
    claims a session here, `sticky` are the names of cookies that a record keeps.
    """

    def __init__(
        self,
        target: Target,
        balancer: Balancer,
        calls: OwnCalls,
        manager: SessionManager,
        allowed: Sequence[str],
        replica: Replica,
        sticky: Sequence[str],
        request_timeout: float = claims.CLAIM_TIME,
    ) -> None:
        self._request_timeout = request_timeout
        self._sticky = sticky
        self._replica = replica
        self._target = target
        self._balancer = balancer
        self._calls = calls
        self._manager = manager
        self._allows_any = "*" in allowed
        self._allowed = {found.origin for url in allowed if (found := parse_target(url))}
        self._warning = OnceAMinute()
        self.unsent = UnsentInitialized(manager)

    # --- recorded --------------------------------------------------------------------------------

    def record(self, session: Session, address: Address, backend_sid: str) -> Session:
        """Stores a new session, whose id at its backend is `backend_sid`, and returns the record.

        An id that is taken (two backends that count from one) or malformed is replaced by one of
        our own.
        """
        where = {BACKEND_URL: address.backend_url, BACKEND_HOST: address.name}
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

        An answer that could not be read (it is compressed or too long) counts as acceptance. The
        client gets its answer whatever becomes of the record.
        """
        version = None if answer is None else jsonrpc.protocol_version_of(answer.result)
        try:
            if answer is not None and version is None:
                self.forget(session.id)
            elif version is not None:
                self._manager.swap(session, session.with_metadata(**{PROTOCOL_VERSION: version}))
        except StorageError as error:
            log.warning("the end of a handshake was not recorded: %s", error)

    def forget(self, session_id: str) -> None:
        """Ends the session in the balancer and the store."""
        self._balancer.remove(session_id)
        self._manager.end(session_id)

    def discard(
        self,
        address: Address,
        session_id: str | None,
        request_headers: Mapping[str, str],
        sticky: str | None,
    ) -> None:
        """Ends a session at its backend that no record names; `sticky` are a balancer's cookies."""
        if session_id is None:
            return
        given = _within(taken_along(request_headers), session_id, None, sticky)
        try:
            self._calls.end(address, given, session_id)
        except BackendError as error:
            log.info("an unused session was not ended at its backend: %s", error)

    # --- looked up -------------------------------------------------------------------------------

    def route(self, session: Session) -> Route:
        """The route of the session's requests; the session counts as used."""
        session_id = session.metadata.get(BACKEND_SID, session.id) or None
        address = self._backend_of(session)
        if address is None:
            address = self._target.address
            has_moved = self._balancer.has_name(session.metadata.get(BACKEND_HOST))
            is_usable = self._balancer.touch(session.id, address) and not has_moved
            return Route(address, session_id, is_usable)
        is_usable = self._balancer.touch(session.id, address)
        return Route(address, session_id, is_usable, session.metadata.get(COOKIES))

    def _backend_of(self, session: Session) -> Address | None:
        """The address that the record names, None where the static target serves."""
        url = session.metadata.get(BACKEND_URL)
        if url is None:
            return None
        return self.allowed(url, session.metadata.get(BACKEND_HOST))

    def allowed(self, url: str, name: str | None) -> Address | None:
        """The address that a record names, None where it cannot be read or may not be asked."""
        backend = parse_target(url)
        if backend is None or (name is not None and ascii_host(name) != name):
            log.warning("a recorded backend cannot be read, and is not used")
            return None
        if self._allows_any or backend.origin in self._allowed or self._balancer.knows(backend):
            return self._balancer.address_of(backend, name)
        log.warning("a recorded backend is not an allowed one, and is not used")
        return None

    def move(self, session: Session, address: Address) -> None:
        """Records that the session is known at another address.

        A record that is claimed, or has changed, stays: the next request may find out again.
        """
        if CLAIM in session.metadata:
            return
        where = {BACKEND_URL: address.backend_url, BACKEND_HOST: address.name}
        try:
            if self._manager.swap(session, session.with_metadata(**where)):
                self._balancer.add(session.id, address)
        except StorageError as error:  # the request was served all the same
            log.warning("a session's new address was not recorded: %s", error)

    def send_initialized(
        self, session: Session, route: Route, request_headers: Mapping[str, str], watch: Watch
    ) -> None:
        """Sends the backend the `notifications/initialized` that did not reach it."""
        version = session.metadata.get(PROTOCOL_VERSION)
        given = _within(taken_along(request_headers), route.session_id, version, route.cookies)
        self._calls.waited_for(watch).send_initialized(route.address, given)
        self.unsent.sent(session)

    def follow_cookies(self, session: Session, received: Headers) -> None:
        """Records the balancer's cookies in an answer; another change of the record wins."""
        before = session.metadata.get(COOKIES, "")
        found = cookies.kept(before, received, self._sticky, time.time())
        if found == before or CLAIM in session.metadata:
            return
        try:
            self._manager.swap(session, session.with_metadata(**{COOKIES: found or None}))
        except StorageError as error:  # the request was served all the same
            log.warning("a balancer's cookie was not recorded: %s", error)

    def is_modern_now(
        self, session: Session, route: Route, request_headers: Mapping[str, str], watch: Watch
    ) -> bool:
        """Whether a server of 2026-07-28 alone has taken the place of a session's backend.

        It refuses a ping, as legacy servers without `ping` do, and says that it is one.
        """
        if route.session_id is None:
            return False
        calls, given = self._calls.waited_for(watch), taken_along(request_headers)
        version = session.metadata.get(PROTOCOL_VERSION)
        within = _within(given, route.session_id, version, route.cookies)
        try:
            answer = calls.ping(route.address, within, route.session_id)
        except BackendError:  # nothing says so
            return False
        outside = _within(given, None, None, route.cookies)
        return answer.may_know_no_sessions and calls.is_modern(route.address, outside)

    # --- initialized again -----------------------------------------------------------------------

    def reinitialize(
        self,
        session: Session,
        request_headers: Mapping[str, str],
        timeout: float | None = None,
        has_left: Callable[[], bool] | None = None,
        watch: Watch | None = None,
    ) -> Session:
        """The session's record after its backend was replaced, by this caller or a faster one.

        `timeout` in seconds is for each step, where it is to be shorter than usual; a claim of
        somebody else is waited for as long, else for the time limit of a request, unless `has_left`
        or `watch` says that the client has left: then ClientLeft is raised, the claim given back.

        Raises SessionEnded when the session has ended or cannot be initialized again, BackendError
        when no backend could be initialized now.
        """
        limit = self._request_timeout if timeout is None else timeout
        own = self._replica.id
        claimed = claims.claim(self._manager, session, own, has_ended, has_left, limit)
        if claimed is None:
            return self._manager.load(session.id)
        with claims.released_on_failure(self._manager, claimed):
            settled = self._replace(
                claimed, request_headers, timeout, self._calls.waited_for(watch)
            )
        if settled is None:
            current = self._manager.load(claimed.id)
            return claims.unclaimed(self._manager, current, has_ended, has_left, limit)
        return settled

    def _replace(
        self,
        claimed: Session,
        request_headers: Mapping[str, str],
        timeout: float | None,
        calls: OwnCalls,
    ) -> Session | None:
        body = claimed.metadata.get(INIT_BODY, "").encode("utf-8", "replace")
        if not _is_initialize(body):
            self._manager.end(claimed.id)
            raise SessionEnded
        given = taken_along(request_headers)
        if self._is_shared_address(claimed, given, calls):
            self._manager.end(claimed.id)
            raise SessionEnded
        try:
            new = self._initialized_by_one(body, given, timeout, calls)
        except SessionEnded:
            self._manager.end(claimed.id)
            raise
        if claimed.metadata.get(PROTOCOL_VERSION, new.version) != new.version:
            # The client would go on in a revision that this server does not speak.
            self._manager.end(claimed.id)
            self.discard(new.address, new.session_id, given, new.cookies)
            raise SessionEnded
        return self._settle(claimed, new, given)

    def _settle(
        self, claimed: Session, new: _Initialized, given: Mapping[str, str]
    ) -> Session | None:
        """The record with the new backend; None where another replica has claimed it meanwhile."""
        result: dict[str, str | None] = {
            BACKEND_URL: new.address.backend_url,
            BACKEND_HOST: new.address.name,
            BACKEND_SID: new.session_id or "",
            LOST_AT: f"{time.time():.3f}",
            UNSENT: None,
            COOKIES: new.cookies or None,
        }
        if not claims.settle(self._manager, claimed, **result):
            # The session has ended meanwhile, or another replica claimed it after our deadline.
            self.discard(new.address, new.session_id, given, new.cookies)
            return None
        self._balancer.add(claimed.id, new.address)
        log.info("a session was initialized again at %s", new.address.url)
        return self._manager.load(claimed.id)

    def _is_shared_address(
        self, claimed: Session, given: Mapping[str, str], calls: OwnCalls
    ) -> bool:
        """Whether a session that is lost again so soon is known behind the same address after all.

        A server that was started anew twice has really forgotten it. Where several servers share an
        address and no sessions, other connections lead to one that knows it.
        """
        lost_at = float(claimed.metadata.get(LOST_AT, "-inf"))
        session_id = claimed.metadata.get(BACKEND_SID, claimed.id)
        address = self._backend_of(claimed)
        if abs(time.time() - lost_at) > _LOST_AGAIN or not session_id or address is None:
            return False
        version = claimed.metadata.get(PROTOCOL_VERSION)
        within = _within(given, session_id, version, None)
        if not any(_knows(calls, address, within, session_id) for _ in range(_PINGS)):
            return False
        if self._warning.is_due():
            log.warning(
                "a session was lost twice within a minute at %s, and is known there all the same: "
                "one address seems to stand for several servers that share no sessions; use a "
                "headless Service, or a balancer that is sticky",
                address.url,
            )
        return True

    def _initialized_by_one(
        self, body: bytes, given: Mapping[str, str], timeout: float | None, calls: OwnCalls
    ) -> _Initialized:
        """The first backend that can be reached and knows sessions has opened one: in a rolling
        update some may be of 2026-07-28 already.

        Raises SessionEnded where all are, BackendError where another one could not be had.
        """
        modern: set[Address] = set()

        def initialize(address: Address) -> _Initialized | None:
            opened = self._initialize(address, body, given, timeout, calls)
            if opened is None:
                modern.add(address)
            return opened

        while not modern.issuperset(self._balancer.backends()):
            opened = self._balancer.first_reached(initialize, modern.__contains__)
            if opened is not None:
                return opened
        raise SessionEnded

    def _initialize(
        self,
        address: Address,
        body: bytes,
        given: Mapping[str, str],
        timeout: float | None,
        calls: OwnCalls,
    ) -> _Initialized | None:
        """A session that a backend has opened, None where it is of 2026-07-28 alone."""
        answer = calls.ask(address, given, body, timeout)
        response = answer.response
        if answer.status >= 300 or response is None or not answer.has_result:
            if answer.may_know_no_sessions and calls.is_modern(address, given):
                return None
            raise BadAnswer(f"The server refused to be initialized again (status {answer.status})")
        version = jsonrpc.protocol_version_of(response.result)
        if not headers.FIELD_VALUE.fullmatch(f"{version}{answer.session_id}"):
            raise BadAnswer("The server answered with a session id or version that cannot be sent")
        sticky = cookies.kept("", answer.headers, self._sticky, time.time())
        given = _within(given, answer.session_id, version, sticky)
        calls.send_initialized(answer.address, given, timeout)
        return _Initialized(answer.address, answer.session_id, version, sticky)


def _knows(calls: OwnCalls, address: Address, given: Mapping[str, str], session_id: str) -> bool:
    """Whether a backend knows a session, asked over a connection of its own."""
    try:
        answer = calls.ping(address, given, session_id, is_fresh=True)
    except BackendError:
        return False
    return answer.response is not None and not answer.is_lost


def _within(
    given: Mapping[str, str], session_id: str | None, version: str | None, sticky: str | None
) -> dict[str, str]:
    """Headers for a message in a session."""
    cookie = cookies.sent_with(given.get("Cookie"), sticky) if sticky else None
    named = {headers.SESSION_ID: session_id, headers.PROTOCOL_VERSION: version, "Cookie": cookie}
    return {**given, **{name: value for name, value in named.items() if value is not None}}


def _is_initialize(body: bytes) -> bool:
    """Whether this is a request that a backend can be sent."""
    try:
        message = jsonrpc.parse_message(body)
    except ClientError:
        return False
    return isinstance(message, Request) and message.method == INITIALIZE
