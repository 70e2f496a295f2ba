"""A client's request: a thin view of the WSGI environ (PEP 3333), made once per request."""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
import time
from typing import TYPE_CHECKING

from msgspec import UNSET, Raw, UnsetType
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge
from werkzeug.wsgi import get_input_stream

from mcp_proxy.edge.disconnects import ClientConnection
from mcp_proxy.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, ProxyError
from mcp_proxy.wire import headers
from mcp_proxy.wire.jsonrpc import Batch, Message

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

# RFC 9110 section 8.6; a length with more digits is too large anyway.
_LENGTH = re.compile(r"[0-9]{1,18}")

_MAX_REQUEST_ID = 128

# Seconds for which a client that has closed its sending side is taken to wait for the answer.
_HALF_CLOSED = 1.0

# RFC 9112 section 3.2: origin-form begins with `/`, absolute-form with the scheme. What follows the
# scheme's host is the path, or the query where there is no path.
_ABSOLUTE_FORM = re.compile(r"https?://[^/?#]+(?=[/?]|\Z)", re.IGNORECASE)

# Where servers tell the whole target: gunicorn and werkzeug, and uWSGI and mod_wsgi.
_WHOLE_TARGETS = ("RAW_URI", "REQUEST_URI")


class RequestIds:
    """Ids for requests without one: a nonce of this process and a number. Thread-safe.

    They are no secrets. The nonce is drawn with the first id, and again after a fork.
    """

    def __init__(self) -> None:
        self._pid: int | None = None
        self._nonce = ""
        self._numbers = itertools.count(1)

    def new(self) -> str:
        """An id that no other request has."""
        pid = os.getpid()
        if self._pid != pid:
            # Two threads may both get here and use two nonces; the numbers keep the ids unique.
            self._nonce = secrets.token_hex(4)
            self._pid = pid
        return f"{self._nonce}{next(self._numbers):08x}"


class ClientRequest:
    """One HTTP request. Used by one thread at a time.

    `session_id`, `protocol_version` and `content_type` are the headers of that name, None where
    they are absent; a client without Accept accepts JSON only. `is_encoded` says whether the body
    is compressed, say. `message` is what a POST carried, once it was read, if the answer to it
    leaves on this response: failures then do as well.

    Five are for the log: `id` is the client's X-Request-ID if it is valid, else one of `ids`; `rpc`
    is the JSON-RPC method and `params` are its parameters, `session` is the session that was named
    or opened, and `reason` says why the request was refused or failed, each once it is known.
    `is_standing` is for the server: the answer is a standing stream.
    """

    __slots__ = (
        "_connection",
        "accepts_json",
        "accepts_stream",
        "content_type",
        "environ",
        "id",
        "is_encoded",
        "is_standing",
        "message",
        "method",
        "params",
        "path",
        "protocol_version",
        "reason",
        "rpc",
        "session",
        "session_id",
        "started",
    )

    def __init__(self, environ: WSGIEnvironment, ids: RequestIds) -> None:
        self.environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        self.path: str = environ.get("PATH_INFO", "")
        accept: str = environ.get("HTTP_ACCEPT", headers.JSON)
        self.accepts_json = headers.accepts(accept, headers.JSON)
        self.accepts_stream = headers.accepts(accept, headers.EVENT_STREAM)
        self.content_type: str | None = environ.get("CONTENT_TYPE") or None
        encoding: str = environ.get("HTTP_CONTENT_ENCODING", "")
        self.is_encoded = encoding.strip().lower() not in ("", "identity")
        self.session_id: str | None = environ.get("HTTP_MCP_SESSION_ID")
        self.protocol_version: str | None = environ.get("HTTP_MCP_PROTOCOL_VERSION")
        given: str | None = environ.get("HTTP_X_REQUEST_ID")
        self.id = given if given and _is_request_id(given) else ids.new()
        self.started = time.monotonic()
        self._connection: ClientConnection | None = None
        self.message: Message | Batch | None = None
        self.reason = ""
        self.rpc: str | None = None
        self.params: Raw | UnsetType = UNSET
        self.session = self.session_id
        self.is_standing = False

    def note(self, error: ProxyError) -> None:
        """Has the access line say what went wrong."""
        if error.kind or error.status >= 400:
            self.reason = f"{error.kind}: {error}" if error.kind else str(error)

    def header(self, name: str) -> str | None:
        """The value of a request header, None where it is absent."""
        value: str | None = self.environ.get("HTTP_" + name.upper().replace("-", "_"))
        return value

    def has_left(self) -> bool:
        """Whether the client is known to have left.

        One that has only closed its sending side may still read: it counts once it has waited.
        """
        if time.monotonic() - self.started < _HALF_CLOSED:
            return False
        if self._connection is None:
            self._connection = ClientConnection(self.environ)
        return self._connection.has_left()

    def accepts(self, media_type: str) -> bool:
        """Whether the client named `media_type` in Accept; without that header, only JSON."""
        return headers.accepts(self.environ.get("HTTP_ACCEPT", headers.JSON), media_type)

    def read_body(self, limit: int) -> bytes:
        """The whole body, also a chunked one.

        Raises BodyTooLarge over `limit` bytes, BodyTooSlow where the server's time limit has
        passed, InvalidRequest when the body ended early or is not framed as HTTP wants it: each
        server has errors of its own for that.
        """
        size: str = self.environ.get("CONTENT_LENGTH") or ""
        is_plain = "HTTP_TRANSFER_ENCODING" not in self.environ and _LENGTH.fullmatch(size)
        try:
            if not is_plain:
                return self._read_to_the_end(limit)
            if int(size) > limit:
                raise BodyTooLarge(limit)
            data: bytes = self.environ["wsgi.input"].read(int(size))
            return data if len(data) == int(size) else self._read_rest(data, int(size))
        except (ClientDisconnected, OSError) as error:
            if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):
                raise BodyTooSlow from error
            raise InvalidRequest("The request body ended early") from error
        except ProxyError:
            raise
        except Exception as error:
            log.info("a request body cannot be read: %s: %s", type(error).__name__, error)
            raise InvalidRequest("The request body cannot be read: its framing is wrong") from error

    def _read_rest(self, data: bytes, size: int) -> bytes:
        """The whole body: a stream may give fewer bytes than it is asked for."""
        while len(data) < size:
            piece = self.environ["wsgi.input"].read(size - len(data))
            if not piece:
                raise ClientDisconnected
            data += piece
        return data

    def _read_to_the_end(self, limit: int) -> bytes:
        try:
            # One byte more than the limit: a chunked body is cut off there without an error.
            body = get_input_stream(self.environ, max_content_length=limit + 1).read()
        except RequestEntityTooLarge as error:
            raise BodyTooLarge(limit) from error
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body


def with_path(environ: WSGIEnvironment) -> WSGIEnvironment:
    """The environ with the path as PATH_INFO where the server has left a URL there, as wsgiref does
    (RFC 9112 section 3.2.2 wants absolute-form taken).
    """
    told: str = environ.get("PATH_INFO", "")
    found = _ABSOLUTE_FORM.match(told)
    return environ if found is None else {**environ, "PATH_INFO": told[found.end() :] or "/"}


def require_path(environ: WSGIEnvironment) -> None:
    """Raises InvalidRequest unless the request target has a path, or is a URL that has one.

    Anything else, such as `@host:port/x`, would become part of the host where a URL is built of it.
    Servers differ in what they tell of the target: everything that they tell is looked at.
    """
    for name in ("SCRIPT_NAME", "PATH_INFO", "RAW_URI", "REQUEST_URI"):
        told: str = environ.get(name) or "/"
        if told.startswith("/") or (name in _WHOLE_TARGETS and _ABSOLUTE_FORM.match(told)):
            continue
        raise InvalidRequest("The request target must be a path or an http:// or https:// URL")


def path_as_sent(environ: WSGIEnvironment) -> str | None:
    """The path in the request target, percent-encoded as the client sent it; None where unknown."""
    raw: str = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    path = _ABSOLUTE_FORM.sub("", raw, count=1) if not raw.startswith("/") else raw
    return path.partition("?")[0] if path.startswith("/") else None


def _is_request_id(given: str) -> bool:
    return len(given) <= _MAX_REQUEST_ID and headers.is_session_id(given)
