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

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.edge.forwarded import is_trusted_peer, mount_of, raw_path
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import SessionExists, SessionUnknown, StorageError
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.sessions.refresh import SessionKeeper
from mcp_proxy.storage.session import (
    BACKEND_HOST,
    BACKEND_SID,
    BACKEND_URL,
    Session,
    new_session,
)
from mcp_proxy.transparent import forwarding as passing
from mcp_proxy.transparent.balancing import BackendChooser
from mcp_proxy.wire import headers, revisions
from mcp_proxy.wire.endpoint_event import (
    OUR_PARAMETER,
    EndpointRewriter,
    Named,
    local_uri,
    named_session,
    with_session,
)
from mcp_proxy.wire.headers import Headers, is_session_id
from mcp_proxy.wire.urls import Address, parse_target

log = logging.getLogger(__name__)

KIND = "sse"

# Of what a client says: the first would hide the event from us, and who believes the other
# names a URI that has our mount already.
_KEPT_BACK = frozenset({"accept-encoding", "x-forwarded-prefix"})

_BUFFERING = ("X-Accel-Buffering", "no")


def kept_back(request: ClientRequest) -> frozenset[str]:
    """The headers, in lower case, that a backend must not get if this is to be such a stream."""
    is_asked_for = _may_begin(request) and request.accepts(headers.EVENT_STREAM)
    return _KEPT_BACK if is_asked_for else frozenset()


def unbuffered(passed: Headers) -> Headers:
    """The headers of such a stream with a word to nginx, which would hold its events back."""
    if any(name.lower() == _BUFFERING[0].lower() for name, _ in passed):
        return passed
    return [*passed, _BUFFERING]


def _may_begin(request: ClientRequest) -> bool:
    """Whether an answer may be such a stream: a GET of a later revision names its session."""
    is_modern = revisions.is_modern(request.protocol_version or "")
    return request.method == "GET" and request.session_id is None and not is_modern


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

    def stream(self, request: ClientRequest, call: HttpCall) -> EndpointStream | None:
        """What looks at an answer that may be such a stream; None for any other."""
        if not _may_begin(request) or not passing.is_open_stream(call):
            return None
        return EndpointStream(self, request, call)

    def session_of(self, request: ClientRequest) -> Session | None:
        """The session that a message's URI names; None where it names none of ours.

        Raises SessionEnded for one whose stream is over, StorageUnavailable.
        """
        named = named_session(_query(request)) if request.method == "POST" else None
        if named is None or not is_session_id(named.id):
            return None
        try:
            session = self._manager.load(named.id)
        except SessionUnknown:
            return None  # the server may use a parameter of this name for something else
        if session.type != KIND or parse_target(session.backend_url or "") is None:
            return None  # another transport's over the same manager
        self._chooser.used(session.id)
        request.session = session.id
        return session

    def target_of(self, request: ClientRequest, session: Session) -> str:
        """Path and query of a message's URI as the backend named it."""
        path, query = raw_path(request.environ) or "/", _query(request)
        named, theirs = named_session(query), session.metadata.get(BACKEND_SID)
        if named is not None and theirs is not None:
            is_added = named.parameter == OUR_PARAMETER and not theirs
            query = with_session(query, named.parameter, None if is_added else theirs)
        return f"{path}?{query}" if query else path

    def record(self, address: Address, theirs: Named) -> Session:
        """A new session that is `theirs` at a backend; raises StorageError.

        An id that is taken, or none, or one that cannot be one here, gets one of our own.
        """
        place = {BACKEND_URL: address.url}
        if address.name is not None:
            place[BACKEND_HOST] = address.name
        if is_session_id(theirs.id):
            session = new_session(theirs.id, KIND, **place)
            with contextlib.suppress(SessionExists):
                self._manager.create(session)
                return self._opened(session, address)
        place[BACKEND_SID] = theirs.value
        session = new_session(self._manager.mint_id(), KIND, **place)
        self._manager.create(session)
        return self._opened(session, address)

    def _opened(self, session: Session, address: Address) -> Session:
        self._chooser.opened(session.id, address)
        return session

    def keep(self, session: Session) -> Callable[[], None]:
        """Keeps a session alive until what is returned is called."""
        return self._keeper.keep(session.id)

    def mounted(self, request: ClientRequest, path: str) -> str:
        """A path as the client sees it."""
        mount = mount_of(request.environ, self._trusted)
        if not mount and path.startswith("//"):
            return f"/.{path}"  # RFC 3986 section 3.3: two slashes would begin with a host
        return mount + path

    def hosts(self, request: ClientRequest) -> list[str]:
        """What the client calls us: a server may have believed what it was told of that."""
        said = [request.header("Host") or ""]
        if is_trusted_peer(request.environ, self._trusted):
            said += (request.header("X-Forwarded-Host") or "").split(",")
        return [host.strip() for host in said if host.strip()]

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
        hosts = [address.url.partition("//")[2], *self._sessions.hosts(self._request)]
        found = local_uri(base, uri, hosts)
        if found is None:
            log.warning("an endpoint event leads to another server; it is passed on as it is")
            return uri
        path, query = found
        named = named_session(query) or Named(OUR_PARAMETER, "")
        self._session = session = self._sessions.record(address, named)
        self._request.session = session.id
        self._release = self._sessions.keep(session)
        if BACKEND_SID in session.metadata:
            query = with_session(query, named.parameter, session.id)
        return f"{self._sessions.mounted(self._request, path)}?{query}"


def _query(request: ClientRequest) -> str:
    query: str = request.environ.get("QUERY_STRING", "")
    return query


def _nothing() -> None:
    """There is no session to keep."""
