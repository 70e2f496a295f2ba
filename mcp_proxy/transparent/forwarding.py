"""A response of an HTTP backend on its way to the client, its bytes as they are."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.edge.edge import as_message
from mcp_proxy.errors import BackendLost, BackendTimeout, RequestId
from mcp_proxy.wire import headers, jsonrpc, sse
from mcp_proxy.wire.jsonrpc import Response

log = logging.getLogger(__name__)

# An answer that says "I do not know this session" is short.
_EXPLANATION_LIMIT = 64 * 1024

#: An initialize response that is longer (bytes) is passed on without being understood.
MAX_OBSERVED = 4 * 1024 * 1024


class PassingBody:
    """The body of a call, each piece as soon as it is there.

    A backend that breaks off breaks the response off: an exception leaves the iterator, and the
    server aborts the connection, so that nobody takes the part for the whole. On an event stream
    that answers `request_id` silence beyond the time limit becomes a JSON-RPC error event; in any
    case `on_timeout` is done then. `close` frees the backend's connection and does what `on_close`
    was given, once. `rewrite` may keep bytes back until it gets an empty piece.
    """

    def __init__(
        self,
        call: HttpCall,
        request_id: RequestId | None = None,
        observe: Callable[[bytes], None] = lambda piece: None,
        on_timeout: Callable[[], None] = lambda: None,
        rewrite: Callable[[bytes], bytes] = lambda piece: piece,
    ) -> None:
        self._call = call
        self._request_id = request_id
        self._observe = observe
        self._on_timeout = on_timeout
        self._rewrite = rewrite
        self._on_close: list[Callable[[], None]] = []
        self._is_closed = False
        self._is_ended = False
        self._has_left = False

    def on_close(self, act: Callable[[], None]) -> None:
        """Has `act` done when the response is over, however it ends."""
        self._on_close.append(act)

    def end(self) -> None:
        """Ends the response as if the backend had; from any thread."""
        self._is_ended = True
        self._call.abort()

    def leave(self) -> None:
        """Breaks the response off, since its client is gone; from any thread."""
        self._has_left = True
        self._call.abort()

    def __iter__(self) -> Iterator[bytes]:
        yield b""  # sends the headers at once, however long the first piece takes
        try:
            for piece in self._call.pieces():
                self._observe(piece)
                if passed := self._rewrite(piece):
                    yield passed
        except BackendTimeout as error:
            self._on_timeout()
            if self._request_id is None or not is_open_stream(self._call):
                raise
            error.request_id = self._request_id
            yield b"\n\n" + sse.encode_message(as_message(error))
        except BackendLost as error:
            if self._has_left:  # nothing is wrong, so it is said in a way that servers do not log
                raise ConnectionResetError(errno.ECONNRESET, "The client has left") from error
            if not (self._is_ended and is_event_stream(self._call)):
                raise
        self._observe(b"")
        if rest := self._rewrite(b""):
            yield rest

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for act in (self._call.close, *self._on_close):
            try:
                act()
            except Exception:
                log.exception("freeing what a response held failed")


class InitializeObserver:
    """Reads an initialize response as it passes, JSON or an event stream.

    `on_answer` is called once: with the answer before the client has its last byte, or with None at
    the end of a body that had none.
    """

    def __init__(self, call: HttpCall, on_answer: Callable[[Response | None], None]) -> None:
        self._decoder = sse.Decoder() if is_event_stream(call) else None
        self._on_answer = on_answer
        self._document = bytearray()
        self._is_done = False

    def __call__(self, piece: bytes) -> None:
        """One piece of the body; an empty one is its end."""
        if self._is_done:
            return
        if not piece:
            self._answer(None)
        elif self._decoder is not None:
            for event in self._decoder.feed(piece):
                self._try(event.data or b"")
        elif len(self._document) <= MAX_OBSERVED:
            self._document += piece
            self._try(bytes(self._document))

    def _try(self, data: bytes) -> None:
        try:
            message = jsonrpc.parse(data)
        except Exception:  # not whole yet, or none of our business
            return
        if isinstance(message, Response):
            self._answer(message)

    def _answer(self, response: Response | None) -> None:
        if not self._is_done:
            self._is_done = True
            self._on_answer(response)


def is_event_stream(call: HttpCall) -> bool:
    """Whether the backend answers with an event stream."""
    media_type = _content_type(call).partition(";")[0].strip().lower()
    return media_type == headers.EVENT_STREAM


def is_open_stream(call: HttpCall) -> bool:
    """Whether something of ours can stand in the backend's answer: an event stream, but plain."""
    is_fixed = call.header("Content-Length") or call.header("Content-Encoding")
    return is_event_stream(call) and not is_fixed


def explanation_of(call: HttpCall) -> bytes | None:
    """The body of an answer that may say that a session is lost, None for other answers.

    Such an answer is a short JSON document; the body of any other is left to be passed on.
    """
    length = call.header("Content-Length") or "0"
    is_long = not length.isdigit() or int(length) > _EXPLANATION_LIMIT
    if call.status not in (400, 404) or is_long or not headers.is_json(_content_type(call)):
        return None
    try:
        return call.read(_EXPLANATION_LIMIT)
    finally:
        call.close()


def _content_type(call: HttpCall) -> str:
    return call.header("Content-Type") or ""
