"""Sessions of HTTP+SSE servers (MCP 2024-11-05) behind the transparent proxy.

Such a server names the URI for a client's messages in the first event of its stream. The session in
that URI is recorded with the backend that holds the stream, and the URI is rewritten to this proxy,
so that a message to any replica reaches that backend. The stream is the session: when the stream
ends for any reason, the record is deleted. Its bytes are the backend's, so a request that fails is
told by the status of its POST: whether an event of ours may stand there, only its worker knows.
"""

from __future__ import annotations

import logging
import time

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.edge.forwarded import is_trusted_peer, mount_of, raw_path
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import SessionUnknown, StorageError
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.sessions.refresh import SessionRefresher
from mcp_proxy.storage.session import BACKEND_SID, Session, new_session
from mcp_proxy.transparent.forwarding import is_open_stream
from mcp_proxy.transparent.session_affinity import SessionAffinity
from mcp_proxy.wire import revisions
from mcp_proxy.wire.endpoint_event import (
    MAX_EVENT,
    OUR_PARAMETER,
    EndpointRewriter,
    Named,
    local_uri,
    named_session,
    with_session,
)
from mcp_proxy.wire.headers import is_session_id
from mcp_proxy.wire.urls import parse_target

log = logging.getLogger(__name__)

KIND = "sse"

#: Where clients usually POST their messages.
MESSAGES_PATH = "/messages"

# Seconds that the head of a stream waits for its first event, which such a server sends at once,
# and between two looks at the clock.
_FIRST_EVENT = 1.0
_PULSE = 0.1

# A compressed event could not be read, and a server that believes the prefix would put our mount
# into the URI itself.
_WITHHELD = ("Accept-Encoding", "X-Forwarded-Prefix")


def withhold(request: ClientRequest, outbound: dict[str, str]) -> None:
    """Removes the headers that a backend must not get with a request for such a stream."""
    if _may_begin(request) and request.accepts_stream:
        for name in _WITHHELD:
            outbound.pop(name, None)


def may_name_session(request: ClientRequest) -> bool:
    """Whether a POST may be a message in such a session, so far as its URI says."""
    if request.session_id is not None:
        return False
    is_usual = request.path.rstrip("/") == MESSAGES_PATH
    return is_usual or named_session(_query(request)) is not None


def names_session(request: ClientRequest) -> bool:
    """Whether the URI of a request names a session."""
    return named_session(_query(request)) is not None


def name_session(request: ClientRequest) -> str | None:
    """The session that the URI of a message names, for the log as well; None where it names none.

    Whether there is such a session is not known.
    """
    named = named_session(_query(request))
    if named is None or not is_session_id(named.id):
        return None
    request.session = named.id
    return named.id


def _may_begin(request: ClientRequest) -> bool:
    """Whether an answer may be such a stream: a GET without a session id, not of modern era."""
    is_modern = revisions.is_modern(request.protocol_version or "")
    return request.method == "GET" and request.session_id is None and not is_modern


class SseSessions:
    """The HTTP+SSE sessions of one transport. Thread-safe."""

    def __init__(
        self,
        manager: SessionManager,
        affinity: SessionAffinity,
        refresher: SessionRefresher,
        trusted: tuple[str, ...],
    ) -> None:
        self._manager = manager
        self._affinity = affinity
        self._refresher = refresher
        self._trusted = trusted

    def session_of(self, request: ClientRequest) -> Session | None:
        """The session that the URI of a POST names; None where it names none of ours.

        Raises SessionEnded for one whose stream has ended, StorageUnavailable.
        """
        session_id = name_session(request)
        if session_id is None:
            return None
        try:
            session = self._manager.load(session_id)
            self._manager.require_own(session, request.principal_name)
        except SessionUnknown:
            session = None  # the server may use a parameter of this name for something else
        if session is not None and session.type == KIND and parse_target(session.backend_url or ""):
            return session
        request.session = request.session_id  # else one of another transport, with the same manager
        return None

    def target_of(self, request: ClientRequest, session: Session) -> str:
        """Path and query of a message's URI as the backend named it."""
        path, query = raw_path(request.environ) or "/", _query(request)
        named, theirs = named_session(query), session.metadata.get(BACKEND_SID)
        if named is not None and theirs is not None:
            is_added = named.parameter == OUR_PARAMETER and not theirs
            query = with_session(query, named.parameter, None if is_added else theirs)
        return f"{path}?{query}" if query else path

    def rewriter(self, request: ClientRequest, call: HttpCall) -> EndpointRewriter | None:
        """The rewriter for an answer that may be such a stream; None for any other.

        The session that its first event opens is kept alive until the call is closed, then ended.
        """
        if not _may_begin(request) or not is_open_stream(call):
            return None
        return EndpointRewriter(lambda uri: self._opened(request, call, uri))

    def begin(self, call: HttpCall, rewriter: EndpointRewriter) -> bytes:
        """The rewritten bytes of a stream up to its first event, for which the head waits a second:
        by then it is known whether there is a session.

        Raises StorageError, with the one status that clients of this wire understand, and as
        `HttpCall.pieces` does.
        """
        first = b""
        until = time.monotonic() + _FIRST_EVENT
        try:
            for piece in call.pieces(_PULSE):
                first += rewriter.feed(piece) if piece else b""
                if rewriter.is_done or len(first) > MAX_EVENT or time.monotonic() >= until:
                    break
        except StorageError as error:
            error.status = 503
            error.headers = error.headers or [("Retry-After", "1")]
            raise
        return first

    def end(self, session: Session) -> None:
        """Ends a session whose stream has ended; if the store is down, its record expires."""
        try:
            self._affinity.forget(session.id)
        except StorageError as error:
            log.warning("the record of an ended session was not deleted: %s", error)

    def _opened(self, request: ClientRequest, call: HttpCall, uri: str) -> str:
        """Records the session in `uri` and returns the URI on this proxy; raises StorageError."""
        address = call.address
        base = f"{address.scheme}://{address.host_header}{call.target}"
        hosts = [address.url.partition("//")[2], call.host, *self._hosts(request)]
        found = local_uri(base, uri, hosts)
        if found is None:
            log.warning("an endpoint event names another server; it is forwarded unchanged")
            return uri
        path, query = found
        named = named_session(query) or Named(OUR_PARAMETER, "")
        binding = self._manager.binding(request.principal_name)
        session = new_session(named.id, KIND, **binding)
        session = self._affinity.record(session, address, named.value)
        call.on_close(lambda: self.end(session))
        call.on_close(self._refresher.hold(session.id))
        request.session = session.id
        if BACKEND_SID in session.metadata:
            query = with_session(query, named.parameter, session.id)
        return f"{self._mounted(request, path)}?{query}"

    def _mounted(self, request: ClientRequest, path: str) -> str:
        """A path as the client sees it."""
        mount = mount_of(request.environ, self._trusted)
        if not mount and path.startswith("//"):
            return f"/.{path}"  # RFC 3986 section 3.3: a leading `//` would name a host
        return mount + path

    def _hosts(self, request: ClientRequest) -> list[str]:
        """The hosts in the client's request: a server may have built its URI from one of them."""
        hosts = [request.header("Host") or ""]
        if is_trusted_peer(request.environ, self._trusted):
            hosts += (request.header("X-Forwarded-Host") or "").split(",")
        return [host.strip() for host in hosts if host.strip()]


def _query(request: ClientRequest) -> str:
    query: str = request.environ.get("QUERY_STRING", "")
    return query
