"""How a request goes from one worker to another, with the connection that it came on.

It is one datagram with descriptors: the connection, a token, and a file in memory where the request
is too large for a datagram. The token is a counter that holds 1. Whoever reads that owns the
request: the receiver when it begins, or the giver when it takes the request back. So a request is
executed by one worker or by none, whatever dies, freezes, is full or has no file left.

From the moment at which the datagram is sent until it has the token back, the giver calls nothing
on the connection: what is set on a socket, and its end, are the same for every copy of it. It keeps
its copy, and closes it when the token is gone. Who owns a connection shuts it down before it closes
it: otherwise a copy would keep the client waiting for the end.

A worker that leaves sends the records of its sessions the same way, in a file in memory.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import mmap
import os
import select
import socket
import time
from typing import Any, NamedTuple

import msgspec

#: Seconds after which a request that nobody has begun is taken back.
TAKE_BACK_AFTER = 0.25

# Larger requests go in a file.
_LARGEST_DATAGRAM = 128 * 1024

_LENGTH = 4

_INT = array.array("i").itemsize
_MOST_DESCRIPTORS = 3

# Headers that say how the body was sent, or hold it back.
_OF_THE_WAY = frozenset({"EXPECT", "CONTENT-LENGTH", "TRANSFER-ENCODING", "X-REQUEST-ID"})


class _Envelope(msgspec.Struct, array_like=True):
    session: str = ""
    changes: int = 0
    has_records: bool = False
    is_counted: bool = False


_decoder = msgspec.msgpack.Decoder(_Envelope)
_encoder = msgspec.msgpack.Encoder()


class Passed(NamedTuple):
    """A request as it is passed: its bytes, and what came behind it on the connection.

    `session` is the session that it names, `changes` how often the connection had changed that;
    `is_counted` says that its caller had it counted.
    """

    data: bytes
    session: str
    changes: int
    is_counted: bool = False


class Receipt:
    """What the giver has of a request that it has passed. Used by one thread at a time."""

    def __init__(self, token: int, passed: Passed) -> None:
        self.passed = passed
        #: When to take it back if nobody has begun it.
        self.until = time.monotonic() + TAKE_BACK_AFTER
        self._token = token

    @property
    def is_taken(self) -> bool:
        """Whether the receiver owns the request."""
        poll = select.poll()
        poll.register(self._token, select.POLLIN)
        return not poll.poll(0)

    def take_back(self) -> bool:
        """Whether the giver owns the request again; then the receiver never will."""
        return _has_read(self._token)

    def close(self) -> None:
        """Forgets the token; harmless when repeated."""
        token, self._token = self._token, -1
        if token >= 0:
            os.close(token)


class Offer:
    """A request that is another worker's to answer; `receipt` is there once it has been sent.

    `is_only_way` says that this worker cannot answer it instead.
    """

    def __init__(self, passed: Passed, is_stream: bool, is_only_way: bool, until: float) -> None:
        self.passed = passed
        self.is_stream = is_stream
        self.is_only_way = is_only_way
        #: When it is refused.
        self.until = until
        self.next_try = 0.0
        self.receipt: Receipt | None = None


class Held(NamedTuple):
    """A request that waits, since a (monotonic) time, for calls of its session to end."""

    request: Passed
    since: float


def is_possible() -> bool:
    """Whether this system has what passing needs."""
    return hasattr(os, "eventfd") and hasattr(os, "memfd_create")


# --- giving --------------------------------------------------------------------------------------


def give(writer: socket.socket, connection: int, passed: Passed) -> Receipt | None:
    """Sends a request with its connection; None where that is not possible now. Never waits."""
    envelope = _encoder.encode(_Envelope(passed.session, passed.changes, False, passed.is_counted))
    head = len(envelope).to_bytes(_LENGTH, "big") + envelope
    with contextlib.ExitStack() as stack:
        try:
            token = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            on_failure = stack.enter_context(contextlib.ExitStack())
            on_failure.callback(os.close, token)
            descriptors = [connection, token]
            pieces = [head, passed.data]
            if len(head) + len(passed.data) > _LARGEST_DATAGRAM:
                descriptors.append(_file_of(passed.data))
                stack.callback(os.close, descriptors[-1])
                pieces.pop()
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
            writer.sendmsg(pieces, [rights], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return None
        on_failure.pop_all()
    return Receipt(token, passed)


def give_records(writer: socket.socket, records: bytes) -> bool:
    """Sends records of sessions; False where that is not possible now. Never waits."""
    envelope = _encoder.encode(_Envelope(has_records=True))
    head = len(envelope).to_bytes(_LENGTH, "big") + envelope
    try:
        file = _file_of(records)
    except OSError:
        return False
    try:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))
        writer.sendmsg([head], [rights], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _file_of(data: bytes) -> int:
    """A file in memory that nobody can change any more."""
    file = os.memfd_create("mcp-request", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(file, left) :]
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _seals())
    except BaseException:
        os.close(file)
        raise
    return file


def _seals() -> int:
    """Of a file that nobody can change."""
    return fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def can_be_passed(req: Any, body_length: int) -> bool:
    """Whether a request that gunicorn's parser has read is whole, and still is when it is rebuilt.

    Its head may grow by two fields. A body of another length than the head says was changed on its
    way to the application, which would be done once more.
    """
    lengths = [value for name, value in req.headers if name == "CONTENT-LENGTH"]
    if lengths and int(lengths[0]) != body_length:
        return False
    reader = getattr(req.body.reader, "inner", req.body.reader)
    has_come = getattr(reader, "length", None) == 0 or getattr(reader, "parser", reader) is None
    is_plain = not req.trailers and all(name != "UPGRADE" for name, _ in req.headers)
    return has_come and is_plain and len(req.headers) + 2 <= req.limit_request_fields


def rebuilt(req: Any, body_length: int, request_id: str) -> bytes:
    """The head of a request that gunicorn's parser has read, for its body in one piece."""
    major, minor = req.version
    lines = [f"{req.method} {req.uri} HTTP/{major}.{minor}"]
    lines += [f"{name}:{value}" for name, value in req.headers if name not in _OF_THE_WAY]
    lines.append(f"X-REQUEST-ID:{request_id}")
    if body_length or req.method not in ("GET", "DELETE"):
        lines.append(f"CONTENT-LENGTH:{body_length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


# --- taking --------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """A request that this worker owns, and the number of its connection."""

    passed: Passed
    connection: int


class Records(NamedTuple):
    """Records of sessions, as `give_records` got them."""

    data: bytes


def take(reader: socket.socket, *, begins: bool = True) -> Taken | Records | None:
    """The next request, or records, in a slot's socket; None for what is not to be begun.

    Without `begins` no request is: its giver takes it back. Never waits. Raises BlockingIOError
    where there is nothing. Raises OSError with EMFILE where this process has no file for what came,
    which its giver takes back.
    """
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _INT)
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, ancillary, got, _ = reader.recvmsg(_LARGEST_DATAGRAM, room, flags)
    descriptors = _descriptors_in(ancillary)
    try:
        if got & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        found = None if got & socket.MSG_TRUNC else _read(data, descriptors)
        if found is None or isinstance(found, Records):
            return found
        if not begins or not _has_read(descriptors[1]):
            return None
        return Taken(found, descriptors.pop(0))
    finally:
        for number in descriptors:
            os.close(number)


def drain(reader: socket.socket) -> None:
    """Closes what lies in a slot's socket, without a look at it."""
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _INT)
    while True:
        try:
            ancillary = reader.recvmsg(1, room, socket.MSG_DONTWAIT)[1]
        except OSError:
            return
        for number in _descriptors_in(ancillary):
            os.close(number)


def _descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % _INT])
    return list(numbers)


def _read(data: bytes, descriptors: list[int]) -> Passed | Records | None:
    """What a datagram holds; None where it is none of ours."""
    size = int.from_bytes(data[:_LENGTH], "big")
    try:
        envelope = _decoder.decode(data[_LENGTH : _LENGTH + size])
        match descriptors:
            case [file] if envelope.has_records:
                return Records(_sealed(file))
            case [_, _]:
                request = data[_LENGTH + size :]
            case [_, _, file]:
                request = _sealed(file)
            case _:
                return None
    except (msgspec.MsgspecError, OSError, ValueError):
        return None
    return Passed(request, envelope.session, envelope.changes, envelope.is_counted)


def _sealed(file: int) -> bytes:
    """What is in a file that nobody can change; raises OSError or ValueError for any other."""
    if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _seals() != _seals():
        raise ValueError("the file is not sealed")
    with mmap.mmap(file, 0, prot=mmap.PROT_READ) as memory:
        return bytes(memory)


def _has_read(token: int) -> bool:
    """Whether the token was still there, and now is ours."""
    try:
        os.eventfd_read(token)
    except OSError:  # BlockingIOError, or it is no token
        return False
    return True
