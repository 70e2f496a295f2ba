"""What a client asks: a thin view of the WSGI environ (PEP 3333), made once a request."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import time
from typing import TYPE_CHECKING

from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge
from werkzeug.wsgi import get_input_stream

from mcp_proxy.errors import BodyTooLarge, InvalidRequest
from mcp_proxy.wire import headers

if TYPE_CHECKING:
    from _typeshed.wsgi import InputStream, WSGIEnvironment

# RFC 9110 section 8.6; what is larger than that many digits can say is too large anyway.
_LENGTH = re.compile(r"[0-9]{1,18}")

_MAX_REQUEST_ID = 128


class RequestIds:
    """Ids for requests that bring none: a nonce of this process and a number. Thread-safe.

    For logs, not for secrets. Nothing is drawn before the first id, and a fork draws anew.
    """

    def __init__(self) -> None:
        self._pid: int | None = None
        self._nonce = ""
        self._numbers = itertools.count(1)

    def new(self) -> str:
        """An id that no other request has."""
        pid = os.getpid()
        if self._pid != pid:
            # Two threads may both get here: then two nonces are in use, and the number tells.
            self._nonce = secrets.token_hex(4)
            self._pid = pid
        return f"{self._nonce}{next(self._numbers):08x}"


class ClientRequest:
    """One HTTP request. Used by one thread at a time.

    `id` is the caller's X-Request-ID if it is a decent one, else one of `ids`; `rpc` is the
    JSON-RPC method it carried and `session` the session that it named or opened, once that is
    known; all are for the log.
    """

    __slots__ = ("environ", "id", "method", "path", "rpc", "session", "started")

    def __init__(self, environ: WSGIEnvironment, ids: RequestIds) -> None:
        self.environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        self.path: str = environ.get("PATH_INFO", "")
        given: str | None = environ.get("HTTP_X_REQUEST_ID")
        self.id = given if given and _is_request_id(given) else ids.new()
        self.started = time.monotonic()
        self.rpc: str | None = None
        self.session = self.session_id

    def header(self, name: str) -> str | None:
        """The value of a request header, None where it is absent."""
        value: str | None = self.environ.get("HTTP_" + name.upper().replace("-", "_"))
        return value

    @property
    def session_id(self) -> str | None:
        """Mcp-Session-Id as it came."""
        value: str | None = self.environ.get("HTTP_MCP_SESSION_ID")
        return value

    @property
    def protocol_version(self) -> str | None:
        """MCP-Protocol-Version as it came."""
        value: str | None = self.environ.get("HTTP_MCP_PROTOCOL_VERSION")
        return value

    def accepts(self, media_type: str) -> bool:
        """Whether the client named `media_type` in Accept; without that header, only JSON."""
        accept: str | None = self.environ.get("HTTP_ACCEPT")
        if accept is None:
            return media_type == headers.JSON
        return headers.accepts(accept, media_type)

    @property
    def content_type(self) -> str | None:
        """Content-Type as it came, None where there is none."""
        return self.environ.get("CONTENT_TYPE") or None

    def read_body(self, limit: int) -> bytes:
        """The whole body, also a chunked one.

        Raises BodyTooLarge over `limit` bytes and InvalidRequest when the client broke off.
        """
        length = self._content_length()
        try:
            if length is None:
                return self._read_to_the_end(limit)
            if length > limit:
                raise BodyTooLarge(limit)
            return _read_exactly(self.environ["wsgi.input"], length)
        except (ClientDisconnected, OSError) as error:
            raise InvalidRequest("The request body ended early") from error

    def _content_length(self) -> int | None:
        """How long the body is, None where that is not plain."""
        length: str = self.environ.get("CONTENT_LENGTH") or ""
        if "HTTP_TRANSFER_ENCODING" in self.environ or not _LENGTH.fullmatch(length):
            return None
        return int(length)

    def _read_to_the_end(self, limit: int) -> bytes:
        try:
            # One byte more than the limit: a chunked body is cut off there without a word.
            body = get_input_stream(self.environ, max_content_length=limit + 1).read()
        except RequestEntityTooLarge as error:
            raise BodyTooLarge(limit) from error
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body


def _read_exactly(stream: InputStream, size: int) -> bytes:
    """So many bytes; a stream may give fewer than it is asked for. Raises when they do not come."""
    data = stream.read(size)
    while len(data) < size:
        piece = stream.read(size - len(data))
        if not piece:
            raise ClientDisconnected
        data += piece
    return data


def _is_request_id(given: str) -> bool:
    return len(given) <= _MAX_REQUEST_ID and headers.is_session_id(given)
