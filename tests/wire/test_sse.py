"""Server-sent events by the rules of the WHATWG standard, whatever the pieces they arrive in."""

from __future__ import annotations

import itertools
import re
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcp_proxy.wire import sse
from mcp_proxy.wire.sse import Decoder, Event

BOM = b"\xef\xbb\xbf"


def decode(*pieces: bytes) -> list[Event]:
    decoder = Decoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def one_by_one(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


# --- the encoder ---------------------------------------------------------------------------------


def test_an_event_is_written_with_the_fields_it_has() -> None:
    event = Event(data=b"x", event=b"message", id=b"7", retry=10)
    assert sse.encode(event) == b"event: message\nid: 7\nretry: 10\ndata: x\n\n"
    assert sse.encode(Event(data=b"x")) == b"data: x\n\n"
    assert sse.encode(Event(retry=0)) == b"retry: 0\n\n"
    assert sse.encode(Event(id=b"", data=b"")) == b"id: \ndata: \n\n"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_every_line_of_the_data_gets_a_line_of_its_own(line_end: bytes) -> None:
    encoded = sse.encode(Event(data=line_end.join([b"a", b"", b" b"])))
    assert encoded == b"data: a\ndata: \ndata:  b\n\n"


def test_a_message_is_written_the_way_every_sdk_writes_it() -> None:
    assert sse.encode_message(b'{"a":1}') == sse.encode(Event(data=b'{"a":1}', event=b"message"))


def test_a_keepalive_is_no_event() -> None:
    assert sse.KEEPALIVE.startswith(b":")
    assert decode(sse.KEEPALIVE * 3) == []


# --- the decoder: fields -------------------------------------------------------------------------

BLOCKS = {
    "data": (b"data: x\n\n", Event(data=b"x")),
    "no space after the colon": (b"data:x\n\n", Event(data=b"x")),
    "only one space is taken away": (b"data:  x\n\n", Event(data=b" x")),
    "a tab stays": (b"data:\tx\n\n", Event(data=b"\tx")),
    "space at the end stays": (b"data: x \n\n", Event(data=b"x ")),
    "colons in the value stay": (b"data: a:b: c\n\n", Event(data=b"a:b: c")),
    "empty data": (b"data:\n\n", Event(data=b"")),
    "a name without a colon": (b"data\n\n", Event(data=b"")),
    "several lines of data": (b"data: a\ndata:\ndata: b\n\n", Event(data=b"a\n\nb")),
    "data lines apart": (b"data: a\nevent: e\ndata: b\n\n", Event(data=b"a\nb", event=b"e")),
    "bytes that are no UTF-8": (b"data: \xff\0\n\n", Event(data=b"\xff\0")),
    "event": (b"event: e\ndata: x\n\n", Event(data=b"x", event=b"e")),
    "the last event name counts": (b"event: a\nevent: b\n\n", Event(event=b"b")),
    "id": (b"id: 1\ndata: x\n\n", Event(data=b"x", id=b"1")),
    "an empty id": (b"id\ndata: x\n\n", Event(data=b"x", id=b"")),
    "the last id counts": (b"id: 1\nid: 2\n\n", Event(id=b"2")),
    "an id with NUL is ignored": (b"id: 1\nid: 2\x003\n\n", Event(id=b"1")),
    "retry": (b"retry: 2500\n\n", Event(retry=2500)),
    "retry with zeros in front": (b"retry: 007\n\n", Event(retry=7)),
    "retry with a sign is ignored": (b"retry: -1\ndata: x\n\n", Event(data=b"x")),
    "retry with a fraction is ignored": (b"retry: 1.5\ndata: x\n\n", Event(data=b"x")),
    "retry with a unit is ignored": (b"retry: 1s\ndata: x\n\n", Event(data=b"x")),
    "retry with a space behind is ignored": (b"retry: 1 \ndata: x\n\n", Event(data=b"x")),
    "retry without digits is ignored": (b"retry:\ndata: x\n\n", Event(data=b"x")),
    "retry in other digits is ignored": ("retry: ٣\ndata: x\n\n".encode(), Event(data=b"x")),
    "a bad retry leaves a good one": (b"retry: 5\nretry: x\n\n", Event(retry=5)),
    "comments": (b": hello\ndata: x\n:\n\n", Event(data=b"x")),
    "unknown fields": (b"colour: red\ndata: x\nx\n\n", Event(data=b"x")),
    "names are case-sensitive": (b"Data: y\ndata: x\n\n", Event(data=b"x")),
    "names keep their spaces": (b" data: y\ndata : z\ndata: x\n\n", Event(data=b"x")),
}


@pytest.mark.parametrize(("stream", "event"), BLOCKS.values(), ids=BLOCKS.keys())
def test_a_block_is_read_by_the_rules_of_the_standard(stream: bytes, event: Event) -> None:
    assert decode(stream) == [event]
    assert decode(*one_by_one(stream)) == [event]


@pytest.mark.parametrize(
    "stream",
    [b"", b"\n", b"\r\n\r\n", b": note\n\n", b"x: y\n\n", b"id: \0\n\n", b"retry: x\n\n"],
)
def test_a_block_without_a_field_that_counts_makes_no_event(stream: bytes) -> None:
    assert decode(stream) == []


def test_fields_do_not_leak_into_the_next_event() -> None:
    stream = b"id: 1\nevent: e\nretry: 3\ndata: a\n\ndata: b\n\n"
    assert decode(stream) == [Event(b"a", b"e", b"1", 3), Event(data=b"b")]


def test_a_retry_of_more_digits_than_python_converts_breaks_nothing() -> None:
    (event,) = decode(b"retry: " + b"9" * 5000 + b"\ndata: x\n\n")
    assert event.data == b"x"


@pytest.mark.parametrize("end", [b"", b"data: last", b"data: last\n", b"event: e\r\n"])
def test_what_the_end_of_the_stream_cuts_off_is_dropped(end: bytes) -> None:
    assert decode(b"data: x\n\n" + end) == [Event(data=b"x")]


# --- the decoder: line ends and pieces -----------------------------------------------------------


@pytest.mark.parametrize("first", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("second", [b"\n", b"\r\n", b"\r"])
def test_line_ends_of_every_kind_may_be_mixed(first: bytes, second: bytes) -> None:
    stream = b"event: e" + first + b"data: x" + second + second + b"data: y" + first + first
    expected = [Event(data=b"x", event=b"e"), Event(data=b"y")]
    assert decode(stream) == decode(*one_by_one(stream)) == expected


def test_an_event_is_there_as_soon_as_its_blank_line_ends_in_cr() -> None:
    decoder = Decoder()
    assert decoder.feed(b"data: x\r\n\r") == [Event(data=b"x")]
    assert decoder.feed(b"\ndata: y\r\n\r\n") == [Event(data=b"y")]


@pytest.mark.parametrize(
    "pieces",
    [
        (b"data: x\r", b"\ndata: y\r\n\r\n"),
        (b"data: x\r", b"\n", b"data: y\r\n\r\n"),
        (b"data: x\r", b"", b"\n", b"data: y\r\n\r\n"),
        (b"data: x\r", b"\n", b"data: y\r", b"\n\r", b"\n"),
        (b"data: x", b"\r", b"\n", b"data: y", b"\r", b"\n", b"\r", b"\n"),
    ],
)
def test_a_crlf_that_is_cut_in_two_is_one_line_end(pieces: tuple[bytes, ...]) -> None:
    assert decode(*pieces) == [Event(data=b"x\ny")]


@pytest.mark.parametrize(
    "pieces",
    [
        (b"data: x\r", b"\n\n"),
        (b"data: x\r", b"\n", b"\n"),
        (b"data: x\r", b"\r"),
        (b"data: x\n", b"\r"),
        (b"data: x\r", b"\n\r", b"\n"),
    ],
)
def test_two_line_ends_end_the_event_however_they_are_cut(pieces: tuple[bytes, ...]) -> None:
    assert decode(*pieces) == [Event(data=b"x")]


def test_a_line_may_arrive_in_many_pieces() -> None:
    assert decode(b"da", b"ta", b": ", b"a", b"", b"b\n", b"\n") == [Event(data=b"ab")]


@pytest.mark.parametrize(
    "pieces",
    [
        (BOM + b"data: x\n\n",),
        (BOM, b"data: x\n\n"),
        (b"\xef", b"\xbb\xbfdata: x\n\n"),
        (b"\xef\xbb", b"\xbf", b"data: x\n\n"),
        (b"", BOM[:1], b"", BOM[1:], b"data: x\n", b"\n"),
        (BOM + b"\n", b"data: x\n\n"),
    ],
)
def test_a_byte_order_mark_at_the_start_is_skipped(pieces: tuple[bytes, ...]) -> None:
    assert decode(*pieces) == [Event(data=b"x")]


@pytest.mark.parametrize(
    "stream",
    [
        b"data: x\n" + BOM + b"data: y\n\n",
        b"\n" + BOM + b"data: y\ndata: x\n\n",
        BOM + BOM + b"data: y\ndata: x\n\n",
        b":\r" + BOM + b"data: y\rdata: x\r\r",
    ],
)
def test_a_byte_order_mark_anywhere_else_is_part_of_its_line(stream: bytes) -> None:
    assert decode(stream) == decode(*one_by_one(stream)) == [Event(data=b"x")]


def test_a_byte_order_mark_in_the_data_stays() -> None:
    assert decode(b"data: " + BOM + b"\n\n") == [Event(data=BOM)]


# --- properties ----------------------------------------------------------------------------------

_streams = st.lists(
    st.sampled_from([b"data", b"event", b"id", b"retry", b":", b": ", b" ", b"x", b"12", b"\0"])
    | st.sampled_from([b"\r", b"\n", b"\r\n", b"\n\n", BOM, BOM[:2], b"data: x\n\n", "é".encode()])
    | st.binary(max_size=3)
).map(b"".join)


def _cut(stream: bytes, points: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(point, len(stream)) for point in points), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


def _by_the_book(stream: bytes) -> list[Event]:
    """The whole stream at once, read as the standard's grammar is written."""
    *lines, _ = re.split(rb"\r\n|\r|\n", stream.removeprefix(BOM))
    events: list[Event] = []
    fields: dict[str, bytes] = {}
    data: list[bytes] = []
    for line in lines:
        if line:
            _note(line, fields, data)
        elif fields or data:
            retry = int(fields["retry"]) if "retry" in fields else None
            body = b"\n".join(data) if data else None
            events.append(Event(body, fields.get("event"), fields.get("id"), retry))
            fields, data = {}, []
    return events


def _note(line: bytes, fields: dict[str, bytes], data: list[bytes]) -> None:
    found = re.fullmatch(rb"([^:]*)(?:: ?)?(.*)", line, re.DOTALL)
    assert found is not None
    name, value = found.groups()
    if name == b"data":
        data.append(value)
    elif name == b"event" or (name == b"id" and b"\0" not in value):
        fields[name.decode()] = value
    elif name == b"retry" and re.fullmatch(rb"[0-9]+", value):
        fields["retry"] = value


@given(_streams, st.lists(st.integers(0, 60), max_size=8))
@example(b"data: x\r\ndata: y\r\n\r\n", [8, 9, 18, 19])
@example(BOM + b"data: x\r\r", [1, 2, 3])
def test_events_are_the_same_however_the_stream_is_cut(stream: bytes, points: list[int]) -> None:
    expected = _by_the_book(stream)
    assert decode(stream) == expected
    assert decode(*_cut(stream, points)) == expected
    assert decode(*one_by_one(stream)) == expected


_words = st.binary(max_size=6).map(lambda word: re.sub(rb"[\r\n\0]", b"", word))
_events = st.builds(
    Event,
    data=st.none() | st.binary() | st.sampled_from([b"a\nb", b"a\r\n b", b"\n", b"\r"]),
    event=st.none() | _words,
    id=st.none() | _words,
    retry=st.none() | st.integers(0, 10**12),
)


@given(st.lists(_events), st.lists(st.integers(0, 200), max_size=8))
def test_what_is_encoded_is_decoded(events: list[Event], points: list[int]) -> None:
    stream = b"".join(map(sse.encode, events))
    expected = [_with_plain_line_ends(event) for event in events if event != Event()]
    assert decode(*_cut(stream, points)) == expected


def _with_plain_line_ends(event: Event) -> Event:
    if event.data is None:
        return event
    data = re.sub(rb"\r\n|\r", b"\n", event.data)
    return Event(data, event.event, event.id, event.retry)


# --- the bound -----------------------------------------------------------------------------------

LARGE = [b"data: " + b"x" * 100, b"id: 1\ndata: " + b"x" * 100 + b"\ndata: y", b"data\n" * 30]


@pytest.mark.parametrize("block", LARGE)
@pytest.mark.parametrize("size", [1, 7, 64, 128, 135, 1000])
def test_an_event_over_the_limit_is_dropped_and_the_next_is_not(block: bytes, size: int) -> None:
    stream = b"data: a\n\n" + block + b"\n\ndata: b\n\n"
    decoder = Decoder(limit=60)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    found = [event.data for piece in pieces for event in decoder.feed(piece)]
    assert found == [b"a", b"b"]


@pytest.mark.parametrize("unit", [b"x", b"data: x\n", b"data: x", b":\n", b"id: 1\n"])
def test_a_stream_without_a_blank_line_is_held_to_the_limit_only(unit: bytes) -> None:
    decoder = Decoder(limit=1000)
    tracemalloc.start()
    try:
        for _ in range(2000):
            assert decoder.feed(unit * 100) == []
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 20_000
    assert [event.data for event in decoder.feed(b"\n\ndata: b\n\n")] == [b"b"]


@given(st.lists(st.sampled_from([b"data: x", b"id: 7", b"\n", b"\r", b":"]), max_size=30))
def test_a_limit_that_is_not_reached_changes_nothing(pieces: list[bytes]) -> None:
    assert decode(*pieces) == [e for d in [Decoder(10_000)] for p in pieces for e in d.feed(p)]
