"""The gevent worker: clients that are slow, silent or wrong, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.live.connections import Connection
from tests.server import test_worker
from tests.server.test_crowds import CROWDS, WITH_FEW_FILES, crowd, probe_for
from tests.server.test_limits import open_files
from tests.server.test_slow_clients import HALF_BODY, HALF_HEAD, HEAD, slowest_answer
from tests.server.test_worker import Held
from tests.support.front import HttpFront, McpClient
from tests.support.proxy_process import COMMAND, ProxyProcess
from tests.support.tls import Certificates
from tests.support.waiting import eventually

WORKER = "mcp_proxy.server.gevent_worker.GeventWorker"
PLAIN = ("-m", "gunicorn", "-c", "python:tests.live.plain_gunicorn", "-k", WORKER)
IMPATIENT = ("-m", "gunicorn", "-c", "python:tests.live.impatient_gunicorn", "-k", WORKER)


serving = partial(test_worker.serving, way=PLAIN)


def test_requests_are_served_one_after_the_other_on_a_connection(tmp_path: Path) -> None:
    with serving(tmp_path) as held, closing(held.connect()) as connection:
        for _ in range(3):
            assert connection.ask("/", body=b"x" * 300_000).status == 200
        connection.send("/", "/", "/")
        assert [connection.read().status for _ in range(3)] == [200] * 3


def test_halves_of_requests_cost_the_others_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as held, ExitStack() as stack:
        for data in (HALF_HEAD, HALF_BODY, b""):
            for _ in range(100):
                stack.enter_context(closing(held.connect())).send_raw(data)
        assert slowest_answer(held, 2) < 2


@pytest.mark.parametrize("first", [b"", HEAD + b"1234567890"])
def test_what_does_not_arrive_in_time_is_answered_with_408(tmp_path: Path, first: bytes) -> None:
    with serving(tmp_path, way=IMPATIENT) as held, ExitStack() as stack:
        late = []
        for data in (HALF_HEAD, HEAD, HALF_BODY):
            connection = stack.enter_context(closing(held.connect()))
            connection.send_raw(first)
            if first:
                assert connection.read().status == 200
            connection.send_raw(data)
            late.append(connection)
        for connection in late:
            answer = connection.read_head()
            assert (answer.status, answer.headers["Connection"]) == (408, "close")
            assert json.loads(answer.read())["error"]["code"] == -32600
            assert connection.is_closed_by_server()
        assert "Traceback" not in held.process.log()


def test_a_head_that_comes_a_byte_at_a_time_is_not_waited_for_any_longer(tmp_path: Path) -> None:
    with serving(tmp_path, way=IMPATIENT) as held, closing(held.connect()) as connection:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            connection.send_raw(b"G")
            time.sleep(0.1)
        assert connection.read().status == 408


@pytest.mark.parametrize("serve", [serving, test_worker.serving], ids=["gevent", "threads"])
def test_its_deadlines_come_from_gunicorns_environment(tmp_path: Path, serve: Any) -> None:
    options = ("-e", "MCP_PROXY_CLIENT_TIMEOUT=1.5")
    with serve(tmp_path, *options) as held, closing(held.connect()) as connection:
        before = time.monotonic()
        connection.send_raw(HALF_HEAD)
        assert connection.read_head().status == 408
        assert time.monotonic() - before < 15


def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path: Path) -> None:
    with serving(tmp_path, way=IMPATIENT) as held, closing(held.connect()) as connection:
        assert connection.is_closed_by_server()
        assert "Traceback" not in held.process.log()


def test_an_answer_that_nobody_reads_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, way=IMPATIENT) as held, closing(held.connect()) as connection:
        connection.send("/large")
        time.sleep(4)  # twice the time that the client has; what was buffered is still there
        with pytest.raises((EOFError, OSError)):
            connection.read_head().read()
        assert "Traceback" not in held.process.log()
        told = r"The answer to POST /large was cut off after (\d+) bytes: 127\.0\.0\.1 did not read"
        (taken,) = re.findall(told, held.process.log())
        assert 0 < int(taken) < 8 * 1024 * 1024


def test_what_is_refused_is_a_json_rpc_error(tmp_path: Path) -> None:
    with serving(tmp_path) as held, closing(held.connect()) as connection:
        connection.send_raw(b"GET / HTTP/1.1\r\nHost: a\r\nX\x01: y\r\n\r\n")
        answer = connection.read_head()
        assert (answer.status, answer.headers["Content-Type"]) == (400, "application/json")
        assert json.loads(answer.read())["error"]["code"] == -32600


def test_a_worker_that_stops_does_not_wait_for_what_may_still_arrive(tmp_path: Path) -> None:
    with serving(tmp_path) as held, ExitStack() as stack:
        for data in (HALF_HEAD, HALF_BODY, b"", HEAD + b"1234567890"):
            stack.enter_context(closing(held.connect())).send_raw(data)
        before = time.monotonic()
        os.kill(held.process.master_pid, signal.SIGTERM)
        held.process.wait(30)
        assert time.monotonic() - before < 15
        assert "ERROR" not in held.process.log()


def test_who_is_answered_by_a_worker_that_stops_loses_the_connection(tmp_path: Path) -> None:
    with serving(tmp_path) as held, ExitStack() as stack:
        late, idle = (stack.enter_context(closing(held.connect())) for _ in range(2))
        assert idle.ask("/").headers["Connection"] == "keep-alive"
        late.send("/held?begun")
        eventually(lambda: "begun" in held.process.log())
        os.kill(held.process.master_pid, signal.SIGTERM)
        assert idle.is_closed_by_server()  # this is done once
        held.release()
        assert late.read().headers["Connection"] == "close"
        held.process.wait(15)  # of the 30 seconds that gunicorn gives


def cpu_seconds(pid: int) -> float:
    """The CPU time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_body_that_is_refused_costs_the_others_nothing() -> None:
    """What gunicorn reads of it, 1 KiB at a time, is copied from a MiB of what has come."""
    options = ["--worker-class", "gevent"]
    with ProxyProcess(options=options, way=COMMAND) as process:
        (worker,) = process.worker_pids()
        before = cpu_seconds(worker)
        for _ in range(2):
            with closing(Connection(process.port)) as connection:
                with suppress(OSError):  # the worker reads it for two seconds
                    connection.send("/mcp", body=bytes(10 * 1024 * 1024))
                assert connection.read().status == 413
                assert connection.is_closed_by_server()
        assert cpu_seconds(worker) - before < 2


def test_a_little_of_a_body_that_is_refused_is_read_and_the_connection_kept() -> None:
    options = ["--worker-class", "gevent", "--max-body-bytes", "1000"]
    with (
        ProxyProcess(options=options, way=COMMAND) as process,
        closing(Connection(process.port)) as connection,
    ):
        for _ in range(3):
            assert connection.ask("/mcp", body=bytes(20_000)).status == 413


@pytest.mark.parametrize("kind", CROWDS)
def test_connections_that_are_silent_make_room_for_others(tmp_path: Path, kind: str) -> None:
    with serving(tmp_path, "--worker-connections", "8") as held, ExitStack() as stack:
        crowd(held, stack, CROWDS[kind], 100)
        assert probe_for(held, 2) < 2
        assert held.process.log().count("The worker has more than 8 connections") == 1


@pytest.mark.parametrize("kind", CROWDS)
def test_files_are_kept_back_however_many_clients_come(tmp_path: Path, kind: str) -> None:
    with serving(tmp_path, way=("-c", WITH_FEW_FILES, *PLAIN[2:])) as held, ExitStack() as stack:
        crowd(held, stack, CROWDS[kind], 400)
        (worker,) = held.process.worker_pids()
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert open_files(worker) < 200 - 48
            time.sleep(0.05)
        assert probe_for(held, 1) < 2
        assert "has no file for more connections" in held.process.log()
        assert "Traceback" not in held.process.log()


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def test_tls_is_served_and_its_failures_are_a_line(
    tmp_path: Path, certificates: Certificates
) -> None:
    files = ("--certfile", certificates.path("server.pem"), "--keyfile")
    options = (*files, certificates.path("server.key"))
    with serving(tmp_path, *options, way=IMPATIENT) as held:
        with closing(held.connect()) as plain:
            plain.send_raw(b"GET / HTTP/1.1\r\n\r\n")
            eventually(lambda: "TLS with 127.0.0.1 failed: " in held.process.log())
        with closing(held.connect()) as silent:
            assert silent.is_closed_by_server()
        held.tls = ssl.create_default_context(cafile=certificates.path("ca.pem"))
        with closing(held.connect()) as connection:
            assert connection.ask("/", body=b"x" * 100_000).status == 200
            assert connection.ask("/").status == 200
            connection.send_raw(HALF_HEAD)
            assert connection.read().status == 408
        assert "Traceback" not in held.process.log()


def test_a_worker_that_stops_does_not_wait_for_handshakes(
    tmp_path: Path, certificates: Certificates
) -> None:
    files = ("--certfile", certificates.path("server.pem"), "--keyfile")
    options = (*files, certificates.path("server.key"))
    with serving(tmp_path, *options) as held, ExitStack() as stack:
        for data in (b"", b"\x16\x03\x01\x02\x00\x01"):
            stack.enter_context(closing(held.connect())).send_raw(data)
        tls = ssl.create_default_context(cafile=certificates.path("ca.pem"))
        held.tls = tls  # what comes last is served: all were accepted
        with closing(held.connect()) as connection:
            assert connection.ask("/").status == 200
        before = time.monotonic()
        os.kill(held.process.master_pid, signal.SIGTERM)
        held.process.wait(30)
        assert time.monotonic() - before < 8
        assert "TLS with" not in held.process.log()


# --- our own application -------------------------------------------------------------------------


def test_our_command_uses_it_and_a_late_body_is_408(tmp_path: Path) -> None:
    options = ["--worker-class", "gevent", "--client-timeout", "2"]
    with ProxyProcess(options=options, way=COMMAND) as process:
        assert f"Using worker: {WORKER}" in process.log()
        assert McpClient(HttpFront(process.base)).open().call("echo").has_succeeded
        with closing(Held(process, tmp_path).connect()) as connection:
            head = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
            connection.send_raw(head + b"Content-Type: application/json\r\n\r\n12345")
            answer = connection.read()
            assert (answer.status, answer.headers["Connection"]) == (408, "close")
            assert connection.is_closed_by_server()
        assert "Traceback" not in process.log()
