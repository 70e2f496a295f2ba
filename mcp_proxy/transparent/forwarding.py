"""Forwards the response of an HTTP backend to the client, its bytes unchanged."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.edge.edge import as_message
from mcp_proxy.errors import (
    BackendDraining,
    BackendLost,
    BackendTimeout,
    BadAnswer,
    ClientLeft,
    Draining,
    ProxyError,
    RequestId,
    StorageError,
)
from mcp_proxy.wire import headers, jsonrpc, sse
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Response
from mcp_proxy.wire.urls import local_reference

#: The longest refusal that is read to find out whether it is about a lost session, in bytes.
MAX_EXPLANATION = 1024 * 1024

# By the status of a refusal: the media types of those that are about a session.
_EXPLAINED = {404: (headers.JSON, "text/plain"), 400: (headers.JSON, "text/plain", "")}

# What a 400 says of a session that is not known: the TypeScript SDK, and Python's first ones in
# plain text; the TypeScript SDK where a server with one session was started anew.
_LOST = (b"no valid session id", b"server not initialized")

_EITHER = zlib.MAX_WBITS | 32  # gzip or zlib, whichever it is

#: The longest initialize response that is parsed, in bytes; a longer one is only forwarded.
MAX_INITIALIZE = 4 * 1024 * 1024


#: The longest JSON answer to a request that is held back until it is whole, in bytes.
MAX_HELD = 64 * 1024


class _Refusal(msgspec.Struct):
    """A JSON-RPC error with any id, or none."""

    jsonrpc: Literal["2.0"]
    error: Raw


class _Outcome(msgspec.Struct):
    """What tells a response from other messages, and which it is."""

    id: Raw | UnsetType = UNSET
    method: Raw | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET


_refusal = msgspec.json.Decoder(_Refusal)
_outcomes = msgspec.json.Decoder(_Outcome | list[_Outcome])

# Two line ends, and the nothing before the first event. A comment may stand there, and only there.
_BETWEEN_EVENTS = re.compile(rb"(\A|(\r\n|\n|\r(?!\n))(\r\n|\n|\r))\Z")
_TAIL = 4
_BUFFERING = ("X-Accel-Buffering", "no")


class ForwardedBody:
    """The body of a call, each piece as soon as it arrives.

    When the backend breaks off, the iterator raises a ProxyError, so that the WSGI server aborts
    the connection and the client does not take the part for the whole. A drain ends an event stream
    in order, and so does a break after the responses to `request_ids`; before them, the stream ends
    with a JSON-RPC error event for each that is missing, unless the client can resume it: its
    events have ids, and `is_reachable` says that the backend is there. A timeout always becomes
    error events. A silent event stream gets a comment every `keepalive` seconds.

    Hooks: `on_failure` is called with what went wrong, unless all responses have passed;
    `on_response` with each event that has a response, before it leaves (`reports_answers`);
    `transform` gets each piece, b"" at the end, and returns the bytes for the client. `first` are
    bytes for the client that it has returned already.
    """

    def __init__(
        self,
        call: HttpCall,
        request_ids: Sequence[RequestId] = (),
        on_failure: Callable[[ProxyError], object] | None = None,
        transform: Callable[[bytes], bytes] | None = None,
        keepalive: float | None = None,
        is_reachable: Callable[[], bool] = bool,
        first: bytes = b"",
        on_response: Callable[[bytes, ProxyError | None], object] | None = None,
    ) -> None:
        is_open = is_open_stream(call)
        self._call = call
        self._on_failure = on_failure
        self._transform = transform
        self._keepalive = keepalive if is_open else None
        self._is_reachable = is_reachable
        self._first = first
        self._on_response = on_response
        self._passed = PassedEvents(request_ids, on_response) if is_open and request_ids else None
        #: Whether whoever counts is told of each answer, and so need not know the body.
        self.reports_answers = self._passed is not None

    def __iter__(self) -> Iterator[bytes]:
        yield b""  # sends the headers at once, however long the first piece takes
        transform = self._transform
        try:
            yield from self._pieces()
        except (BackendLost, BackendTimeout) as error:
            if not self._is_answered:
                self._report(error)
            if not self._can_be_ended(error):
                raise
            yield self._ending(error)
        except ClientLeft as error:
            # Not a failure: WSGI servers do not log this error.
            raise ConnectionResetError(errno.ECONNRESET, "The client has left") from error
        except Draining as error:
            if self._call.media_type != headers.EVENT_STREAM:
                self._report(error)
                raise
        except StorageError as error:  # of `transform`
            self._report(error)
            raise
        if transform is not None and (rest := transform(b"")):
            yield rest

    def close(self) -> None:
        self._call.close()

    def _pieces(self) -> Iterator[bytes]:
        if self._first:
            yield self._first
        tail = self._first[-_TAIL:]
        for piece in self._call.pieces(self._keepalive):
            if not piece:
                if _BETWEEN_EVENTS.search(tail):
                    yield sse.KEEPALIVE
                continue
            if self._passed is not None:
                self._passed.feed(piece)
            sent = piece if self._transform is None else self._transform(piece)
            if sent:
                tail = (tail + sent)[-_TAIL:]
                yield sent
        passed = self._passed
        if passed is not None and passed.is_missed and self._call.ends_with_connection:
            raise BadAnswer("The server broke off in the middle of its answer")

    def _report(self, failure: ProxyError) -> None:
        if self._on_failure is not None:
            self._on_failure(failure)

    @property
    def _is_answered(self) -> bool:
        return self._passed is not None and self._passed.is_answered

    def _can_be_ended(self, error: BackendLost | BackendTimeout) -> bool:
        """Whether the stream has a proper end although the backend broke off."""
        passed = self._passed
        if passed is None or passed.is_unknown:
            is_stream = self._call.media_type == headers.EVENT_STREAM
            return is_stream and isinstance(error, BackendDraining)
        if passed.is_answered or isinstance(error, BackendTimeout):
            return True
        return not (passed.has_ids and self._is_reachable())

    def _ending(self, error: BackendLost | BackendTimeout) -> bytes:
        if self._passed is None or not self._passed.missing:
            return b""
        ending = b"\n\n"
        for request_id in self._passed.missing:
            error.request_id = request_id
            data = as_message(error)
            if self._on_response is not None:
                self._on_response(data, error)
            ending += sse.encode_message(data)
        return ending


class PassedEvents:
    """What has passed of an event stream that answers requests. `feed` gets each piece.

    `on_response` is called with the data of each event that has a response.
    """

    def __init__(
        self,
        request_ids: Sequence[RequestId],
        on_response: Callable[[bytes, ProxyError | None], object] | None = None,
    ) -> None:
        #: Whether an event had an id, so that the stream can be resumed.
        self.has_ids = False
        #: The requests whose response was not among the events.
        self.missing = list(request_ids)
        #: Whether an event was too long to be looked at.
        self.is_unknown = False
        self._decoder = sse.Decoder()
        self._pending = 0
        self._is_batch = len(request_ids) > 1
        self._on_response = on_response

    @property
    def is_answered(self) -> bool:
        """Whether all responses were among the events."""
        return not self.missing

    @property
    def is_missed(self) -> bool:
        """Whether a response has not come and cannot be had by resuming."""
        return not (self.is_answered or self.is_unknown or self.has_ids)

    def feed(self, piece: bytes) -> None:
        """Looks at the events that `piece` completes."""
        if self.is_answered or self.is_unknown:
            return
        events = self._decoder.feed(piece)
        self._pending = 0 if events else self._pending + len(piece)
        self.is_unknown = self._pending > MAX_INITIALIZE
        for event in events:
            self.has_ids = self.has_ids or bool(event.id)
            responses = _responses_in(event.data or b"")
            if responses and self._on_response is not None:
                self._on_response(event.data or b"", None)
            for response in responses:
                self._answered(response)

    def _answered(self, response: _Outcome) -> None:
        """Takes one request out: the only one, whatever the id, or that with the response's id.

        Some servers make a text of a number.
        """
        found = self.missing
        if self._is_batch:
            given = None if response.id is UNSET else msgspec.json.decode(response.id)
            found = [each for each in self.missing if each == given]
            found = found or [each for each in self.missing if str(each) == str(given)]
        if found:
            self.missing.remove(found[0])


def _responses_in(data: bytes) -> list[_Outcome]:
    """The responses among the messages of an event; a server may send several in one array."""
    if b'"result"' not in data and b'"error"' not in data:
        return []
    try:
        found = _outcomes.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    messages = found if isinstance(found, list) else [found]
    return [m for m in messages if m.method is UNSET and (m.result, m.error) != (UNSET, UNSET)]


class InitializeReader:
    """Reads an initialize response, JSON or an event stream, while it is forwarded.

    `on_answer` is called once: with the response before the client has its last byte, or with None
    at the end of a body without one.
    """

    def __init__(self, media_type: str, on_answer: Callable[[Response | None], object]) -> None:
        is_stream = media_type == headers.EVENT_STREAM
        self._decoder = sse.Decoder(MAX_INITIALIZE) if is_stream else None
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


@contextlib.contextmanager
def closed_on_error(call: HttpCall) -> Iterator[None]:
    """Closes a call whose answer will not reach the client."""
    try:
        yield
    except BaseException:
        call.close()
        raise


def hold_back(call: HttpCall) -> None:
    """Reads a JSON answer to its end, unless it is long: half of one is of no use to a client.

    Raises as `HttpCall.pieces` does, and BadAnswer where the connection ended within the document.
    """
    document = call.read_ahead(MAX_HELD)
    if document is None or not call.ends_with_connection or call.header("Content-Encoding"):
        return
    try:
        json.loads(document)
    except (ValueError, RecursionError) as error:
        raise BadAnswer("The server broke off in the middle of its answer") from error


def is_open_stream(call: HttpCall) -> bool:
    """Whether we can change the body: an event stream without a fixed length or an encoding."""
    return call.media_type == headers.EVENT_STREAM and not (
        call.header("Content-Length") or call.header("Content-Encoding")
    )


def is_lost_session(call: HttpCall) -> bool:
    """Whether an answer says that the backend does not know the session. Its body stays unread.

    That is 404 with a JSON-RPC error that mentions a session, or with the Go SDK's plain text, or
    400 with a sentence of `_LOST`. A 404 may also be about an unknown path or method. SDKs put the
    request's id, null or no id into such an error, which may be compressed.
    """
    if call.status not in (400, 404) or call.media_type not in _EXPLAINED[call.status]:
        return False
    explanation = call.read_ahead(MAX_EXPLANATION)
    if explanation is not None:
        explanation = decoded(explanation, call.header("Content-Encoding"))
    if explanation is None:
        return False
    if call.media_type == headers.JSON:
        error = error_in(explanation)
        if error is None:
            return False
        explanation = bytes(error)
    words = explanation.lower()
    if call.status == 400:
        return any(each in words for each in _LOST)
    return (b"session" if call.media_type == headers.JSON else b"session not found") in words


def error_in(body: bytes) -> Raw | None:
    """The error of a JSON-RPC answer, whatever its id; None where there is none."""
    try:
        return _refusal.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decoded(data: bytes, coding: str | None) -> bytes | None:
    """The content of a body, None where its coding is not known, or it is too long."""
    coding = (coding or "identity").strip().lower()
    if coding not in ("gzip", "x-gzip", "deflate"):
        return data if coding == "identity" else None
    reader = zlib.decompressobj(_EITHER)
    try:
        found = reader.decompress(data, MAX_EXPLANATION)
    except zlib.error:
        return None
    return found if reader.eof else None


def relocated(given: Headers, call: HttpCall, mount: str) -> Headers:
    """Headers whose Location leads to the proxy where it named the backend of `call`."""
    return [
        (
            name,
            local_reference(call.address, call.host, value, mount)
            if name.lower() == "location"
            else value,
        )
        for name, value in given
    ]


def unbuffered(given: Headers) -> Headers:
    """An event stream's headers, with the one that keeps nginx from buffering its events."""
    if any(name.lower() == _BUFFERING[0].lower() for name, _ in given):
        return given
    return [*given, _BUFFERING]
