"""Server-sent events (WHATWG HTML, section 9.2): an encoder and a decoder.

Everything is bytes: event data is passed on as it came, never decoded.
"""

from __future__ import annotations

import re

import msgspec

#: What a keepalive looks like: a comment, which every client ignores.
KEEPALIVE = b": keepalive\n\n"

_RETRY_DIGITS = 18  # milliseconds for longer than anybody waits

_LINE_END = re.compile(rb"\r\n|\n|\r")


class Event(msgspec.Struct, frozen=True):
    """One block of a stream: the fields that stood in it, None for those that did not."""

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
    """A `message` event around one line of JSON, the form in which MCP messages travel."""
    return message_head(event_id) + data + b"\n\n"


def message_head(event_id: str | None = None) -> bytes:
    """What stands before the line of JSON in a `message` event."""
    if event_id is None:
        return b"event: message\ndata: "
    return b"event: message\nid: " + event_id.encode() + b"\ndata: "


class Decoder:
    """Cuts a stream into events, whatever the pieces it arrives in and whatever the line endings.

    Not thread-safe. A block without any known field (a comment, say) makes no event. An event that
    the stream's end cuts off is dropped, as the standard wants it.
    """

    def __init__(self) -> None:
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
            return []
        complete[0] = b"".join([*self._pieces, complete[0]])
        self._pieces = [rest] if rest else []
        if self._at_start:
            self._at_start = False
            complete[0] = complete[0].removeprefix(b"\xef\xbb\xbf")
        return complete

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event" or self._is_sound(name, value):
            self._fields[name] = value

    def _is_sound(self, name: bytes, value: bytes) -> bool:
        """Whether an `id` or a `retry` counts: no NUL in the one, a sane number in the other."""
        if name == b"id":
            return b"\0" not in value
        return name == b"retry" and value.isdigit() and len(value) <= _RETRY_DIGITS

    def _dispatch(self) -> Event | None:
        fields, data = self._fields, self._data
        if not fields and not data:
            return None
        self._fields, self._data = {}, []
        return Event(
            data=b"\n".join(data) if data else None,
            event=fields.get(b"event"),
            id=fields.get(b"id"),
            retry=int(fields[b"retry"]) if b"retry" in fields else None,
        )
