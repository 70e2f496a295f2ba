"""What two replicas say to each other about a call, and how it arrives whole, once and in order.

A call has a channel of its own. A message travels in one piece or in several; each piece has a
number, so that one that arrives twice is dropped and one that was lost is missed. The receiver
grants credit: no more than a window of pieces is ever on its way or unread, whatever the size of a
message and however slow its reader, and other channels are not held up.

No I/O and no threads here; the lock of a channel is never held while anything else is called.
"""

from __future__ import annotations

import enum
import threading
from collections import deque

import msgspec

from mcp_proxy.errors import (
    BackendDraining,
    BackendError,
    BackendExited,
    BackendLost,
    BackendNotStarted,
    BackendTimeout,
    BackendUnavailable,
    BackendUnreached,
    BadAnswer,
    Cancelled,
)

#: Pieces that may be under way or unread in one direction of a channel, and the bytes of each.
WINDOW = 64
PIECE = 64 * 1024

# Pieces that have made room before the other side is told so.
_GRANT = WINDOW // 2


class Kind(enum.IntEnum):
    """What a frame is for, and what its `number` means."""

    PIECE = 0  #: a piece of a message; the pieces of one direction are numbered from 1
    CREDIT = 1  #: so many pieces have made room, ever; a window more than that may be sent
    PROBE = 2  #: so many pieces were sent, and how many were by you?
    COUNT = 3  #: so many pieces were sent, in answer to a probe
    UNKNOWN = 4  #: the answer to a probe where there is no such channel


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """What an envelope holds. `more` says that the message goes on in the next piece."""

    channel: str
    sender: str
    kind: Kind
    number: int
    more: bool = False
    data: bytes = b""

    @property
    def is_first(self) -> bool:
        """Whether a call begins with this piece."""
        return self.kind == Kind.PIECE and self.number == 1


class Delivered(enum.Enum):
    """What is known of whether anything of a call has reached the other side."""

    NO = enum.auto()  #: nothing that was sent can have arrived
    MAYBE = enum.auto()  #: it is being sent, or the store failed while it had it
    YES = enum.auto()  #: it is in the other side's mailbox, or was read


_encoder = msgspec.msgpack.Encoder()
_frame_decoder = msgspec.msgpack.Decoder(Frame)

#: A frame or a message as bytes.
encode = _encoder.encode


def decode_frame(data: bytes) -> Frame:
    """The frame in an envelope; raises msgspec.DecodeError where it is none."""
    try:
        return _frame_decoder.decode(data)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from error


class Channel:
    """One side of the way between two replicas that a call has to itself. Thread-safe."""

    def __init__(self, name: str, own: str, peer: str) -> None:
        self.name = name
        self.peer = peer
        self.delivered = Delivered.NO  # set by the sender, and by the listener when it hears back
        self._own = own
        self._lock = threading.Lock()  # guards what follows
        self._outbound: deque[tuple[bytes, bool]] = deque()
        self._sent = 0
        self._allowed = WINDOW  # pieces that may be sent, ever
        self._received = 0
        self._pieces: list[bytes] = []
        self._unread = 0  # whole messages
        self._withheld = 0  # pieces of a message behind unread ones
        self._read = 0  # pieces that made room
        self._granted = 0  # of these, what the other side was told
        self._must_grant = False

    def __repr__(self) -> str:
        return (
            f"<Channel {self.name} sent={self._sent} waiting={len(self._outbound)}"
            f" allowed={self._allowed} received={self._received}>"
        )

    @property
    def has_room(self) -> bool:
        """Whether a message that is put now leaves at once."""
        return self._sent < self._allowed and not self._outbound

    @property
    def is_drained(self) -> bool:
        """Whether everything that was put has left."""
        return not self._outbound

    def count(self, kind: Kind) -> Frame:
        """A frame that says how many pieces were sent so far: a probe, or the answer to one."""
        return Frame(self.name, self._own, kind, self._sent)

    # --- outbound --------------------------------------------------------------------------------

    def put(self, message: bytes) -> None:
        """Adds a message to what is to be sent."""
        with self._lock:
            for end in range(PIECE, len(message), PIECE):
                self._outbound.append((message[end - PIECE : end], True))
            start = (len(message) - 1) // PIECE * PIECE if message else 0
            self._outbound.append((message[start:], False))

    def outgoing(self) -> list[Frame]:
        """What may be sent now: frames as far as credit goes, and credit that is due itself."""
        frames: list[Frame] = []
        with self._lock:
            if self._must_grant or self._read - self._granted >= _GRANT:
                frames.append(Frame(self.name, self._own, Kind.CREDIT, self._read))
                self._granted, self._must_grant = self._read, False
            while self._outbound and self._sent < self._allowed:
                data, more = self._outbound.popleft()
                self._sent += 1
                frames.append(Frame(self.name, self._own, Kind.PIECE, self._sent, more, data))
        return frames

    # --- inbound ---------------------------------------------------------------------------------

    def receive(self, frame: Frame) -> bytes | None:
        """The message that `frame` completes, None where it completes none or was here before.

        A piece that comes before an earlier one is passed over: it is sent again, or a probe finds
        that something was lost, and raises LookupError.
        """
        with self._lock:
            if frame.kind == Kind.CREDIT:
                self._allowed = max(self._allowed, WINDOW + frame.number)
                return None
            if frame.kind != Kind.PIECE:
                self._must_grant = True  # an earlier CREDIT frame may be lost
                self._require_all(frame.number)
                return None
            if frame.number != self._received + 1:
                return None
            self._received = frame.number
            if frame.more:
                self._pieces.append(frame.data)
                self._withheld += 1
                self._release_withheld()
                return None
            self._unread += 1
            pieces, self._pieces = self._pieces, []
            return b"".join([*pieces, frame.data]) if pieces else frame.data

    def _require_all(self, sent: int) -> None:
        if sent > self._received:
            raise LookupError(f"{sent} frames were sent and {self._received} received")

    def note_read(self) -> bool:
        """A message was read by whom it was for; True when credit is due to the other side."""
        with self._lock:
            self._unread -= 1
            self._read += 1
            if self._withheld:
                self._release_withheld()
            return self._read - self._granted >= _GRANT

    def _release_withheld(self) -> None:
        """A message must come whole before anybody can read it, but not ahead of unread ones."""
        if self._unread <= 0:
            self._read += self._withheld
            self._withheld = 0

    @property
    def has_sent(self) -> bool:
        """Whether any piece has been sent."""
        return self._sent > 0

    @property
    def is_credit_due(self) -> bool:
        """Whether the other side is to be told that it may send more."""
        return self._read - self._granted >= _GRANT


# --- messages to the owner of a child ------------------------------------------------------------


class SendRequests(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Requests for a child, a line each; `timeout` in seconds, 0 where there is none."""

    child: str
    lines: list[bytes]
    accepts_stream: bool
    timeout: float
    cancels: bool = False
    headers: dict[str, str] = {}


class Listen(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The standing stream of a child's session, after an event of an earlier one.

    Answered by Done once it has its place.
    """

    child: str
    after: str | None


class SendOneWay(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What has no answer here: a notification, a response, or a request for whose answer there is
    a standing stream (within `timeout` seconds). Answered by Done.
    """

    child: str
    line: bytes
    timeout: float = 0.0


class Close(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The session is over: the child is to end. Answered by Done."""

    child: str


class StartStream(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The client gets a stream: what is delivered from now on is to be logged."""


class Detach(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The client no longer listens."""


# --- messages from the owner of a child ----------------------------------------------------------


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """One message for the client.

    `failure` is the kind of the error and its sentence, where it is one.
    """

    data: bytes
    is_response: bool
    event_id: str | None
    failure: tuple[str, str] | None


class Ended(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A standing stream is over; `replaced` by a newer one."""

    replaced: bool


class Refused(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The owner could not do it, as `failure` says."""

    failure: tuple[str, str]


class Done(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What was asked for is done: what was told has reached the child, a stream has its place."""


ToOwner = SendRequests | SendOneWay | Listen | Close | StartStream | Detach
FromOwner = Message | Ended | Refused | Done

_to_owner: msgspec.msgpack.Decoder[ToOwner] = msgspec.msgpack.Decoder(ToOwner)
_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)

_FAILURES: dict[str, type[BackendError]] = {
    kind.__name__: kind
    for kind in (
        *(BackendLost, BackendNotStarted, BadAnswer, BackendUnreached, BackendExited),
        *(BackendTimeout, BackendUnavailable, BackendDraining, Cancelled),
    )
}


def decode_to_owner(data: bytes) -> ToOwner:
    """What the client's replica says; raises msgspec.DecodeError."""
    return _to_owner.decode(data)


def decode_from_owner(data: bytes) -> FromOwner:
    """What the owner says; raises msgspec.DecodeError."""
    return _from_owner.decode(data)


def failure_of(error: BackendError) -> tuple[str, str]:
    """An error as it travels."""
    return type(error).__name__, error.message


def error_of(failure: tuple[str, str]) -> BackendError:
    """The error that travelled."""
    kind, sentence = failure
    return _FAILURES.get(kind, BackendError)(sentence)
