"""Calls to HTTP backends: what arrives, what fails in which way, and TLS."""

from __future__ import annotations

import contextlib
import datetime
import errno
import gc
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mcp_proxy.backends import http as backends_http
from mcp_proxy.backends.http import MAX_PIECE, HttpCall, HttpClient
from mcp_proxy.errors import (
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    BadAnswer,
    ClientLeft,
    Draining,
    RedirectRefused,
)
from mcp_proxy.wire.urls import Address, parse_target
from tests.proofs.hell import drip, flood
from tests.servers.http_backend import Feed, HttpBackend, Turn, raw, reply, reset, silent, stream
from tests.support.waiting import eventually


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as backend:
        yield backend


@pytest.fixture
def client() -> Iterator[HttpClient]:
    client = HttpClient(1, 4)
    yield client
    client.close()


class Calls:
    """Makes calls and closes them."""

    def __init__(self, client: HttpClient, backend: HttpBackend) -> None:
        self.client, self.backend = client, backend
        self.made: list[HttpCall] = []

    def __call__(self, method: str = "GET", target: str = "/x", body: bytes = b"") -> HttpCall:
        address = Address("http", "127.0.0.1", self.backend.port)
        call = HttpCall(self.client, address, method, target, {"A": "1"}, body)
        self.made.append(call)
        return call

    def sent(self, *args: Any) -> HttpCall:
        call = self(*args)
        call.send(2)
        return call


@pytest.fixture
def calls(client: HttpClient, backend: HttpBackend) -> Iterator[Calls]:
    calls = Calls(client, backend)
    yield calls
    for call in calls.made:
        call.close()
        call.close()


# --- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "body", "length"),
    [
        ("GET", b"", None),
        ("POST", b"", "0"),
        ("POST", b"abc", "3"),
        ("DELETE", b"", None),
        ("DELETE", b"x", "1"),
    ],
)
def test_a_request_has_no_headers_but_those_given(
    calls: Calls, backend: HttpBackend, method: str, body: bytes, length: str | None
) -> None:
    backend.on(method, "/x", reply(200))
    calls.sent(method, "/x?a=%20b&c", body)
    seen = backend.last
    assert (seen.method, seen.target, seen.body) == (method, "/x?a=%20b&c", body)
    given = {"A": "1", "Host": f"127.0.0.1:{backend.port}"}
    assert dict(seen.headers) == {**given, **({"Content-Length": length} if length else {})}


def test_the_environments_proxies_and_passwords_are_not_asked(
    calls: Calls, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login u password p\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    backend.on("GET", "/x", reply(200, b"", "Set-Cookie: a=1"))
    assert calls.sent().status == 200
    calls.sent()
    assert not backend.last.names & {"authorization", "cookie"}


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_each_piece_as_soon_as_it_is_there(
    calls: Calls, backend: HttpBackend, framing: str
) -> None:
    feed = Feed()
    backend.on("GET", "/x", stream(feed, framing=framing, length=6))
    call = calls.sent()
    pieces = call.pieces()
    for piece in (b"one", b"two"):
        feed.put(piece)
        assert next(pieces) == piece
    feed.put(None)
    assert list(pieces) == []


@pytest.mark.parametrize("framing", ["length", "close"])
def test_no_piece_is_large_however_much_has_come(
    calls: Calls, backend: HttpBackend, framing: str
) -> None:
    feed = Feed()
    backend.on("GET", "/x", stream(feed, framing=framing, length=64 * MAX_PIECE))
    for _ in range(64):
        feed.put(bytes(MAX_PIECE))
    feed.put(None)
    sizes = [len(piece) for piece in calls.sent().pieces()]
    assert sum(sizes) == 64 * MAX_PIECE
    assert max(sizes) <= MAX_PIECE


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_an_early_end_is_a_loss(calls: Calls, backend: HttpBackend, framing: str) -> None:
    feed = Feed()
    feed.put(b"one")
    feed.put(Feed.BREAK)
    backend.on("GET", "/x", stream(feed, framing=framing, length=6))
    with pytest.raises(BackendLost):
        calls.sent().read(100)


def test_a_body_that_stalls_is_a_timeout(calls: Calls, backend: HttpBackend) -> None:
    backend.on("GET", "/x", stream(b"one", Feed()))
    call = calls()
    call.send(0.2)
    with pytest.raises(BackendTimeout):
        call.read(100)


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_an_event_stream_may_stall(calls: Calls, backend: HttpBackend, framing: str) -> None:
    feed = Feed()
    backend.on("GET", "/x", stream(feed, framing=framing))
    call = calls()
    call.send(0.2)
    call.wait_for_ever()
    threading.Timer(0.5, feed.put, [b"late"]).start()
    pieces = call.pieces()
    assert next(pieces) == b"late"
    feed.put(None)


def test_a_name_that_nobody_knows_is_no_refused_connection() -> None:
    with closing(HttpClient(5, 1)) as client:
        target = parse_target("http://no.such.host.invalid/mcp")
        assert target is not None
        call = HttpCall(client, target.address, "POST", "/mcp", {}, b"")
        with closing(call), pytest.raises(BackendUnreached) as caught:
            call.send(10)
    assert caught.value.message == "The server cannot be reached: its name cannot be resolved"
    assert "no.such.host.invalid" in caught.value.detail


def test_a_body_over_the_limit_is_refused(calls: Calls, backend: HttpBackend) -> None:
    backend.on("GET", "/x", reply(200, bytes(101)))
    with pytest.raises(BackendLost):
        calls.sent().read(100)


@pytest.mark.parametrize("limits", [(100_000, 1000), (1000, 100_000)], ids=["less", "more"])
def test_a_body_that_is_read_ahead_twice_stays_whole(
    calls: Calls, backend: HttpBackend, limits: tuple[int, int]
) -> None:
    parts = [bytes([letter]) * 5000 for letter in b"abcdefghij"]
    backend.on("GET", "/x", stream(*parts))
    call = calls.sent()
    for limit in limits:
        call.read_ahead(limit)
    assert b"".join(call.pieces()) == b"".join(parts)


def test_headers_that_come_twice_stay_two(calls: Calls, backend: HttpBackend) -> None:
    backend.on("GET", "/x", reply(200, b"", "B: 1", "a: 2", "b: 3"))
    call = calls.sent()
    assert call.headers == [("B", "1"), ("B", "3"), ("a", "2"), ("Content-Length", "0")]
    assert (call.header("A"), call.header("b"), call.header("c")) == ("2", "1", None)


# --- what fails ----------------------------------------------------------------------------------


def test_a_refused_connection_got_nothing(calls: Calls, backend: HttpBackend) -> None:
    backend.stop()
    with pytest.raises(BackendUnreached, match="refused"):
        calls.sent()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ECONNREFUSED, "The server cannot be reached: the connection was refused"),
        (errno.EHOSTUNREACH, "The server cannot be reached: there is no route to its host"),
        (errno.ENETUNREACH, "The server cannot be reached: its network is unreachable"),
        (errno.ECONNRESET, "The server cannot be reached: the connection broke off"),
        (errno.ETIMEDOUT, "The server cannot be reached in time"),
        (errno.EADDRNOTAVAIL, "The server cannot be reached: cannot assign requested address"),
        (errno.EMFILE, "The server cannot be reached: too many open files"),
        (None, "The server cannot be reached"),
    ],
)
def test_what_the_system_says_of_a_connection_is_told_in_plain_words(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, number: int | None, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> socket.socket:
        raise OSError("odd") if number is None else OSError(number, os.strerror(number))

    monkeypatch.setattr("urllib3.util.connection.create_connection", fail)
    with pytest.raises(BackendUnreached) as caught:
        calls.sent()
    assert caught.value.message == said
    if number is not None:
        assert caught.value.detail == f"{calls().address.shown}: {os.strerror(number)}"
    monkeypatch.setattr("socket.create_connection", fail)
    found = calls.client.probe(calls().address)
    assert found is not None
    assert found.message == said


def test_a_name_that_is_not_known_got_nothing(client: HttpClient) -> None:
    call = HttpCall(client, Address("http", "no-such-name.invalid", 80), "GET", "/", {}, b"")
    with pytest.raises(BackendUnreached):
        call.send(1)


def test_a_connection_that_takes_too_long_got_nothing() -> None:
    client = HttpClient(0.3, 1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        call = HttpCall(client, Address("http", "127.0.0.1", port), "GET", "/", {}, b"")
        begun = time.monotonic()
        with pytest.raises(BackendUnreached, match="time"):
            call.send(5)
        assert time.monotonic() - begun < 2
        for sock in waiting:
            sock.close()
    client.close()


@pytest.mark.parametrize("act", [reset, raw(b""), raw(b"HT"), raw(b"rubbish\r\n\r\n")])
def test_a_broken_connection_may_have_executed(
    calls: Calls, backend: HttpBackend, act: Any
) -> None:
    backend.on("POST", "/x", act)
    with pytest.raises(BackendLost) as caught:
        calls.sent("POST", "/x", b"x")
    assert not isinstance(caught.value, BackendUnreached)


def test_silence_is_a_timeout(calls: Calls, backend: HttpBackend) -> None:
    backend.on("GET", "/x", silent)
    call = calls()
    begun = time.monotonic()
    with pytest.raises(BackendTimeout):
        call.send(0.3)
    assert 0.2 < time.monotonic() - begun < 3, "it waits for the limit of the call"
    eventually(lambda: backend.gone)


# --- deadlines -----------------------------------------------------------------------------------

_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_EARLY = b"HTTP/1.1 103 Early\r\n\r\n"


@pytest.mark.parametrize(
    ("before", "drops"),
    [
        (b"HTTP/1.1 2", b"0"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"", _EARLY),
        (_EARLY + b"HTTP/1.1 103 ", b"x"),
    ],
)
def test_a_head_has_a_deadline_as_a_whole(
    calls: Calls, backend: HttpBackend, before: bytes, drops: bytes
) -> None:
    backend.on("GET", "/x", drip(before, drops))
    call = calls()
    with pytest.raises(BackendTimeout, match=r"within 1 second$"):
        call.send(1)


@pytest.mark.parametrize(
    ("before", "wave"),
    [
        (b"", _EARLY),
        (b"", b"HTTP/1.1 103 Early\r\n" + b"Link: %b\r\n" % (b"x" * 60_000) * 50 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X: %b\r\n" % (b"x" * 60_000)),
    ],
)
def test_a_head_is_bounded(calls: Calls, backend: HttpBackend, before: bytes, wave: bytes) -> None:
    backend.on("GET", "/x", flood(before, wave))
    with pytest.raises(BadAnswer, match="head"):
        calls().send(60)


@pytest.mark.parametrize("line", [b"X-Powered-By PHP", b": empty"])
def test_a_line_that_hides_the_headers_behind_it_is_a_bad_answer(
    calls: Calls, backend: HttpBackend, line: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + line + b"\r\nContent-Length: 3\r\n\r\none"
    backend.on("GET", "/x", raw(head))
    with pytest.raises(BadAnswer, match="head"):
        calls().send(60)


@pytest.mark.parametrize("line", [b"X-Powered By: PHP", b"X-Powered-By : PHP", b"X-Odd: a\rb"])
def test_no_odd_line_hides_the_headers_behind_it(
    calls: Calls, backend: HttpBackend, line: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + line + b"\r\nX-Behind: 1\r\nContent-Length: 3\r\n\r\none"
    backend.on("GET", "/x", raw(head))
    try:
        call = calls.sent()
    except BadAnswer:
        return
    assert (call.header("X-Behind"), call.read(10)) == ("1", b"one")


def test_a_few_answers_before_the_answer_are_skipped(calls: Calls, backend: HttpBackend) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none"
    backend.on("GET", "/x", raw(_EARLY * 15 + answer))
    assert calls.sent().read(10) == b"one"


@pytest.mark.parametrize(
    ("before", "drops"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x"),
        (_CHUNKED, b"1\r\nx\r\n"),
        (_CHUNKED + b"1;", b"x"),
        (_CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n"),
    ],
)
def test_a_body_has_the_deadline_of_its_head(
    calls: Calls, backend: HttpBackend, before: bytes, drops: bytes
) -> None:
    backend.on("GET", "/x", drip(before, drops))
    call = calls()
    call.send(1)
    with pytest.raises(BackendTimeout, match=r"within 1 second$"):
        call.read(10_000)


def test_a_body_under_tls_has_it_too(authority: Authority, secure: Secure) -> None:
    client = HttpClient(1, 2, verify=str(authority.file))
    secure.backend.on("GET", "/x", drip(_CHUNKED, b"1\r\nx\r\n"))
    call = HttpCall(client, secure.address(), "GET", "/x", {}, b"")
    call.send(1)
    with pytest.raises(BackendTimeout):
        call.read(10_000)
    call.close()
    client.close()


@pytest.mark.parametrize("pulse", [None, 0.3])
def test_what_may_take_any_time_goes_on_until_it_is_silent(
    calls: Calls, backend: HttpBackend, pulse: float | None
) -> None:
    feed = Feed()
    backend.on("GET", "/x", stream(feed))
    call = calls()
    call.send(1)
    call.limit_silence()
    found = call.pieces(pulse)
    for _ in range(6):
        time.sleep(0.3)
        feed.put(b"x")
        while not next(found):
            pass
    with pytest.raises(BackendTimeout):
        list(found)


@pytest.mark.parametrize("is_standing", [False, True])
def test_trailers_have_a_deadline_of_their_own(
    calls: Calls, backend: HttpBackend, is_standing: bool
) -> None:
    backend.on("GET", "/x", drip(_CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n"))
    call = calls()
    call.send(1)
    call.wait_for_ever() if is_standing else call.limit_silence()
    with pytest.raises(BackendTimeout):
        call.read(100)


def test_trailers_are_bounded(calls: Calls, backend: HttpBackend) -> None:
    backend.on("GET", "/x", flood(_CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n" * 100))
    call = calls()
    call.send(60)
    with pytest.raises(BadAnswer):
        call.read(100)


@pytest.mark.parametrize("size", [b"-2", b"f" * 16, b"f" * 40, b"two", b""])
def test_a_chunk_whose_size_cannot_be_is_a_bad_answer(
    calls: Calls, backend: HttpBackend, size: bytes
) -> None:
    backend.on("GET", "/x", raw(_CHUNKED + b"1\r\nx\r\n" + size + b"\r\n{}\r\n0\r\n\r\n"))
    call = calls.sent()
    found = call.pieces()
    assert next(found) == b"x"
    with pytest.raises(BadAnswer):
        list(found)


def test_trailers_are_no_part_of_the_body(calls: Calls, backend: HttpBackend) -> None:
    answer = _CHUNKED + b"1\r\nx\r\n0\r\nX: y\r\n\r\n"
    backend.on("GET", "/x", lambda turn: turn.send(answer))
    for _ in range(2):
        assert calls.sent().read(100) == b"x"
    assert [seen.connection for seen in backend.seen] == [1, 1]


def test_a_redirect_does_not_begin_the_time_anew(calls: Calls, backend: HttpBackend) -> None:
    def late(turn: Turn) -> None:
        time.sleep(0.5)
        turn.reply(307, b"", "Location: /x")

    def follow() -> None:
        call: HttpCall | None = calls()
        while call is not None:
            call.send(1)
            call.close()
            call = call.redirected()

    backend.on("GET", "/x", late)
    with pytest.raises(BackendTimeout):
        follow()
    assert len(backend.seen) <= 3


# --- aborting ------------------------------------------------------------------------------------


def test_a_call_that_waits_is_aborted(calls: Calls, backend: HttpBackend) -> None:
    backend.on("GET", "/x", silent)
    call = calls()
    threading.Timer(0.2, call.abort).start()
    with pytest.raises(ClientLeft):
        call.send(30)
    eventually(lambda: backend.gone)


@pytest.mark.parametrize("reused", [False, True])
def test_a_call_that_was_aborted_before_it_was_sent(
    calls: Calls, backend: HttpBackend, reused: bool
) -> None:
    if reused:
        backend.on("GET", "/first", reply(200))
        calls.sent("GET", "/first").read(1)
    backend.on("GET", "/x", silent)
    call = calls()
    call.abort()
    with pytest.raises(ClientLeft):
        call.send(30)


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
def test_a_body_is_aborted(calls: Calls, backend: HttpBackend, framing: str) -> None:
    backend.on("GET", "/x", stream(b"one", Feed(), framing=framing, length=9))
    call = calls.sent()
    call.wait_for_ever()
    threading.Timer(0.2, call.abort).start()
    pieces = call.pieces()
    assert next(pieces) == b"one"
    begun = time.monotonic()
    with pytest.raises(ClientLeft):
        list(pieces)
    assert time.monotonic() - begun < 2
    call.close()
    eventually(lambda: backend.gone)


@pytest.mark.parametrize("is_sent", [False, True])
def test_an_abort_has_a_reason_and_the_first_stands(
    calls: Calls, backend: HttpBackend, is_sent: bool
) -> None:
    backend.on("GET", "/x", stream(b"one", Feed(), framing="close"))
    call = calls.sent() if is_sent else calls()
    call.abort(Draining())
    call.abort(ClientLeft())
    with pytest.raises(Draining):
        call.read(100) if is_sent else call.send(5)


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_body_that_was_read_to_its_end_is_whole_whatever_happens_then(
    calls: Calls, backend: HttpBackend, framing: str
) -> None:
    backend.on("GET", "/x", stream(b"one", framing=framing, length=3))
    call = calls.sent()
    pieces = call.pieces()
    assert next(pieces) == b"one"
    if framing == "chunked":  # the end has to be there, since it is waited for
        assert list(pieces) == []
    call.abort()
    assert list(pieces) == []


def test_closing_gives_back_what_was_taken_the_last_first_and_once(
    calls: Calls, backend: HttpBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.on("GET", "/x", reply(200, b"x"))
    call, given_back = calls.sent(), []

    def fail() -> None:
        raise RuntimeError("on purpose")

    call.on_close(lambda: given_back.append("first"))
    call.on_close(fail)
    call.on_close(lambda: given_back.append("last"))
    for _ in range(2):
        call.close()
    assert given_back == ["last", "first"]
    assert caplog.text.count("the cleanup after a response failed") == 1


def test_the_media_type_is_without_parameters_and_in_lower_case(
    calls: Calls, backend: HttpBackend
) -> None:
    backend.on("GET", "/x", reply(200, b"", "Content-Type: Text/Event-Stream; charset=utf-8"))
    assert calls.sent().media_type == "text/event-stream"
    backend.on("GET", "/x", reply(204))
    assert calls.sent().media_type == ""


# --- connections ---------------------------------------------------------------------------------


def test_whether_the_host_of_a_silent_stream_is_there_is_asked(
    calls: Calls, backend: HttpBackend
) -> None:
    class Noting(HttpCall):
        def connected(self, sock: socket.socket, is_through: bool = True) -> None:
            self.sock = sock
            super().connected(sock, is_through)

    backend.on("GET", "/x", stream(b"one", Feed()))
    call = Noting(calls.client, Address("http", "127.0.0.1", backend.port), "GET", "/x", {}, b"")
    call.send(2)
    call.wait_for_ever()
    sock = call.sock
    assert sock.gettimeout() is None
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    found = [
        sock.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    ]
    assert found == [15, 5, 3]
    call.close()


@contextlib.contextmanager
def forgotten_at_once(client: HttpClient, backend: HttpBackend) -> Iterator[HttpCall]:
    """A call, of which nothing is left at the end although the collector does not run."""
    gc.disable()
    try:
        call = HttpCall(client, Address("http", "127.0.0.1", backend.port), "GET", "/x", {}, b"")
        yield call
        call.close()
        gone = weakref.ref(call)
        del call
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_call_is_forgotten_without_the_collector(
    client: HttpClient, backend: HttpBackend, is_chunked: bool
) -> None:
    backend.on("GET", "/x", stream(b"one") if is_chunked else reply(200, b"one"))
    with forgotten_at_once(client, backend) as call:
        call.send(5)
        assert call.read(10) == b"one"
        del call


@pytest.mark.parametrize("is_sent", [False, True])
def test_a_call_that_was_aborted_is_forgotten_without_the_collector(
    client: HttpClient, backend: HttpBackend, is_sent: bool
) -> None:
    backend.on("GET", "/x", stream(b"one", Feed(), framing="close"))
    with forgotten_at_once(client, backend) as call:
        if is_sent:
            call.send(5)
        call.abort()
        with pytest.raises(ClientLeft):
            call.read(100) if is_sent else call.send(5)
        del call


def test_a_call_that_reached_nobody_is_forgotten_without_the_collector(
    client: HttpClient, backend: HttpBackend
) -> None:
    backend.stop()
    with forgotten_at_once(client, backend) as call:
        with pytest.raises(BackendUnreached):
            call.send(5)
        del call


def test_idle_connections_grow_old(
    calls: Calls, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.on("GET", "/x", reply(200, b"x"))
    for _ in range(3):
        calls.sent().read(10)
    monkeypatch.setattr(backends_http, "MAX_IDLE", 0.05)
    time.sleep(0.1)
    calls.sent().read(10)
    assert [seen.connection for seen in backend.seen] == [1, 1, 1, 2]


def test_an_unread_answer_is_not_left_to_the_next(calls: Calls, backend: HttpBackend) -> None:
    backend.on("GET", "/x", stream(b"one", Feed()))
    calls.sent().close()
    backend.on("GET", "/x", reply(200, b"two"))
    assert calls.sent().read(10) == b"two"
    eventually(lambda: backend.gone)


def test_probing_sends_nothing(client: HttpClient, backend: HttpBackend) -> None:
    address = Address("http", "127.0.0.1", backend.port)
    assert client.probe(address) is None
    backend.stop()
    failure = client.probe(address)
    assert failure is not None
    assert failure.message == "The server cannot be reached: the connection was refused"
    assert failure.detail == f"{address.url}: Connection refused"
    assert backend.seen == []


# --- redirects -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/y?a=1", ("http://127.0.0.1:{port}", "/y?a=1")),
        ("y", ("http://127.0.0.1:{port}", "/y")),
        ("http://localhost:{port}/y", None),
        ("http://127.0.0.1.elsewhere.invalid/", None),
        ("//elsewhere.invalid/y", None),
        ("ftp://127.0.0.1/y", None),
        ("http://user@127.0.0.1/y", None),
        ("http://[", None),
        ("http://127.0.0.1:x/", None),
    ],
)
def test_where_a_redirect_leads(
    calls: Calls, backend: HttpBackend, location: str, expected: tuple[str, str] | None
) -> None:
    port = backend.port
    backend.on("POST", "/x", reply(307, b"", f"Location: {location.format(port=port)}"))
    call = calls.sent("POST", "/x", b"body")
    if expected is None:
        with pytest.raises(RedirectRefused, match=r"The server redirects \(307\) to "):
            call.redirected()
        return
    successor = call.redirected()
    assert successor is not None
    url, target = expected
    assert repr(successor) == f"<HttpCall POST {url.format(port=port)}{target} unsent>"


@pytest.mark.parametrize("status", [301, 302, 303])
def test_what_may_change_the_method_is_not_followed(
    calls: Calls, backend: HttpBackend, status: int
) -> None:
    backend.on("GET", "/x", reply(status, b"", "Location: /y?secret"))
    with pytest.raises(RedirectRefused) as caught:
        calls.sent().redirected()
    assert str(caught.value).startswith(f"The server redirects ({status}) to /y, which is not")


@pytest.mark.parametrize("status", [200, 201, 300, 304])
def test_other_statuses_are_no_redirects(calls: Calls, backend: HttpBackend, status: int) -> None:
    backend.on("GET", "/x", reply(status, b"", "Location: /y"))
    assert calls.sent().redirected() is None


# --- TLS -----------------------------------------------------------------------------------------

NAME = "backend.example"


class Authority:
    """A CA of our own and certificates by it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self.file = directory / "ca.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = self._signed(self._name, self._key, (constraints, True))
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def server(self, name: str) -> ssl.SSLContext:
        """A server's TLS with a certificate for `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        path = self._directory / f"{name}.pem"
        path.write_bytes(
            self._signed(subject, key, (names, False)).public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def _signed(
        self, subject: x509.Name, key: Any, extension: tuple[Any, bool]
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension[0], critical=extension[1])
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


class Secure:
    """A TLS backend that notes the server names it was asked for."""

    def __init__(self, authority: Authority, name: str = NAME) -> None:
        self.names: list[str | None] = []
        context = authority.server(name)
        context.sni_callback = lambda _sock, asked, _context: self.names.append(asked)  # type: ignore[assignment]
        self.backend = HttpBackend(tls=context)
        self.backend.on("GET", "/x", reply(200, b"secure"))

    def address(self, name: str | None = NAME) -> Address:
        return Address("https", "127.0.0.1", self.backend.port, name)


@pytest.fixture
def secure(authority: Authority) -> Iterator[Secure]:
    made = Secure(authority)
    yield made
    made.backend.stop()


def get(client: HttpClient, address: Address) -> bytes:
    call = HttpCall(client, address, "GET", "/x", {}, b"")
    try:
        call.send(3)
        return call.read(100)
    finally:
        call.close()
        client.close()


def test_a_certificate_is_checked_against_the_name(authority: Authority, secure: Secure) -> None:
    client = HttpClient(1, 2, verify=str(authority.file))
    assert get(client, secure.address()) == b"secure"
    assert secure.names == [NAME]
    assert secure.backend.last.header("Host") == f"{NAME}:{secure.backend.port}"


def test_silence_under_tls_is_noticed_and_loses_nothing(
    authority: Authority, secure: Secure
) -> None:
    client = HttpClient(1, 2, verify=str(authority.file))
    feed, big = Feed(), b"x" * 60_000
    secure.backend.on("GET", "/x", stream(b"one", feed))
    call = HttpCall(client, secure.address(), "GET", "/x", {}, b"")
    call.send(1)
    call.limit_silence()
    found = call.pieces(0.2)
    assert next(found) == b"one"
    assert [next(found) for _ in range(3)] == [b""] * 3
    feed.put(big)
    feed.put(b"two")
    received = b""
    while len(received) < len(big) + 3:
        received += next(found)
    assert received == big + b"two"
    with pytest.raises(BackendTimeout):
        list(found)
    call.close()
    client.close()


@pytest.mark.parametrize("name", ["other.example", None])
def test_a_certificate_for_another_name_is_refused(
    authority: Authority, secure: Secure, name: str | None
) -> None:
    client = HttpClient(1, 2, verify=str(authority.file))
    with pytest.raises(BackendUnreached, match="certificate"):
        get(client, secure.address(name))
    assert secure.backend.seen == []


def test_a_certificate_of_nobody_known_is_refused(secure: Secure) -> None:
    with pytest.raises(BackendUnreached, match="certificate"):
        get(HttpClient(1, 2), secure.address())


def test_probing_shakes_hands_as_a_call_does(
    authority: Authority, secure: Secure, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(HttpClient(1, 2, verify=str(authority.file))) as client:
        assert client.probe(secure.address()) is None
        failures = [client.probe(secure.address("other.example"))]
    with closing(HttpClient(1, 2)) as client:
        failures.append(client.probe(secure.address()))
    with closing(HttpClient(1, 2, verify=False)) as client:
        assert client.probe(secure.address("other.example")) is None
    for failure, name in zip(failures, ("other.example", NAME), strict=True):
        assert failure is not None
        address = f"https://127.0.0.1:{secure.backend.port} ({name}): "
        assert failure.message.startswith("The server's certificate or TLS is not acceptable: ")
        assert failure.detail.startswith(
            f"{address}[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify"
        )
    assert secure.backend.seen == []
    assert caplog.records == []  # whoever asked has the reason


def test_probing_a_server_that_is_silent_under_tls_has_a_time_limit() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        closing(HttpClient(0.5, 2)) as client,
    ):
        port = listener.getsockname()[1]
        begun = time.monotonic()
        failure = client.probe(Address("https", "127.0.0.1", port))
        assert time.monotonic() - begun < 2.5
    assert failure is not None
    assert failure.message == "The server cannot be reached in time"
    assert failure.detail == f"https://127.0.0.1:{port}: The handshake operation timed out"


def test_without_verification_everything_is_taken(secure: Secure) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert get(HttpClient(1, 2, verify=False), secure.address("other.example")) == b"secure"


def test_names_on_one_address_do_not_share_a_connection(
    authority: Authority, secure: Secure
) -> None:
    client = HttpClient(1, 2, verify=str(authority.file))
    assert get(client, secure.address()) == b"secure"
    with pytest.raises(BackendUnreached):
        get(client, secure.address("other.example"))


def test_a_broken_connection_over_tls_may_have_executed(
    authority: Authority, secure: Secure
) -> None:
    def break_tls(turn: Turn) -> None:
        sock: Any = turn.sock
        plain = socket.socket(fileno=sock.detach())
        plain.sendall(b"\x15\x03\x03\x00\x02no certainly no alert")
        plain.close()

    for act in (reset, raw(b""), break_tls):
        secure.backend.on("GET", "/x", act)
        with pytest.raises(BackendLost) as caught:
            get(HttpClient(1, 2, verify=str(authority.file)), secure.address())
        assert not isinstance(caught.value, BackendUnreached), act


def test_no_redirect_from_https_to_http(authority: Authority, secure: Secure) -> None:
    port = secure.backend.port
    client = HttpClient(1, 2, verify=str(authority.file))
    for location, is_followed in [
        (f"http://{NAME}:{port}/y", False),
        (f"https://{NAME}:{port}/y", True),
        (f"https://127.0.0.1:{port}/y", False),
    ]:
        secure.backend.on("GET", "/x", reply(308, b"", f"Location: {location}"))
        call = HttpCall(client, secure.address(), "GET", "/x", {}, b"")
        call.send(3)
        if is_followed:
            successor = call.redirected()
            assert successor is not None
            assert successor.address == secure.address()
        else:
            with pytest.raises(RedirectRefused):
                call.redirected()
        call.close()
    client.close()


def test_a_session_over_tls_stays_at_its_address_under_its_name(
    authority: Authority, secure: Secure
) -> None:
    from mcp_proxy import TransparentProxy
    from tests.support.front import McpClient
    from tests.support.transparent import LocalFront

    url = f"https://{NAME}:{secure.backend.port}"
    addresses = ["127.0.0.1", "127.0.0.2"]
    proxy = TransparentProxy(url, resolver=lambda h, p: addresses, verify=str(authority.file))
    front = LocalFront(proxy)
    clients = [McpClient(front).open() for _ in range(4)]
    for client in clients:
        assert client.session is not None
        metadata = proxy.manager.load(client.session).metadata
        assert metadata["backend_url"] == f"https://127.0.0.1:{secure.backend.port}"
        assert metadata["backend_host"] == NAME
        client.result("tools/call")
    assert set(secure.names) == {NAME}
    front.close()
    proxy.close()
