"""How a request goes to another worker, on raw sockets without gunicorn."""

from __future__ import annotations

import array
import errno
import fcntl
import gc
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http.parser import RequestParser

from mcp_proxy.replica import Replica
from mcp_proxy.server import passing
from mcp_proxy.server.passing import Passed, Receipt, Taken
from mcp_proxy.server.slot import STALE, Slot, SlotTable
from mcp_proxy.shared_page import State

REQUEST = Passed(b"POST /mcp HTTP/1.1\r\n\r\n", "a session", 2)


class Way:
    """The socket of a slot, and a client's connection to be passed through it."""

    def __init__(self) -> None:
        self.reader, self.writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.reader.setblocking(False)
        self.writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024 * 1024)
        self.connection, self.client = socket.socketpair()

    def give(self, passed: Passed = REQUEST) -> Receipt:
        receipt = passing.give(self.writer, self.connection.fileno(), passed)
        assert receipt is not None
        return receipt

    def take(self) -> Taken | None:
        return passing.take(self.reader)

    def send(self, data: bytes, *descriptors: int) -> None:
        """Anything, as nobody of ours sends it."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        self.writer.sendmsg([data], [rights])

    def close(self) -> None:
        for one in (self.reader, self.writer, self.connection, self.client):
            one.close()


def files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))[:-1]  # the last one listed the others


@pytest.fixture
def way() -> Iterator[Way]:
    """A way at whose end as many files are open as before."""
    gc.collect()  # what earlier tests have left is not to be closed meanwhile
    before = len(files())
    with closing(Way()) as way:
        yield way
    assert len(files()) == before


# --- giving and taking ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1000, 100_000, 128 * 1024, 200_000, 5_000_000])
def test_a_request_arrives_with_its_connection(way: Way, size: int) -> None:
    sent = REQUEST._replace(data=os.urandom(size))
    receipt = way.give(sent)
    taken = way.take()
    assert taken is not None
    assert taken.passed == sent
    assert receipt.is_taken
    assert not receipt.take_back()
    receipt.close()
    with socket.socket(fileno=taken.connection) as connection:
        connection.sendall(b"the answer")
    assert way.client.recv(100) == b"the answer"


def test_what_is_taken_back_is_not_begun(way: Way) -> None:
    receipt = way.give()
    assert not receipt.is_taken
    assert receipt.take_back()
    assert way.take() is None
    receipt.close()
    with pytest.raises(BlockingIOError):
        way.take()


def test_a_giver_that_dies_leaves_the_request_to_the_receiver(way: Way) -> None:
    way.give().close()
    taken = way.take()
    assert taken is not None
    os.close(taken.connection)


def test_the_end_of_a_connection_reaches_its_client_while_there_are_copies(way: Way) -> None:
    receipt = way.give()
    taken = way.take()
    assert taken is not None
    with socket.socket(fileno=taken.connection) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    assert way.client.recv(1) == b""
    receipt.close()


def test_thousands_of_races_have_one_winner_each(way: Way) -> None:
    """The giver takes back what the receiver begins: both or neither would be wrong."""
    rounds = 3000
    both = neither = 0
    begin = threading.Barrier(2)
    taken: list[Taken | None] = []

    def receive() -> None:
        for _ in range(rounds):
            begin.wait()
            taken.append(way.take())
            begin.wait()

    thread = threading.Thread(target=receive)
    thread.start()
    backs = 0
    for _ in range(rounds):
        receipt = way.give()
        begin.wait()
        is_back = receipt.take_back()
        begin.wait()
        receipt.close()
        found = taken.pop()
        backs += is_back
        both += is_back and found is not None
        neither += not is_back and found is None
        if found is not None:
            os.close(found.connection)
    thread.join()
    assert (both, neither) == (0, 0)
    assert 0 < backs < rounds, "that was no race"


# --- what does not fit ---------------------------------------------------------------------------


def test_a_full_socket_takes_no_more(way: Way) -> None:
    receipts = []
    while (receipt := passing.give(way.writer, way.connection.fileno(), REQUEST)) is not None:
        receipts.append(receipt)
    assert len(receipts) > 40
    passing.drain(way.reader)
    assert all(receipt.take_back() for receipt in receipts)
    for receipt in receipts:
        receipt.close()


def test_a_connection_that_is_closed_is_not_passed(way: Way) -> None:
    way.connection.close()
    assert passing.give(way.writer, way.connection.fileno(), REQUEST) is None


@pytest.mark.parametrize("room", [0, 1])
def test_who_has_no_file_leaves_the_token(way: Way, room: int) -> None:
    receipt = way.give()
    with few_files(room), pytest.raises(OSError, match="Too many open files") as raised:
        way.take()
    assert raised.value.errno == errno.EMFILE
    assert receipt.take_back()
    receipt.close()


@pytest.mark.parametrize("size", [1000, 200_000])
def test_who_has_no_file_does_not_give(way: Way, size: int) -> None:
    sent = REQUEST._replace(data=bytes(size))
    for room in (0, 1) if size > 128 * 1024 else (0,):
        with few_files(room):
            assert passing.give(way.writer, way.connection.fileno(), sent) is None


@contextmanager
def few_files(room: int) -> Iterator[None]:
    """So many may be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.dup(0)]
    while fillers[-1] != max(map(int, os.listdir("/proc/self/fd"))) - 1:
        fillers.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number in fillers:
            os.close(number)


def test_a_file_that_can_still_be_changed_is_refused(way: Way) -> None:
    receipt = way.give(REQUEST._replace(data=bytes(200_000)))
    data, ancillary, *_ = way.reader.recvmsg(1000, 1000)
    descriptors = array.array("i")
    descriptors.frombytes(ancillary[0][2])
    connection, token, file = descriptors
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(unsealed, os.pread(file, 200_000, 0))
    way.send(data, connection, token, unsealed)
    assert way.take() is None
    assert receipt.take_back()
    receipt.close()
    for number in (*descriptors, unsealed):
        os.close(number)


@pytest.mark.parametrize("data", [b"", b"\0\0\0\1x", bytes(200_000)], ids=["none", "odd", "long"])
def test_what_is_no_request_of_ours_is_closed(way: Way, data: bytes) -> None:
    token = os.eventfd(1, os.EFD_NONBLOCK)
    way.send(data, way.connection.fileno(), token)
    assert way.take() is None
    assert os.eventfd_read(token) == 1
    os.close(token)


def test_descriptors_are_not_inherited(way: Way) -> None:
    way.give(REQUEST._replace(data=bytes(200_000))).close()
    taken = way.take()
    assert taken is not None
    assert fcntl.fcntl(taken.connection, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(taken.connection)


# --- the request ---------------------------------------------------------------------------------


def parsed(data: bytes) -> Any:
    return next(RequestParser(Config(), [data], ("127.0.0.1", 1)))


def test_a_rebuilt_request_says_the_same() -> None:
    req = parsed(
        b"POST /mcp?a=%20b HTTP/1.1\r\nHost: here\r\nExpect: 100-continue\r\nCookie: a=1\r\n"
        b"Cookie: b=2\r\nX-Name: J\xf6rg\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n0\r\n\r\n"
    )
    assert not passing.can_be_passed(req, 3)
    body = req.body.read()
    assert passing.can_be_passed(req, 3)
    again = parsed(passing.rebuilt(req, len(body), "an-id") + body)
    assert again.method == "POST"
    assert (again.uri, again.version) == ("/mcp?a=%20b", (1, 1))
    assert again.headers == [
        ("HOST", "here"),
        ("COOKIE", "a=1"),
        ("COOKIE", "b=2"),
        ("X-NAME", "J\xf6rg"),
        ("X-REQUEST-ID", "an-id"),
        ("CONTENT-LENGTH", "3"),
    ]
    assert again.body.read() == b"abc"


def test_a_request_without_a_body_stays_one() -> None:
    req = parsed(b"GET /mcp HTTP/1.0\r\nAccept: text/event-stream\r\n\r\n")
    assert passing.can_be_passed(req, 0)
    again = parsed(passing.rebuilt(req, 0, "an-id"))
    assert again.version == (1, 0)
    assert again.headers == [("ACCEPT", "text/event-stream"), ("X-REQUEST-ID", "an-id")]


@pytest.mark.parametrize(
    ("fields", "length"),
    [(b"Upgrade: h2c\r\n", 3), (b"", 2), (b"X-A: 1\r\n" * 97, 3)],
    ids=["an upgrade", "a body that was changed", "no room for a field"],
)
def test_what_would_not_be_the_same_is_not_passed(fields: bytes, length: int) -> None:
    head = b"POST /mcp HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n"
    for more, is_passed in ((b"", length == 3), (fields, False)):
        req = parsed(head + more + b"\r\nabc")
        assert not passing.can_be_passed(req, length)
        req.body.read()
        assert passing.can_be_passed(req, length) == is_passed


# --- slots ---------------------------------------------------------------------------------------


@contextmanager
def slot_of_this_process(number: int = 0) -> Iterator[Slot]:
    table = SlotTable(4)
    try:
        yield table.take(number)
    finally:
        table.close()


def test_the_lowest_slot_that_nobody_has_is_next() -> None:
    with closing(SlotTable(4)) as table:
        assert table.lowest_free([]) == 0
        assert table.lowest_free([0, 2, None]) == 1
        assert table.lowest_free(range(16)) is None


def test_a_replica_of_this_machine_is_found_by_its_process() -> None:
    own = Replica().id
    host, space, pid, start, nonce = own.rsplit("-", 4)
    other = f"{host}-{space}-{pid}-{start}9-{nonce}"
    with closing(SlotTable(4)) as table:
        slot = table.take(3)
        replaced = Slot(5, table.page, slot.reader, [])
        replaced.serve("0123abcd")
        line = replaced.line
        line.start = int(f"{start}9")
        assert slot.find(other) == 5
        for nobody in ("elsewhere", own, own, other + "0", other.replace(space, "00000000")):
            assert slot.find(nobody) is None
        line.clear()
        assert slot.find(other) is None


def test_only_who_takes_at_once_is_offered_something() -> None:
    with slot_of_this_process() as slot:
        line = slot.line
        line.free_threads = 1
        assert not slot.takes(0, is_stream=False), "it has not said that it serves"
        slot.serve("0123abcd")
        assert slot.takes(0, is_stream=False)
        assert not slot.takes(0, is_stream=True)
        line.free_streams = 1
        assert slot.takes(0, is_stream=True)
        line.heartbeat -= STALE
        assert not slot.takes(0, is_stream=False)
        line.heartbeat += STALE
        slot.leave()
        assert slot.is_leaving
        assert not slot.takes(0, is_stream=False)


def test_what_nobody_will_read_is_closed_and_taken_back() -> None:
    before = len(files())
    with closing(SlotTable(4)) as table:
        writer = table.take(0).writer_to(0)
        connection, client = socket.socketpair()
        with connection, client:
            receipt = passing.give(writer, connection.fileno(), REQUEST)
            assert receipt is not None
            table.free(0)
            connection.close()
            client.settimeout(10)
            assert client.recv(1) == b"", "there is still a copy"
            assert receipt.take_back()
            receipt.close()
        assert State(table.page.lines[0].state) is State.FREE
    assert len(files()) == before
