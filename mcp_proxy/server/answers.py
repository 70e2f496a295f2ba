"""What our worker class writes: an application's response, and answers in place of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.errors import UnsupportedTransferCoding
from gunicorn.http.parser import RequestParser

from mcp_proxy.edge.logs import escaped
from mcp_proxy.errors import INVALID_REQUEST, PROXY_ERROR
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.headers import FAILURE

#: Bytes that are read or written at once; more than TLS has in a record, so none stay in OpenSSL.
PIECE = 64 * 1024

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3} [^\r\n]*)")


class Gathering:
    """Replaces a socket and collects the bytes to send."""

    def __init__(self) -> None:
        self.data = b""

    def sendall(self, data: bytes) -> None:
        """Takes the bytes."""
        self.data += data

    def gettimeout(self) -> float:
        """As of a socket on which nothing blocks."""
        return 0.0

    @property
    def status(self) -> str:
        """The status of the response that was written."""
        found = _STATUS.match(self.data)
        return found[1].decode("latin-1") if found else "500 Internal Server Error"


class JoinedResponse(wsgi.Response):  # type: ignore[misc]
    """A response whose head is sent together with the first piece of the body.

    An empty piece sends the head at once; a large one is sent in parts, each of which has the
    time limit of the socket. Used by one thread.
    """

    sock: Any

    #: Bytes of the body that the system has taken, and whether it did not take the next in time.
    taken = 0
    is_late = False

    def write(self, arg: bytes) -> None:
        """Sends a piece of the body; gunicorn names the parameter."""
        try:
            self._write(arg)
        except TimeoutError:
            self.is_late = True
            raise

    def _write(self, arg: bytes) -> None:
        if self.headers_sent or not 0 < len(arg) < PIECE:
            for at in range(0, len(arg) or 1, PIECE):
                super().write(arg[at : at + PIECE])
                self.taken += len(arg[at : at + PIECE])
            return
        sock, self.sock = self.sock, Gathering()
        try:
            super().write(arg)
        finally:
            gathered, self.sock = self.sock.data, sock
        sock.sendall(gathered)
        self.taken += len(arg)


def send(body: Iterable[bytes], response: Any, environ: dict[str, Any]) -> None:
    """Sends what an application has returned, to its end."""
    if isinstance(body, environ["wsgi.file_wrapper"]):
        response.write_file(body)
    else:
        for piece in body:
            response.write(piece)
    response.close()


def answer(conn: Any, app: Any, cfg: Any, may_keep: bool) -> tuple[bytes, bool]:
    """What an application answers to the whole request of a connection, and whether that is kept.

    Raises whatever the parser or the application raises.
    """
    req = next(RequestParser(cfg, [conn.request.take()], conn.client))
    written = Gathering()
    response, environ = wsgi.create(
        req, written, conn.client, conn.server, cfg, response_class=JoinedResponse
    )
    if not may_keep:
        response.force_close()
    body = app(environ, response.start_response)
    try:
        send(body, response, environ)
    finally:
        if hasattr(body, "close"):
            body.close()
    return written.data, not response.should_close()


def refusal(status: str, message: str, kind: str = "") -> bytes:
    """A whole response that is a JSON-RPC error without an id.

    `kind` is that of the failure where the client has done nothing wrong.
    """
    body = jsonrpc.encode_error(PROXY_ERROR if kind else INVALID_REQUEST, message, None)
    named = f"{FAILURE}: {kind}\r\nRetry-After: 1\r\n" if kind else ""
    head = (
        f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n{named}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("latin-1") + body


def refusal_of(handle_error: Callable[..., object], addr: Any, error: Exception) -> bytes:
    """A whole response that says what gunicorn's `handle_error` says of an error, and logs."""
    written = Gathering()
    handle_error(written, addr, error)
    if isinstance(error, UnsupportedTransferCoding):  # RFC 9112 section 6.1
        return refusal("501 Not Implemented", f"{error}")
    is_refused = written.status.startswith("4")
    return refusal(written.status, str(error) if is_refused else "Internal error")


def not_read(req: Any, addr: Any, taken: int, seconds: float) -> str:
    """The log line about an answer that was cut off because its client did not read it."""
    client = addr[0] if isinstance(addr, tuple) else "a client"
    return (
        f"The answer to {escaped(req.method)} {escaped(req.path)} was cut off after {taken} bytes: "
        f"{client} did not read for {seconds:g} s"
    )
