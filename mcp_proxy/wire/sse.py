"""Server-sent events (WHATWG HTML, section 9.2): an encoder and a decoder.

Everything is bytes: event data is passed on as it came, never decoded.
"""

from __future__ import annotations

import math
import re

import msgspec

#: A comment, which every client ignores.
KEEPALIVE = b": keepalive\n\n"

#: What may stand before the first event (section 9.2.5).
BOM = b"\xef\xbb\xbf"

_RETRY_DIGITS = 18  # a bound for `int`; 10^18 milliseconds are 30 million years

_LINE_END = re.compile(rb"\r\n|\n|\r")
_LINE = re.compile(rb"([^\r\n]*)(\r\n|\n|\r|\Z)")

#: CRLF, LF and CR end a line (section 9.2.5), so two of them end a block.
BLOCK_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
LONGEST_BLOCK_END = 4


class Event(msgspec.Struct, frozen=True):
    """One block of a stream; a field that the block does not have is None."""

    data: bytes | None = None
    event: bytes | None = None
    id: bytes | None = None
    retry: int | None = None


def encode(event: Event) -> bytes:
    """`event` as bytes on the wire, ended by its blank line."""
    lines = []
    if event.event is not None:
        lines.append(b"event: " + event.event)
    if event.id is not None:
        lines.append(b"id: " + event.id)
    if event.retry is not None:
        lines.append(b"retry: %d" % event.retry)
    if event.data is not None:
        lines.extend(b"data: " + line for line in _LINE_END.split(event.data))
    return b"\n".join(lines) + b"\n\n"


def encode_message(data: bytes, event_id: str | None = None) -> bytes:
    """A `message` event with one line of JSON as its data: the form of MCP messages."""
    return message_head(event_id) + data + b"\n\n"


def message_head(event_id: str | None = None) -> bytes:
    """The bytes before the line of JSON in a `message` event."""
    if event_id is None:
        return b"event: message\ndata: "
    return b"event: message\nid: " + event_id.encode() + b"\ndata: "


def fields_of(block: bytes) -> list[tuple[bytes, bytes]]:
    """The name and the value of each line of a block."""
    return [_field(line) for line, _ in _LINE.findall(block)]


def data_of(block: bytes) -> bytes:
    """The data of a block, empty where it has none."""
    return b"\n".join(value for name, value in fields_of(block) if name == b"data")


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name, value.removeprefix(b" ")


def with_data(block: bytes, data: bytes) -> bytes:
    """`block` with `data`, one line, on its first data line; its other data lines become comments.

    No line is removed: a CR before it and an LF after it would become one line end.
    """
    lines: list[bytes] = []
    is_written = False
    for line, end in _LINE.findall(block):
        if _field(line)[0] != b"data":
            lines.append(line)
        elif is_written:
            lines.append(b":")
        else:
            lines.append((b"data: " if line.startswith(b"data: ") else b"data:") + data)
            is_written = True
        lines.append(end)
    return b"".join(lines)


class Decoder:
    """Splits a stream into events, for any split into pieces and any line endings.

    Not thread-safe. A block without a known field (a comment, say) is no event. An event that the
    stream's end cuts off is dropped, as the standard requires, and so is one that takes more than
    `limit` bytes.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self._limit = limit
        self._held = 0  # bytes of the block so far
        self._is_dropped = False  # that block
        self._pieces: list[bytes] = []
        self._swallow_newline = False
        self._at_start = True
        self._fields: dict[bytes, bytes] = {}
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes, in order."""
        events = []
        for line in self._lines(piece):
            if line:
                self._take(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        return events

    def _lines(self, piece: bytes) -> list[bytes]:
        """The lines that `piece` completes. A CR ends a line at once; its LF may come later."""
        if self._swallow_newline and piece:
            piece = piece.removeprefix(b"\n")
            self._swallow_newline = False
        if not piece:
            return []
        self._swallow_newline = piece.endswith(b"\r")
        *complete, rest = _LINE_END.split(piece)
        if not complete:
            self._pieces.append(rest)
            self._hold(len(rest))
            if self._is_dropped:
                self._pieces = [b":"]  # the rest of the line is a comment
            return []
        complete[0] = b"".join([*self._pieces, complete[0]])
        self._pieces = [rest] if rest else []
        if self._at_start:
            self._at_start = False
            complete[0] = complete[0].removeprefix(BOM)
        return complete

    def _hold(self, size: int) -> None:
        """Counts bytes of the block; gives the block up where they are too many."""
        self._held += size
        if self._held > self._limit:
            self._is_dropped = True
            self._fields, self._data = {}, []

    def _take(self, line: bytes) -> None:
        if self._is_dropped:
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event" or self._is_sound(name, value):
            self._fields[name] = value
        self._hold(len(line))

    def _is_sound(self, name: bytes, value: bytes) -> bool:
        """Whether this is an `id` without NUL, or a `retry` with a number of bounded length."""
        if name == b"id":
            return b"\0" not in value
        return name == b"retry" and value.isdigit() and len(value) <= _RETRY_DIGITS

    def _dispatch(self) -> Event | None:
        fields, data = self._fields, self._data
        self._held, self._is_dropped = 0, False
        if not fields and not data:
            return None
        self._fields, self._data = {}, []
        return Event(
            data=b"\n".join(data) if data else None,
            event=fields.get(b"event"),
            id=fields.get(b"id"),
            retry=int(fields[b"retry"]) if b"retry" in fields else None,
        )
