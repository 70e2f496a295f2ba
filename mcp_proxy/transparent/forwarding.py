"""Forwards the response of an HTTP backend to the client, its bytes unchanged."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec
from msgspec import Raw

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.edge.edge import as_message
from mcp_proxy.errors import BackendTimeout, ClientLeft, Draining, RequestId
from mcp_proxy.wire import headers, jsonrpc, sse
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Response
from mcp_proxy.wire.urls import Address, local_reference

#: The longest refusal that is read to find out whether it is about a lost session, in bytes.
MAX_EXPLANATION = 1024 * 1024

# By the status of a refusal: the media types of those that are about a session.
_EXPLAINED = {404: (headers.JSON,), 400: (headers.JSON, "text/plain", "")}

#: The longest initialize response that is parsed, in bytes; a longer one is only forwarded.
MAX_INITIALIZE = 4 * 1024 * 1024


class _Refusal(msgspec.Struct):
    """A JSON-RPC error with any id, or none."""

    jsonrpc: Literal["2.0"]
    error: Raw


_refusal = msgspec.json.Decoder(_Refusal)


class ForwardedBody:
    """The body of a call, each piece as soon as it arrives.

    When the backend breaks off, the iterator raises, so that the WSGI server aborts the connection
    and the client does not take the part for the whole. A drain ends an event stream in order. On
    an event stream that answers `request_id` a timeout becomes a JSON-RPC error event.

    Hooks: `on_timeout` is called when the backend was silent for too long; `transform` gets each
    piece, b"" at the end, and returns the bytes for the client.
    """

    def __init__(
        self,
        call: HttpCall,
        request_id: RequestId | None = None,
        on_timeout: Callable[[], object] | None = None,
        transform: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._call = call
        self._request_id = request_id
        self._on_timeout = on_timeout
        self._transform = transform

    def __iter__(self) -> Iterator[bytes]:
        yield b""  # sends the headers at once, however long the first piece takes
        transform = self._transform
        try:
            for piece in self._call.pieces():
                sent = piece if transform is None else transform(piece)
                if sent:
                    yield sent
        except BackendTimeout as error:
            if self._on_timeout is not None:
                self._on_timeout()
            if self._request_id is None or not is_open_stream(self._call):
                raise
            error.request_id = self._request_id
            yield b"\n\n" + sse.encode_message(as_message(error))
        except ClientLeft as error:
            # Not a failure: WSGI servers do not log this error.
            raise ConnectionResetError(errno.ECONNRESET, "The client has left") from error
        except Draining:
            if self._call.media_type != headers.EVENT_STREAM:
                raise
        if transform is not None and (rest := transform(b"")):
            yield rest

    def close(self) -> None:
        self._call.close()


class InitializeReader:
    """Reads an initialize response, JSON or an event stream, while it is forwarded.

    `on_answer` is called once: with the response before the client has its last byte, or with None
    at the end of a body without one.
    """

    def __init__(self, media_type: str, on_answer: Callable[[Response | None], object]) -> None:
        self._decoder = sse.Decoder() if media_type == headers.EVENT_STREAM else None
        self._on_answer = on_answer
        self._document = bytearray()
        self._is_done = False

    def feed(self, piece: bytes) -> bytes:
        """Takes a piece of the body, b"" for its end, and returns it unchanged."""
        if self._is_done:
            return piece
        if not piece:
            self._answer(None)
        elif self._decoder is not None:
            for event in self._decoder.feed(piece):
                self._try(event.data or b"")
        elif len(self._document) <= MAX_INITIALIZE:
            self._document += piece
            self._try(bytes(self._document))
        return piece

    def _try(self, data: bytes) -> None:
        try:
            message = jsonrpc.parse(data)
        except Exception:  # not complete yet, or not JSON-RPC
            return
        if isinstance(message, Response):
            self._answer(message)

    def _answer(self, response: Response | None) -> None:
        if not self._is_done:
            self._is_done = True
            self._on_answer(response)


def is_open_stream(call: HttpCall) -> bool:
    """Whether we can change the body: an event stream without a fixed length or an encoding."""
    is_fixed = call.header("Content-Length") or call.header("Content-Encoding")
    return call.media_type == headers.EVENT_STREAM and not is_fixed


def is_lost_session(call: HttpCall) -> bool:
    """Whether an answer says that the backend does not know the session. Its body stays unread.

    That is 404 with a JSON-RPC error that mentions a session, or 400 with "No valid session ID", as
    the TypeScript SDK has it, and the first ones of Python in plain text. A 404 may also be about
    an unknown path or method. SDKs put the request's id, null or no id into such an error.
    """
    if call.status not in (400, 404) or call.media_type not in _EXPLAINED[call.status]:
        return False
    explanation = call.read_ahead(MAX_EXPLANATION)
    if explanation is None:
        return False
    if call.media_type == headers.JSON:
        try:
            explanation = bytes(_refusal.decode(explanation).error)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
    sought = b"session" if call.status == 404 else b"no valid session id"
    return sought in explanation.lower()


def relocated(given: Headers, address: Address, mount: str) -> Headers:
    """Headers whose Location leads to the proxy where it named the backend at `address`."""
    return [
        (name, local_reference(address, value, mount) if name.lower() == "location" else value)
        for name, value in given
    ]
