"""A request on its way: whether its bytes are whole. No I/O, no clock.

Only one plain shape is followed: lines end with CRLF, and a body has one Content-Length of digits
or comes in chunks. What has any other shape is left to gunicorn's parser, which decides about every
request anyway: what is said here is only when it can read one without waiting.
"""

from __future__ import annotations

import enum
import re

#: Bytes of a body that have to come in a second, on the whole.
SLOWEST_BODY = 1024

#: The largest body that is kept here; a larger one is read while it arrives.
LARGEST_BODY = 256 * 1024

# The longest line before a chunk, and the longest trailer.
_LONGEST_LINE = 4096

_FIELD = re.compile(
    rb"\r\n(content-length|transfer-encoding|expect)[ \t]*:[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)",
    re.IGNORECASE,
)
_PROBE = re.compile(rb"(?:GET|HEAD) (/[^ ?]*)(?:\?[^ ]*)? HTTP/1\.[01]\r\n")
_ORIGIN = re.compile(rb"\r\norigin[ \t]*:", re.IGNORECASE)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")


class Shape(enum.Enum):
    """What is known of a request that is arriving."""

    HEAD = "its head is not whole"
    BODY = "its body is not whole"
    WHOLE = "it is whole"
    OTHER = "it has a shape that is not followed"
    TOO_LONG = "its head is longer than allowed"


class ArrivingRequest:
    """The bytes of one request, and of what may follow it."""

    def __init__(self, max_header_bytes: int) -> None:
        self.data = bytearray()
        self.shape = Shape.HEAD
        #: Whether the client waits for a 100 before it sends the body.
        self.expects_continue = False
        #: The bytes of the body as the head tells them, 0 where it does not.
        self.content_length = 0
        self._max_header_bytes = max_header_bytes
        self._is_chunked = False
        self._body_at = 0
        # Where the body ends, or, in chunks, the next one begins.
        self._next = 0

    def add(self, data: bytes) -> None:
        """Takes the next bytes."""
        seen = len(self.data)
        self.data += data
        if self.shape is Shape.HEAD:
            self._look_for_head(seen)
        if self.shape is Shape.BODY:
            self._look_for_end()

    def take(self) -> bytes:
        """The bytes, which are kept here no longer."""
        data = bytes(self.data)
        self.data.clear()
        return data

    @property
    def simple_path(self) -> str | None:
        """The path of a whole GET or HEAD that is just one: without a body, and of no page."""
        found = _PROBE.match(self.data) if self.shape is Shape.WHOLE else None
        if found is None or self.body_bytes or _ORIGIN.search(self.data):
            return None
        return found[1].decode("latin-1")

    @property
    def body_bytes(self) -> int:
        """The bytes of the body that have come, chunk sizes included."""
        return len(self.data) - self._body_at if self._body_at else 0

    def _look_for_head(self, seen: int) -> None:
        found = self.data.find(b"\r\n\r\n", max(0, seen - 3))
        end = found if found >= 0 else len(self.data)
        if end > self._max_header_bytes:
            self.shape = Shape.TOO_LONG
        elif self.data.startswith(b"\r\n") or self._has_bare_lf(seen, end):
            self.shape = Shape.OTHER
        elif found >= 0:
            self._body_at = self._next = found + 4
            self.shape = self._shape_after(bytes(self.data[: found + 2]))

    def _has_bare_lf(self, seen: int, end: int) -> bool:
        start = seen - self.data.endswith(b"\r", 0, seen)
        return self.data.count(b"\n", start, end) != self.data.count(b"\r\n", start, end)

    def _shape_after(self, head: bytes) -> Shape:
        lengths: list[bytes] = []
        codings: list[bytes] = []
        for name, value in _FIELD.findall(head):
            match name.lower():
                case b"content-length":
                    lengths.append(value)
                case b"transfer-encoding":
                    codings.append(value.lower())
                case _:
                    self.expects_continue |= value.lower() == b"100-continue"
        if codings:
            self._is_chunked = not lengths and codings == [b"chunked"]
            return Shape.BODY if self._is_chunked else Shape.OTHER
        if not lengths:
            return Shape.WHOLE
        if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
            return Shape.OTHER
        self.content_length = int(lengths[0])
        self._next += self.content_length
        return Shape.BODY if self.content_length <= LARGEST_BODY else Shape.OTHER

    def _look_for_end(self) -> None:
        if self._is_chunked:
            while self.shape is Shape.BODY and self._has_next_chunk():
                pass
        elif len(self.data) >= self._next:
            self.shape = Shape.WHOLE

    def _has_next_chunk(self) -> bool:
        """Goes on to the next chunk; whether the bytes that have come reach so far."""
        end = self.data.find(b"\r\n", self._next)
        if end < 0:
            if len(self.data) - self._next > _LONGEST_LINE:
                self.shape = Shape.OTHER
            return False
        size = bytes(self.data[self._next : end]).partition(b";")[0].strip(b" \t")
        if not _CHUNK_SIZE.fullmatch(size):
            self.shape = Shape.OTHER
        elif int(size, 16) == 0:
            return self._has_trailer(end)
        else:
            self._next = end + 2 + int(size, 16) + 2
            if self._next - self._body_at > LARGEST_BODY:
                self.shape = Shape.OTHER
        return self._next < len(self.data)

    def _has_trailer(self, last_line_end: int) -> bool:
        """Whether what follows the last chunk is whole; always False, as nothing comes after."""
        if self.data.find(b"\r\n\r\n", last_line_end) >= 0:
            self.shape = Shape.WHOLE
        elif len(self.data) - last_line_end > _LONGEST_LINE:
            self.shape = Shape.OTHER
        return False
