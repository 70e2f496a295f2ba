"""The errors of this project, each with the HTTP status and the JSON-RPC code of its response.

One place, `mcp_proxy.edge.edge`, turns them into responses. JSON-RPC codes: -32700 to -32603 are
JSON-RPC 2.0 section 5.1; -32000 and -32001 are the codes that MCP clients know from legacy servers.
Codes -32020 to -32022 prove a modern (2026-07-28) server to a client, which falls back to
`initialize` without such a proof: only a request of that era is ever answered by one.

An error that is not the client's fault has a kind, which the header `X-MCP-Proxy-Error` names. A
POST that carries a request is then answered 200, unless the setting `failure_status` is `http`:
the status of such an error is that on GET and DELETE.
"""

from __future__ import annotations

from collections.abc import Sequence

RequestId = int | str

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
PROXY_ERROR = -32000
SESSION_NOT_FOUND = -32001
HEADER_MISMATCH = -32020
MISSING_CAPABILITY = -32021
UNSUPPORTED_REVISION = -32022


def in_seconds(number: float) -> str:
    """A time in a sentence: `1 second`, `2.5 seconds`."""
    return f"{number:g} second{'' if number == 1 else 's'}"


class ProxyError(Exception):
    """The base class: HTTP status, JSON-RPC code, and a message for the client.

    `kind` is empty where the client is at fault, or has left, or nothing failed. `request_id` is
    the id of the JSON-RPC request that is answered by this error, None where there is none;
    `headers` are added to the HTTP response. `data` is what the JSON-RPC error says beyond its
    message, anything that can be JSON; None for nothing.
    """

    status = 500
    code = INTERNAL_ERROR
    kind = "internal-error"
    sentence = "Internal error"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.sentence)
        self.request_id: RequestId | None = None
        self.headers: list[tuple[str, str]] = []
        self.data: object | None = None

    @property
    def message(self) -> str:
        """The sentence that the client reads."""
        return str(self)


class Passed(Exception):
    """Another worker of this machine has the request, with its connection: nobody answers here.

    It is no error.
    """


class ConfigError(ProxyError):
    """The configuration contradicts itself or cannot be served; the message says what to change."""


class ClientError(ProxyError):
    """The client's request is invalid or not supported."""

    status = 400
    code = INVALID_REQUEST
    kind = ""


class ParseError(ClientError):
    """The body is not JSON (RFC 8259) or not UTF-8."""

    code = PARSE_ERROR


class InvalidRequest(ClientError):
    """The body is JSON but no JSON-RPC 2.0 message that MCP allows, or a header is wrong."""


class InvalidParams(ClientError):
    """The params of a request lack what its method needs, or have it in a wrong type."""

    code = INVALID_PARAMS


class UnknownTool(InvalidParams):
    """A tool is called that there is not, or that is hidden (MCP 2025-11-25, tools, "Error
    Handling").
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"Unknown tool: {name}")


class MethodNotFound(ClientError):
    """The method does not exist, or no longer does, in the revision of the request."""

    status = 404
    code = METHOD_NOT_FOUND

    def __init__(self, method: str) -> None:
        super().__init__(f"Method not found: {method}")


class HeaderMismatch(ClientError):
    """A header that mirrors the body is missing, is unreadable or says something else.

    MCP 2026-07-28, transports, "Server Validation".
    """

    code = HEADER_MISMATCH


class MissingCapability(ClientError):
    """A request cannot be served without something that its client has not declared.

    `required` is that, as a ClientCapabilities object.
    """

    code = MISSING_CAPABILITY
    sentence = "The request needs a capability that the client has not declared"

    def __init__(self, required: object, message: str | None = None) -> None:
        super().__init__(message)
        self.data = {"requiredCapabilities": required}


class UnsupportedRevision(ClientError):
    """The request is of a revision that is not served."""

    code = UNSUPPORTED_REVISION

    def __init__(self, requested: str, supported: Sequence[str]) -> None:
        super().__init__(f"Unsupported protocol version; supported here: {', '.join(supported)}")
        self.data = {"supported": list(supported), "requested": requested}


class MissingSession(ClientError):
    """A request that belongs to a session names none."""

    sentence = "Mcp-Session-Id is missing: send the id that the initialize response carried"


class Forbidden(ClientError):
    """The Origin or Host header is not allowed."""

    status = 403


class Unauthenticated(ClientError):
    """Nobody that is known calls (RFC 9110 section 15.5.2).

    `challenge` is what WWW-Authenticate says of how to become known.
    """

    status = 401
    sentence = "A valid API key or token is required"

    def __init__(self, message: str | None = None, challenge: str = "Bearer") -> None:
        super().__init__(message)
        self.headers = [("WWW-Authenticate", challenge)]


class NotPermitted(Forbidden):
    """The caller is known and may not do this.

    `challenge` is what WWW-Authenticate says of what is missing, where more can be asked for (RFC
    6750 section 3.1).
    """

    sentence = "This is not permitted to the caller"

    def __init__(self, message: str | None = None, challenge: str | None = None) -> None:
        super().__init__(message)
        if challenge is not None:
            self.headers = [("WWW-Authenticate", challenge)]


class NotFound(ClientError):
    """Nothing is served at this path; the sentence names the MCP endpoints that are there."""

    status = 404
    _MOST = 10  # that are named

    def __init__(self, endpoints: Sequence[str] = ()) -> None:
        more = len(endpoints) - self._MOST
        named = [*endpoints[: self._MOST], *([f"{more} more"] if more > 0 else [])]
        where = f"; MCP is served at {', '.join(named)}" if named else ""
        super().__init__(f"Nothing is served at this path{where}")


class MethodNotAllowed(ClientError):
    """The path exists but not for this HTTP method."""

    status = 405

    def __init__(self, allowed: str) -> None:
        super().__init__(f"Method not allowed; allowed here: {allowed}")
        self.headers = [("Allow", allowed)]


class StreamWithoutSession(ClientError):
    """A GET that names no session: only a session has a stream.

    405 says so to clients that try one wire after the other (MCP 2025-11-25, transports,
    "Listening for Messages from the Server").
    """

    status = 405
    sentence = "A stream belongs to a session: POST an initialize first, then send Mcp-Session-Id"

    def __init__(self) -> None:
        super().__init__()
        self.headers = [("Allow", "POST, DELETE")]


class NotAcceptable(ClientError):
    """The Accept header names no media type of the endpoint."""

    status = 406
    sentence = "Accept must name application/json, text/event-stream or both"


class BodyTooSlow(ClientError):
    """The body did not arrive in the time that the server gives it."""

    status = 408
    sentence = "The request body did not arrive in time"


class BodyTooLarge(ClientError):
    """The body exceeds the limit."""

    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than {limit} bytes")


class UnsupportedMediaType(ClientError):
    """The Content-Type is not JSON."""

    status = 415
    sentence = "Content-Type must be application/json"


class EncodedBody(UnsupportedMediaType):
    """The body is compressed or encoded in another way (RFC 9110 section 15.5.16)."""

    sentence = "The body must come as it is, without gzip or any other Content-Encoding"

    def __init__(self) -> None:
        super().__init__()
        self.headers = [("Accept-Encoding", "identity")]


class SessionNotFound(ClientError):
    """There is no record with this session id.

    With status 404 the answer has no `id`: the official Go SDK takes an error with one for the
    answer to its call, and never notices that the session is over.
    """

    status = 404
    code = SESSION_NOT_FOUND
    sentence = "Session not found"


class SessionUnknown(SessionNotFound):
    """The id was never issued by this deployment."""

    status = 400


class SessionEnded(SessionNotFound):
    """The id was issued and its session has ended; on 404 a client starts a new session.

    MCP 2025-11-25, transports, "Session Management".
    """


class ServerRemoved(SessionNotFound):
    """The server was there, and was removed at a reload; so its sessions have ended."""

    sentence = "The server has been removed from this proxy"


class StorageError(ProxyError):
    """The session store failed."""

    status = 502
    code = PROXY_ERROR
    kind = "store-unavailable"


class StorageUnavailable(StorageError):
    """The store cannot be reached, so no session can be said to have ended.

    `detail` is for the operator: it says which store, and what that said.
    """

    status = 503
    sentence = "The session store cannot be reached; try again shortly"

    def __init__(self, message: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.detail = detail or str(self)
        self.headers = [("Retry-After", "1")]


class SessionExists(StorageError):
    """A record with this id exists already."""


class KeysUnavailable(ProxyError):
    """A token cannot be checked now: the keys of its issuer cannot be had."""

    status = 503
    code = PROXY_ERROR
    kind = "keys-unavailable"
    sentence = "Tokens cannot be checked at the moment; try again shortly"

    def __init__(self) -> None:
        super().__init__()
        self.headers = [("Retry-After", "5")]


class BackendError(ProxyError):
    """The MCP server behind the proxy failed; the message says how."""

    status = 502
    code = PROXY_ERROR
    kind = "bad-answer"


class ServerRefused(ProxyError):
    """An HTTP server wants something of the client itself, as authorization, and says so by its
    status.
    """

    code = PROXY_ERROR
    kind = ""

    def __init__(self, message: str, status: int, headers: Sequence[tuple[str, str]]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = list(headers)


class BackendLost(BackendError):
    """The backend was lost or cannot be started; it may have executed the request."""

    kind = "server-exited"


class BackendNotStarted(BackendLost):
    """The server cannot be started, or not yet again."""

    kind = "server-start-failed"


class BackendDraining(BackendLost):
    """The replica that has the backend is stopping, and the backend with it.

    The call had begun, so nobody is told to repeat it; one that has not is refused with Draining.
    """

    kind = "draining"


class BadAnswer(BackendLost):
    """The backend answered something that cannot be used."""

    kind = "bad-answer"


class UncertainEra(BadAnswer):
    """A server that was started has not answered as one of the era that it was of, and may be of
    another now. It got nothing of a request.
    """


class RedirectRefused(BackendError):
    """An HTTP server redirects its MCP endpoint to where it is not followed; it has executed
    nothing.
    """


class ConnectionBroken(BackendLost):
    """The connection to an HTTP server broke before it answered; it may have executed the request.

    Whether the server has ended, nobody knows.
    """

    kind = "server-unreachable"


class BackendUnreached(BackendLost):
    """The backend got nothing of the request, which may be sent again, there or elsewhere.

    `detail` is for the operator: it says which address, and what the system said; empty if unknown.
    """

    kind = "server-unreachable"
    sentence = "The server cannot be reached"
    detail = ""


class BackendExited(BackendUnreached):
    """The backend is a process that had exited before it got anything of the request."""

    kind = "server-exited"


class BackendUnavailable(BackendError):
    """The backend got nothing of the request and may still run: try again there shortly."""

    status = 503
    kind = "server-unreachable"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message)
        self.headers = [("Retry-After", "1")]


class ServerDisabled(ProxyError):
    """The server is named in the file, and disabled there."""

    status = 503
    code = PROXY_ERROR
    kind = "disabled"

    def __init__(self, name: str) -> None:
        super().__init__(f"The server {name!r} is disabled")


class ServerMisconfigured(ProxyError):
    """The server is named in the file, and something is wrong with its entry."""

    status = 503
    code = PROXY_ERROR
    kind = "misconfigured"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"The server {name!r} is misconfigured: {reason}")
        self.headers = [("Retry-After", "60")]


class BackendTimeout(BackendError):
    """The backend did not answer in time."""

    status = 504
    kind = "server-timeout"


class ClientLeft(ProxyError):
    """The client has left: no answer can be sent, and the backend has not failed."""

    status = 499
    code = PROXY_ERROR
    kind = ""
    sentence = "The client closed the connection"


class Cancelled(BackendError):
    """The client cancelled the call and the server sent no answer of its own."""

    status = 200
    kind = ""
    sentence = "The call was cancelled by the client"


class Overloaded(ProxyError):
    """A limit of this replica is reached; try again later or elsewhere."""

    status = 503
    code = PROXY_ERROR
    kind = "overloaded"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = [("Retry-After", "5")]


class RateLimited(ProxyError):
    """The caller has had as many requests as it may have for now (RFC 6585 section 4).

    `wait` is in how many seconds there are more, None where waiting does not help.
    """

    status = 429
    code = PROXY_ERROR
    kind = "rate-limited"

    def __init__(self, message: str, wait: int | None = None) -> None:
        super().__init__(message)
        if wait is not None:
            self.headers = [("Retry-After", str(wait))]


class Unpassable(ClientError):
    """Another worker has the session in its memory, and a request of this form cannot go there."""

    sentence = "A request with trailers or Upgrade cannot go to the worker that has its session"


class NoThread(Overloaded):
    """No thread of this worker became free for a request in time."""

    def __init__(self) -> None:
        super().__init__("All threads of this worker are taken")


class Draining(Overloaded):
    """This replica is stopping, and has begun nothing of what it was asked for."""

    kind = "draining"

    def __init__(self) -> None:
        super().__init__("This replica is shutting down")
