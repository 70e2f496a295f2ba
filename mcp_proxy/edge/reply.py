"""HTTP responses: a status, headers, and a body that is complete or a stream."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import NamedTuple, Protocol

from mcp_proxy.wire import sse
from mcp_proxy.wire.headers import EVENT_STREAM, JSON, Headers


class _StatusLines(dict[int, str]):
    def __missing__(self, status: int) -> str:
        return f"{status} Unknown"


#: The status with its phrase, as WSGI requires.
STATUS_LINES = _StatusLines(
    (status.value, f"{status.value} {status.phrase}") for status in HTTPStatus
)

# No proxy on the way may buffer or compress the stream.
_STREAM_HEADERS = (
    ("Content-Type", EVENT_STREAM),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)


class Body(Protocol):
    """A response body that is produced while it is sent; iterated at most once, always closed.

    `close` does all cleanup, also of a body that was never iterated; harmless when repeated.
    """

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class Reply(NamedTuple):
    """An HTTP response."""

    status: int
    headers: Headers
    body: bytes | Body


def json_reply(data: bytes, status: int = 200, extra: Headers | None = None) -> Reply:
    """A complete JSON document."""
    return Reply(
        status, [("Content-Type", JSON), ("Content-Length", str(len(data))), *(extra or ())], data
    )


def event_reply(data: bytes, extra: Headers | None = None) -> Reply:
    """A complete event stream of one message."""
    event = sse.encode_message(data)
    length = ("Content-Length", str(len(event)))
    return Reply(200, [*_STREAM_HEADERS, length, *(extra or ())], event)


def empty_reply(status: int, extra: Headers | None = None) -> Reply:
    """A response without a body: 202 Accepted, 204 No Content."""
    length = [] if status == HTTPStatus.NO_CONTENT else [("Content-Length", "0")]
    return Reply(status, [*length, *(extra or ())], b"")


def stream_reply(body: Body, extra: Headers | None = None) -> Reply:
    """An event stream."""
    return Reply(200, [*_STREAM_HEADERS, *(extra or ())], body)
