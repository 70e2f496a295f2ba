"""The errors of this project, each with the HTTP status and the JSON-RPC code of its response.

One place, `mcp_proxy.edge.edge`, turns them into responses. JSON-RPC codes: -32700 to -32603 are
JSON-RPC 2.0 section 5.1; -32000 and -32001 are the codes that MCP clients know from legacy servers.
Codes -32020 and below mark a modern (2026-07-28) server and are never used here.

An error that is not the client's fault has a kind, which the header `X-MCP-Proxy-Error` names. A
POST that carries a request is then answered 200, unless the setting `failure_status` is `http`:
the status of such an error is that on GET and DELETE.
"""

from __future__ import annotations

RequestId = int | str

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
INTERNAL_ERROR = -32603
PROXY_ERROR = -32000
SESSION_NOT_FOUND = -32001


def in_seconds(number: float) -> str:
    """A time in a sentence: `1 second`, `2.5 seconds`."""
    return f"{number:g} second{'' if number == 1 else 's'}"


class ProxyError(Exception):
    """The base class: HTTP status, JSON-RPC code, and a message for the client.

    `kind` is empty where the client is at fault, or has left, or nothing failed. `request_id` is
    the id of the JSON-RPC request that is answered by this error, None where there is none;
    `headers` are added to the HTTP response.
    """

    status = 500
    code = INTERNAL_ERROR
    kind = "internal-error"
    sentence = "Internal error"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.sentence)
        self.request_id: RequestId | None = None
        self.headers: list[tuple[str, str]] = []

    @property
    def message(self) -> str:
        """The sentence that the client reads."""
        return str(self)


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


class MissingSession(ClientError):
    """A request that belongs to a session names none."""

    sentence = "Mcp-Session-Id is missing: send the id that the initialize response carried"


class Forbidden(ClientError):
    """The Origin or Host header is not allowed."""

    status = 403


class NotFound(ClientError):
    """Nothing is served at this path."""

    status = 404
    sentence = "Not found"


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


class BackendError(ProxyError):
    """The MCP server behind the proxy failed; the message says how."""

    status = 502
    code = PROXY_ERROR
    kind = "bad-answer"


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


class NoThread(Overloaded):
    """No thread of this worker became free for a request in time."""

    def __init__(self) -> None:
        super().__init__("All threads of this worker are taken")


class Draining(Overloaded):
    """This replica is stopping, and has begun nothing of what it was asked for."""

    kind = "draining"

    def __init__(self) -> None:
        super().__init__("This replica is shutting down")
