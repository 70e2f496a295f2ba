"""Clients that send or read slowly, or not at all, cost the others nothing, and are told so."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.live.connections import Connection
from tests.server.test_worker import Held, serving
from tests.server.ways_in import WayIn, impatient
from tests.support.proxy_process import GUNICORN, ProxyProcess
from tests.support.waiting import eventually

HALF_HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-"
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"
HALF_BODY = HEAD + b"12345"
_ODD = b"\r\nPOST / HTTP/1.1\r\nHost: localhost\r\n"
_LARGE = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"


def slowest_answer(held: Held, seconds: float) -> float:
    """The longest that a well-behaved client, and a new connection, waits for an answer."""
    slowest = 0.0
    end = time.monotonic() + seconds
    with closing(held.connect()) as kept:
        while time.monotonic() < end:
            before = time.monotonic()
            assert kept.ask("/", body=b"x" * 100).status == 200
            with closing(held.connect()) as new:
                assert new.ask("/healthz").status == 200
            slowest = max(slowest, time.monotonic() - before)
    return slowest


def test_halves_of_requests_cost_the_others_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "8") as held, ExitStack() as stack:
        for data in (HALF_HEAD, HALF_BODY, b"", _ODD, _LARGE):
            for _ in range(100):
                stack.enter_context(closing(held.connect())).send_raw(data)
        assert slowest_answer(held, 3) < 2


def test_idle_connections_cost_the_others_nothing(tmp_path: Path) -> None:
    options = ("--threads", "8", "--keep-alive", "75")
    with serving(tmp_path, *options) as held, ExitStack() as stack:
        idle = [stack.enter_context(closing(held.connect())) for _ in range(200)]
        assert {connection.ask("/").status for connection in idle} == {200}
        assert slowest_answer(held, 1) < 2
        assert {connection.ask("/").status for connection in idle} == {200}


def test_halves_behind_whole_requests_cost_the_others_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "4") as held, ExitStack() as stack:
        for half in (HALF_HEAD, HALF_BODY) * 4:
            connection = stack.enter_context(closing(held.connect()))
            connection.send_raw(HEAD + b"1234567890" + half)
            assert connection.read().status == 200
        assert slowest_answer(held, 1) < 2


@pytest.mark.parametrize("first", [b"", HEAD + b"1234567890"])
def test_what_does_not_arrive_in_time_is_answered_with_408(way_in: WayIn, first: bytes) -> None:
    with way_in.impatient() as held, ExitStack() as stack:
        late = []
        began = time.monotonic()
        for data in (HALF_HEAD, HEAD, HALF_BODY, _ODD, _LARGE + b"1"):
            connection = stack.enter_context(closing(held.connect()))
            connection.send_raw(first)
            if first:
                assert connection.read().status == 200
            connection.send_raw(data)
            late.append(connection)
        before = time.monotonic()
        for connection in late:
            answer = connection.read_head()
            assert (answer.status, answer.headers["Connection"]) == (408, "close")
            assert json.loads(answer.read())["error"]["code"] == -32600
            assert time.monotonic() - began > 1.9
            assert time.monotonic() - before < 4
            assert connection.is_closed_by_server()


_TYPE = b"Content-Type: application/json\r\n"


@pytest.mark.parametrize(
    "request_of_a_slow_client",
    [
        _LARGE.replace(b"/ ", b"/mcp ").replace(b"Host", _TYPE + b"Host") + b"1",
        b"POST /mcp HTTP/1.1\r\nHost: localhost\r\n" + _TYPE + b"Transfer-Encoding: chunked\r\n\r\n"
        b"80000\r\n" + b" " * 1000,
        b"\r\nPOST /mcp HTTP/1.1\r\nHost: localhost\r\n"
        + _TYPE
        + b"Content-Length: 10\r\n\r\n12345",
    ],
    ids=["large", "in chunks", "odd"],
)
def test_a_body_that_comes_too_slowly_for_the_proxy_is_a_408(
    request_of_a_slow_client: bytes,
) -> None:
    environment = {"MCP_PROXY_CLIENT_TIMEOUT": "1"}
    with (
        ProxyProcess(way=GUNICORN, environment=environment) as process,
        closing(Connection(process.port)) as connection,
    ):
        connection.send_raw(request_of_a_slow_client)
        answer = connection.read_head()
        assert (answer.status, answer.headers["Connection"]) == (408, "close")
        assert json.loads(answer.read())["error"]["code"] == -32600
        assert connection.is_closed_by_server()


def test_a_client_that_sends_a_byte_at_a_time_is_not_waited_for_any_longer(tmp_path: Path) -> None:
    with impatient(tmp_path) as held, closing(held.connect()) as connection:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            connection.send_raw(b"G")
            time.sleep(0.1)
        assert connection.read().status == 408


def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path: Path) -> None:
    with impatient(tmp_path) as held, closing(held.connect()) as connection:
        assert connection.is_closed_by_server()


def test_slow_requests_hold_a_quarter_of_the_threads_only_until_their_bodies_have_come(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "--threads", "4") as held, ExitStack() as stack:
        large = _LARGE.replace(b"/ ", b"/held ")
        calls = [stack.enter_context(closing(held.connect())) for _ in range(3)]
        for call in calls:
            call.send_raw(large)
            call.send_raw(b"x" * 1_000_000)
        with closing(held.connect()) as other:
            assert other.ask("/", body=b"x" * 300_000).status == 200
        held.release()
        assert [call.read().status for call in calls] == [200] * 3


def test_a_client_that_waits_for_100_gets_it_once(way_in: WayIn) -> None:
    with way_in.serving("--threads", "4") as held, closing(held.connect()) as connection:
        head = HEAD.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        for _ in range(2):
            connection.send_raw(head)
            assert connection.file.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert connection.file.readline() == b"\r\n"
            connection.send_raw(b"1234567890")
            assert connection.read().status == 200


def test_chunks_and_requests_in_one_go_are_served(tmp_path: Path) -> None:
    chunked = (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    with serving(tmp_path, "--threads", "4") as held, closing(held.connect()) as connection:
        connection.send_raw((chunked + HEAD + b"1234567890") * 5)
        assert [connection.read().status for _ in range(10)] == [200] * 10


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nBad Name: 1\r\n\r\n", 400),
        (b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * 9000), 414),
        (b"GET / HTTP/1.1\r\nA: %s" % (b"x" * 40_000), 431),
        (b"GET / HTTP/1.1\r\nA: %s\r\n\r\n" % (b"x" * 10_000), 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: more\r\n\r\n", 417),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: odd\r\n\r\n", 501),
        (_LARGE.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"), 413),
    ],
)
def test_what_is_refused_is_a_json_rpc_error(way_in: WayIn, data: bytes, status: int) -> None:
    with way_in.impatient() as held, closing(held.connect()) as connection:
        connection.send_raw(data)
        answer = connection.read_head()
        assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
        assert json.loads(answer.read())["error"]["code"] == -32600
        assert connection.is_closed_by_server()


def memory_of(pid: int) -> int:
    """The bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_clients_that_do_not_read_hold_threads_for_the_time_of_one_piece(tmp_path: Path) -> None:
    with impatient(tmp_path, "--threads", "64") as held, ExitStack() as stack:
        (worker,) = held.process.worker_pids()
        for _ in range(64):
            stack.enter_context(closing(held.connect())).send("/large")
        before = time.monotonic()
        with closing(held.connect()) as other:
            assert other.ask("/").status == 200
        assert time.monotonic() - before < 4
        assert memory_of(worker) < 64 * 8 * 1024 * 1024 + 100 * 1024 * 1024
        assert held.process.worker_pids() == [worker]
        assert "Traceback" not in held.process.log()


def test_an_answer_that_its_client_does_not_read_is_told(tmp_path: Path) -> None:
    with impatient(tmp_path) as held, closing(held.connect()) as connection:
        connection.send("/large?said=1")
        told = r"The answer to POST /large was cut off after (\d+) bytes: 127\.0\.0\.1 did not read"
        taken = eventually(lambda: re.search(told, held.process.log()), 20)
        assert 0 < int(taken[1]) < 8 * 1024 * 1024
        assert "did not read for 2 s" in held.process.log()
