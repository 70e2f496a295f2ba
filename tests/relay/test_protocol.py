"""Channels and messages: whole, once and in order, whatever happens to single frames."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.errors import (
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    Cancelled,
)
from mcp_proxy.relay import protocol
from mcp_proxy.relay.protocol import WINDOW, Channel, Frame, Kind

#: Bytes of a piece here: as many pieces as anywhere, of less data.
PIECE = 64


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "PIECE", PIECE)
        yield


_SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 7]),
    st.sampled_from([(WINDOW - 1) * PIECE, WINDOW * PIECE, WINDOW * PIECE + 1, 3 * WINDOW * PIECE]),
)


def message_of(size: int, number: int) -> bytes:
    """A message that is told from every other one, if it has any bytes."""
    return (b"%d;" % number * (size // 2 + 1))[:size]


class Wire:
    """Two ends, what is on its way between them, and a reader who takes messages when told to."""

    def __init__(self) -> None:
        self.sender = Channel("c", "a", "b")
        self.receiver = Channel("c", "b", "a")
        self.there: deque[Frame] = deque()
        self.back: deque[Frame] = deque()
        self.history: list[Frame] = []
        self.unread: deque[bytes] = deque()
        self.read: list[bytes] = []

    def send(self) -> None:
        """The sender's courier runs."""
        outgoing = self.sender.outgoing()
        self.history += outgoing
        self.there.extend(outgoing)

    def arrive(self) -> None:
        """The next frame arrives, if there is one."""
        if self.there:
            self.receive(self.there.popleft())

    def receive(self, frame: Frame) -> None:
        """A frame arrives, as it went over the wire."""
        message = self.receiver.receive(protocol.decode_frame(protocol.encode(frame)))
        if message is not None:
            self.unread.append(message)

    def read_one(self) -> None:
        """The reader takes a message."""
        if self.unread:
            self.read.append(self.unread.popleft())
            self.receiver.note_read()

    def grant(self) -> None:
        """The receiver's courier runs."""
        self.back.extend(self.receiver.outgoing())
        while self.back:
            assert self.sender.receive(self.back.popleft()) is None

    def finish(self) -> None:
        """Everything goes on until nothing moves any more."""
        idle = 0
        while not (self.sender.is_drained and not self.there and not self.unread):
            before = (len(self.history), len(self.read))
            self.send()
            while self.there:
                self.arrive()
            while self.unread:
                self.read_one()
            self.grant()
            idle = idle + 1 if before == (len(self.history), len(self.read)) else 0
            assert idle < 3, "it hangs"


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), _SIZES),
        st.tuples(
            st.sampled_from(["send", "arrive", "arrive", "read", "grant"]), st.integers(1, 80)
        ),
        st.tuples(st.just("again"), st.integers(0, 1000)),
    ),
    max_size=40,
)


@given(_STEPS)
def test_messages_come_whole_once_and_in_order(steps: list[tuple[str, int]]) -> None:
    wire = Wire()
    put: list[bytes] = []
    for action, detail in steps:
        if action == "put":
            put.append(message_of(detail, len(put)))
            wire.sender.put(put[-1])
        elif action == "again" and wire.history:  # a piece that was sent before arrives once more
            frame = wire.history[detail % len(wire.history)]
            if frame not in wire.there:
                wire.receive(frame)
        elif action == "send":
            wire.send()
        elif action == "grant":
            wire.grant()
        for _ in range(detail):
            if action == "arrive":
                wire.arrive()
            elif action == "read":
                wire.read_one()
    wire.finish()
    assert wire.read == put


@given(st.lists(st.integers(0, PIECE), max_size=4 * WINDOW), st.integers(1, WINDOW))
def test_no_more_than_a_window_of_pieces_is_under_way_or_unread(
    sizes: list[int], greed: int
) -> None:
    wire = Wire()
    for number, size in enumerate(sizes):
        wire.sender.put(message_of(size, number))
    while len(wire.read) < len(sizes):
        wire.send()
        assert len(wire.there) + len(wire.unread) <= WINDOW
        while wire.there:
            wire.arrive()
        for _ in range(min(greed, len(wire.unread))):
            wire.read_one()
        wire.grant()
    assert wire.read == [message_of(size, number) for number, size in enumerate(sizes)]


def test_a_slow_reader_holds_no_more_than_a_window_beside_the_message_it_is_reading() -> None:
    wire, size = Wire(), 3 * WINDOW * PIECE
    for number in range(5):
        wire.sender.put(message_of(size, number))
    for _ in range(40):  # nobody reads
        wire.send()
        while wire.there:
            wire.arrive()
        wire.grant()
    assert sum(map(len, wire.unread)) <= size + WINDOW * PIECE
    wire.finish()
    assert [len(message) for message in wire.read] == [size] * 5


def test_credit_that_arrives_twice_counts_once() -> None:
    wire = Wire()
    for number in range(4 * WINDOW):
        wire.sender.put(b"%d" % number)
    wire.send()
    for _ in range(WINDOW):
        wire.arrive()
        wire.read_one()
    (credit,) = wire.receiver.outgoing()
    assert credit.kind == Kind.CREDIT
    wire.sender.receive(credit)
    wire.sender.receive(credit)
    wire.send()
    assert len(wire.there) <= WINDOW


def test_credit_that_was_lost_is_noticed_or_made_good() -> None:
    wire = Wire()
    for number in range(WINDOW + 1):
        wire.sender.put(b"%d" % number)
    wire.send()
    for _ in range(WINDOW):
        wire.arrive()
        wire.read_one()
    assert [frame.kind for frame in wire.receiver.outgoing()] == [Kind.CREDIT]  # and it is lost
    try:
        wire.sender.receive(wire.receiver.count(Kind.PROBE))
        wire.receiver.receive(wire.sender.count(Kind.COUNT))
    except LookupError:
        return  # whoever waits is told
    wire.finish()
    assert len(wire.read) == WINDOW + 1


@given(st.lists(_SIZES, min_size=1, max_size=5), st.data())
def test_a_probe_finds_a_piece_that_was_lost(sizes: list[int], data: st.DataObject) -> None:
    wire = Wire()
    for number, size in enumerate(sizes):
        wire.sender.put(message_of(size, number))
    wire.send()
    lost = data.draw(st.integers(0, len(wire.there) - 1))
    del wire.there[lost]
    while wire.there:
        wire.arrive()
    assert len(wire.unread) <= len(sizes)
    for kind in (Kind.PROBE, Kind.COUNT):
        with pytest.raises(LookupError):
            wire.receiver.receive(wire.sender.count(kind))
    assert list(wire.unread) == [
        message_of(size, number) for number, size in enumerate(sizes[: len(wire.unread)])
    ]


@given(st.lists(_SIZES, max_size=4))
def test_a_probe_finds_nothing_where_nothing_was_lost(sizes: list[int]) -> None:
    wire = Wire()
    for number, size in enumerate(sizes):
        wire.sender.put(message_of(size, number))
    wire.send()
    while wire.there:
        wire.arrive()
    for kind in (Kind.PROBE, Kind.COUNT):
        assert wire.receiver.receive(wire.sender.count(kind)) is None
        assert wire.sender.receive(wire.receiver.count(kind)) is None


@given(st.lists(st.integers(0, 2 * PIECE), min_size=2, max_size=WINDOW // 3), st.data())
def test_pieces_that_come_twice_or_again_later_change_nothing(
    sizes: list[int], data: st.DataObject
) -> None:
    wire = Wire()
    for number, size in enumerate(sizes):
        wire.sender.put(message_of(size, number))
    wire.send()
    pieces = list(wire.there)
    for position in range(len(pieces)):
        again = data.draw(st.lists(st.integers(0, position), max_size=2))
        for index in [position, *again]:
            wire.receive(pieces[index])
    assert list(wire.unread) == [message_of(size, n) for n, size in enumerate(sizes)]


def test_pieces_that_overtook_are_passed_over_until_they_come_again() -> None:
    wire = Wire()
    for number in range(3):
        wire.sender.put(b"%d" % number)
    first, second, third = wire.sender.outgoing()
    for frame in (second, third, first, second, third):
        wire.receive(frame)
    assert list(wire.unread) == [b"0", b"1", b"2"]


def test_both_directions_are_independent() -> None:
    one, other = Channel("c", "a", "b"), Channel("c", "b", "a")
    one.put(b"ping")
    other.put(b"pong")
    assert [other.receive(frame) for frame in one.outgoing()] == [b"ping"]
    assert [one.receive(frame) for frame in other.outgoing()] == [b"pong"]


def test_a_channel_says_whether_there_is_room() -> None:
    channel = Channel("c", "a", "b")
    assert channel.has_room
    assert channel.is_drained
    for _ in range(WINDOW + 1):
        channel.put(b"x")
    assert not channel.has_room
    assert not channel.is_drained
    assert [frame.number for frame in channel.outgoing()] == list(range(1, WINDOW + 1))
    assert not channel.is_drained
    assert channel.outgoing() == []
    reader = Channel("c", "b", "a")
    for _ in range(WINDOW):
        reader.note_read()
    for credit in reader.outgoing():
        channel.receive(credit)
    assert len(channel.outgoing()) == 1
    assert channel.is_drained
    assert channel.has_room


def test_credit_is_due_after_half_a_window() -> None:
    channel = Channel("c", "a", "b")
    due = [channel.note_read() for _ in range(WINDOW // 2)]
    assert due == [False] * (WINDOW // 2 - 1) + [True]
    assert channel.is_credit_due
    assert [frame.kind for frame in channel.outgoing()] == [Kind.CREDIT]
    assert not channel.is_credit_due
    assert channel.outgoing() == []


@pytest.mark.parametrize(
    ("size", "pieces"), [(0, 1), (1, 1), (PIECE, 1), (PIECE + 1, 2), (2 * PIECE, 2)]
)
def test_a_message_has_as_many_pieces_as_it_needs(size: int, pieces: int) -> None:
    channel = Channel("c", "a", "b")
    channel.put(b"x" * size)
    sent = channel.outgoing()
    assert [frame.more for frame in sent] == [True] * (pieces - 1) + [False]
    assert all(len(frame.data) <= PIECE for frame in sent)
    assert [frame.number for frame in sent] == list(itertools.islice(itertools.count(1), pieces))


# --- as bytes ------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_FAILURE = st.tuples(st.sampled_from(["BackendLost", "Cancelled"]), _TEXT)

_FRAMES = st.builds(
    Frame,
    _TEXT,
    _TEXT,
    st.sampled_from(Kind),
    st.integers(0, 2**62),
    st.booleans(),
    st.binary(max_size=500),
)
_TO_OWNER = st.one_of(
    st.builds(
        protocol.SendRequests,
        _TEXT,
        st.lists(st.binary(max_size=300), max_size=4),
        st.booleans(),
        st.floats(0, 1e6),
    ),
    st.builds(protocol.Listen, _TEXT, st.none() | _TEXT),
    st.builds(protocol.SendOneWay, _TEXT, st.binary(max_size=300)),
    st.builds(protocol.Close, _TEXT),
    st.builds(protocol.StartStream),
    st.builds(protocol.Detach),
)
_FROM_OWNER = st.one_of(
    st.builds(
        protocol.Message,
        st.binary(max_size=300),
        st.booleans(),
        st.none() | _TEXT,
        st.none() | _FAILURE,
    ),
    st.builds(protocol.Ended, st.booleans()),
    st.builds(protocol.Refused, _FAILURE),
    st.builds(protocol.Done),
)


@given(_FRAMES)
def test_a_frame_is_read_as_it_was_written(frame: Frame) -> None:
    assert protocol.decode_frame(protocol.encode(frame)) == frame


@given(_TO_OWNER)
def test_a_message_to_an_owner_is_read_as_it_was_written(said: protocol.ToOwner) -> None:
    assert protocol.decode_to_owner(protocol.encode(said)) == said


@given(_FROM_OWNER)
def test_a_message_from_an_owner_is_read_as_it_was_written(said: protocol.FromOwner) -> None:
    assert protocol.decode_from_owner(protocol.encode(said)) == said


@given(st.binary(max_size=200))
def test_what_is_no_frame_is_an_error_that_the_listener_expects(data: bytes) -> None:
    try:
        frame = protocol.decode_frame(data)
    except msgspec.DecodeError:
        return
    assert isinstance(frame, Frame)


@given(_TO_OWNER, _FROM_OWNER)
def test_neither_side_understands_what_only_the_other_says(
    to_owner: protocol.ToOwner, from_owner: protocol.FromOwner
) -> None:
    with pytest.raises(msgspec.DecodeError):
        protocol.decode_from_owner(protocol.encode(to_owner))
    with pytest.raises(msgspec.DecodeError):
        protocol.decode_to_owner(protocol.encode(from_owner))


@pytest.mark.parametrize("kind", [BackendLost, BackendTimeout, BackendUnreached, Cancelled])
def test_an_error_travels_with_its_kind_and_sentence(kind: type[BackendError]) -> None:
    error = protocol.error_of(protocol.failure_of(kind("It ended (exit code 3)")))
    assert type(error) is kind
    assert error.message == "It ended (exit code 3)"


def test_an_error_of_an_unknown_kind_is_an_error_of_the_backend() -> None:
    error = protocol.error_of(("BackendOnFire", "It burns"))
    assert type(error) is BackendError
    assert error.message == "It burns"


#: What replicas of other versions send: a deployment that rolls has both at the same time.
RECORDED = [
    (Frame("r/1", "r", Kind.PIECE, 1, False, b"x"), "96a3722f31a1720001c2c40178"),
    (Frame("r/1", "r", Kind.CREDIT, 32), "96a3722f31a1720120c2c400"),
    (
        protocol.SendRequests("c", [b"{}"], True, 5.0),
        "97ac53656e645265717565737473a16391c4027b7dc3cb4014000000000000c280",
    ),
    (
        protocol.SendRequests("c", [b"{}"], True, 5.0, True, {"a": "b"}),
        "97ac53656e645265717565737473a16391c4027b7dc3cb4014000000000000c381a161a162",
    ),
    (
        protocol.SendOneWay("c", b"{}"),
        "94aa53656e644f6e65576179a163c4027b7dcb0000000000000000",
    ),
    (protocol.Listen("c", None), "93a64c697374656ea163c0"),
    (protocol.Close("c"), "92a5436c6f7365a163"),
    (protocol.StartStream(), "91ab537461727453747265616d"),
    (protocol.Detach(), "91a6446574616368"),
    (
        protocol.Message(b"{}", True, "e", ("BackendLost", "x")),
        "95a74d657373616765c4027b7dc3a16592ab4261636b656e644c6f7374a178",
    ),
    (protocol.Ended(False), "92a5456e646564c2"),
    (
        protocol.Refused(("BackendLost", "x")),
        "92a75265667573656492ab4261636b656e644c6f7374a178",
    ),
    (protocol.Done(), "91a4446f6e65"),
]


@pytest.mark.parametrize(("said", "recorded"), RECORDED)
def test_what_goes_over_the_wire_stays_what_it_is(said: msgspec.Struct, recorded: str) -> None:
    assert protocol.encode(said).hex() == recorded


def test_what_a_replica_of_an_older_version_asks_for_is_understood() -> None:
    recorded = "95ac53656e645265717565737473a16391c4027b7dc3cb4014000000000000"
    asked = protocol.decode_to_owner(bytes.fromhex(recorded))
    assert asked == protocol.SendRequests("c", [b"{}"], True, 5.0)
