"""What a client gets: a status, headers and a body that is complete or a stream."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import NamedTuple, Protocol

from mcp_proxy.wire.headers import EVENT_STREAM, JSON, Headers

_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}

# No proxy on the way may keep the stream back or cut it into compressed blocks.
_STREAM_HEADERS = (
    ("Content-Type", EVENT_STREAM),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)


class Body(Protocol):
    """A response body that is produced while it is sent: iterated once, closed in any case.

    `close` owns all cleanup and is idempotent: a body that was never started is closed, too.
    """

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class Reply(NamedTuple):
    """An HTTP response."""

    status: int
    headers: Headers
    body: bytes | Body

    @property
    def status_line(self) -> str:
        """The status with its phrase, as WSGI wants it."""
        return _STATUS_LINES.get(self.status) or f"{self.status} Unknown"


def json_reply(data: bytes, status: int = 200, extra: Headers | None = None) -> Reply:
    """A complete JSON document."""
    return Reply(
        status, [("Content-Type", JSON), ("Content-Length", str(len(data))), *(extra or ())], data
    )


def empty_reply(status: int, extra: Headers | None = None) -> Reply:
    """No body: 202 for what was accepted, 204 for what is done."""
    length = [] if status == HTTPStatus.NO_CONTENT else [("Content-Length", "0")]
    return Reply(status, [*length, *(extra or ())], b"")


def stream_reply(body: Body, extra: Headers | None = None) -> Reply:
    """An event stream."""
    return Reply(200, [*_STREAM_HEADERS, *(extra or ())], body)
