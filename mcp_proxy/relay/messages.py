"""What replicas say to each other about one exchange; each message is one or more frames."""

from __future__ import annotations

import msgspec

from mcp_proxy.errors import (
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnavailable,
    BackendUnreached,
    Cancelled,
)

# --- to the owner of a child ---------------------------------------------------------------------


class Call(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Requests for a child, a line each; `timeout` in seconds."""

    child: str
    lines: list[bytes]
    accepts_stream: bool
    timeout: float


class Listen(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The standing stream of a child's session, after an event of an earlier one.

    Answered by Done once it has its place.
    """

    child: str
    after: str | None


class Tell(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What has no answer here: a notification, a response, or a request for whose answer there is
    a standing stream (within `timeout` seconds). Answered by Done.
    """

    child: str
    line: bytes
    timeout: float = 0.0


class Stop(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The session is over: the child is to end. Answered by Done."""

    child: str


class Begin(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The client gets a stream: what is delivered from now on is to be logged."""


class Leave(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The client no longer listens."""


# --- from the owner of a child -------------------------------------------------------------------


class Delivered(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A delivery; `failure` is the kind of the error and its sentence, where it is one."""

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


ToOwner = Call | Listen | Tell | Stop | Begin | Leave
FromOwner = Delivered | Ended | Refused | Done

_encoder = msgspec.msgpack.Encoder()
_to_owner: msgspec.msgpack.Decoder[ToOwner] = msgspec.msgpack.Decoder(ToOwner)
_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)

_FAILURES: dict[str, type[BackendError]] = {
    kind.__name__: kind
    for kind in (BackendLost, BackendTimeout, BackendUnavailable, BackendUnreached, Cancelled)
}


def encode(message: ToOwner | FromOwner) -> bytes:
    """The message as bytes."""
    return _encoder.encode(message)


def decode_to_owner(data: bytes) -> ToOwner:
    """What a client's replica says; raises msgspec.DecodeError."""
    return _to_owner.decode(data)


def decode_from_owner(data: bytes) -> FromOwner:
    """What a child's replica says; raises msgspec.DecodeError."""
    return _from_owner.decode(data)


def failure_of(error: BackendError) -> tuple[str, str]:
    """An error as it travels."""
    return type(error).__name__, error.message


def error_of(failure: tuple[str, str]) -> BackendError:
    """The error that travelled."""
    kind, sentence = failure
    return _FAILURES.get(kind, BackendError)(sentence)
