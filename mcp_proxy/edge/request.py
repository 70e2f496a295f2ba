"""What a client asks: a thin view of the WSGI environ (PEP 3333), made once a request."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge
from werkzeug.wsgi import get_input_stream

from mcp_proxy.errors import BodyTooLarge, InvalidRequest
from mcp_proxy.wire import headers

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_MAX_REQUEST_ID = 128


class ClientRequest:
    """One HTTP request. Used by one thread at a time.

    `rpc` is the JSON-RPC method it carried, once that is known; both are for the log.
    """

    __slots__ = ("environ", "id", "method", "path", "rpc", "started")

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        self.path: str = environ.get("PATH_INFO", "")
        self.id = _request_id(environ.get("HTTP_X_REQUEST_ID"))
        self.started = time.monotonic()
        self.rpc: str | None = None

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
        try:
            # One byte more than the limit: a chunked body is cut off there without a word.
            body = get_input_stream(self.environ, max_content_length=limit + 1).read()
        except RequestEntityTooLarge as error:
            raise BodyTooLarge(limit) from error
        except (ClientDisconnected, OSError) as error:
            raise InvalidRequest("The request body ended early") from error
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body


def _request_id(given: str | None) -> str:
    """The caller's X-Request-ID if it is a decent one, else a new id."""
    if given and len(given) <= _MAX_REQUEST_ID and headers.is_session_id(given):
        return given
    return secrets.token_hex(8)
