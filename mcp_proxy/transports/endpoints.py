"""Sessions of HTTP+SSE servers (MCP 2024-11-05) behind the transparent proxy.

Such a server names the URI for a client's messages in the first event of its stream. The session
that stands in it is recorded with the backend that holds the stream, and the URI is rewritten to
this proxy: so a message that reaches any replica goes to that backend. The stream is the session:
when it ends, however it does, the record goes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from mcp_proxy.backends.choosing import BackendChooser
from mcp_proxy.backends.http import HttpCall
from mcp_proxy.edge.forwarding import mount_of
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import SessionExists, SessionUnknown, StorageError
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.sessions.session import (
    BACKEND_HOST,
    BACKEND_SID,
    BACKEND_URL,
    Session,
    new_session,
)
from mcp_proxy.transports.keeping import SessionKeeper
from mcp_proxy.wire.endpoint import (
    OUR_PARAMETER,
    EndpointRewriter,
    local_uri,
    named_session,
    with_session,
)
from mcp_proxy.wire.headers import is_session_id
from mcp_proxy.wire.targets import Address

log = logging.getLogger(__name__)

KIND = "sse"


class EndpointSessions:
    """The HTTP+SSE sessions of one transport. Thread-safe."""

    def __init__(
        self,
        manager: SessionManager,
        chooser: BackendChooser,
        keeper: SessionKeeper,
        trusted: tuple[str, ...],
    ) -> None:
        self._manager = manager
        self._chooser = chooser
        self._keeper = keeper
        self._trusted = trusted

    def session_of(self, request: ClientRequest) -> Session | None:
        """The session that a message's URI names; None where it names none of ours.

        Raises SessionEnded for one whose stream is over, StorageUnavailable.
        """
        named = named_session(request.environ.get("QUERY_STRING", ""))
        if request.method != "POST" or named is None or not is_session_id(named[1]):
            return None
        try:
            session = self._manager.load(named[1])
        except SessionUnknown:
            return None  # the server may use a parameter of this name for something else
        return session if session.type == KIND else None

    def query_of(self, request: ClientRequest, session: Session) -> str:
        """The query of a message's URI as the backend named it."""
        query: str = request.environ.get("QUERY_STRING", "")
        named = named_session(query)
        own = session.metadata.get(BACKEND_SID, session.id)
        if named is None or own == named[1]:
            return query
        return with_session(query, named[0], own or None)

    def record(self, address: Address, theirs: str) -> Session:
        """A new session that is `theirs` at a backend; raises StorageError.

        An id that is taken, or none, or one that cannot be one here, gets one of our own.
        """
        place = {BACKEND_URL: address.url, BACKEND_HOST: address.name or address.host}
        if is_session_id(theirs):
            session = new_session(theirs, KIND, **place)
            with contextlib.suppress(SessionExists):
                self._manager.create(session)
                return self._opened(session, address)
        session = new_session(self._manager.mint_id(), KIND, **place, **{BACKEND_SID: theirs})
        self._manager.create(session)
        return self._opened(session, address)

    def _opened(self, session: Session, address: Address) -> Session:
        self._chooser.opened(session.id, address)
        return session

    def keep(self, session: Session) -> Callable[[], None]:
        """Keeps a session alive until what is returned is called."""
        return self._keeper.keep(session.id)

    def mount(self, request: ClientRequest) -> str:
        """The path under which the client sees this proxy."""
        return mount_of(request.environ, self._trusted)

    def end(self, session: Session) -> None:
        """The stream of a session is over; its record expires if the store is away."""
        self._chooser.closed(session.id)
        try:
            self._manager.end(session.id)
        except StorageError as error:
            log.warning("the record of a session is left: %s", error)


class EndpointStream:
    """One stream whose first event may open a session: kept alive while it lasts, then ended."""

    def __init__(self, sessions: EndpointSessions, request: ClientRequest, call: HttpCall) -> None:
        self._sessions = sessions
        self._request = request
        self._call = call
        self._session: Session | None = None
        self._release: Callable[[], None] = _nothing
        self.rewrite = EndpointRewriter(self._open).feed

    def close(self) -> None:
        """Ends the session, if there is one."""
        self._release()
        if self._session is not None:
            self._sessions.end(self._session)

    def _open(self, uri: str) -> str:
        """Records the session in `uri` and returns the URI on this proxy; raises StorageError."""
        address = self._call.address
        base = f"{address.scheme}://{address.host_header}{self._call.target}"
        # A server may also have believed what we told it about the client's own request.
        hosts = (address.url.partition("//")[2], self._request.environ.get("HTTP_HOST", ""))
        found = local_uri(base, uri, hosts)
        if found is None:
            log.warning("an endpoint event leads to another server; it is passed on as it is")
            return uri
        path, query = found
        parameter, theirs = named_session(query) or (OUR_PARAMETER, "")
        self._session = session = self._sessions.record(address, theirs)
        self._release = self._sessions.keep(session)
        query = with_session(query, parameter, session.id)
        return f"{self._sessions.mount(self._request)}{path}?{query}"


def _nothing() -> None:
    """There is no session to keep."""
