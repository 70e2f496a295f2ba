"""The admin socket of a real gunicorn: metrics and probes, whatever the workers are doing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import needs
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import COMMAND, GUNICORN, ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.scrapes import (
    ADMIN,
    admin_port,
    get,
    has_free_thread,
    seconds_for,
    series_of,
    sum_of,
)
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

COUNT = "mcp_server_operation_duration_seconds_count"

#: A second master is begun with the arguments of the first, and `-m` is none of them.
AS_A_SCRIPT = (str(Path(sys.executable).with_name("gunicorn")), *GUNICORN[2:])

#: Seconds in which the admin socket answers while every thread is taken (the median).
SOON = 0.05


@pytest.fixture(params=["gthread", "gevent"])
def process(request: pytest.FixtureRequest) -> Iterator[ProxyProcess]:
    """A proxy of one worker with an admin socket."""
    options = [*ADMIN, "--worker-class", request.param, "--threads", "4"]
    with ProxyProcess(SCRIPTED, options=options) as made:
        yield made


def calls(port: int, **labels: str) -> float:
    return sum_of(get(port, "/metrics")[1], COUNT, mcp_method_name="tools/call", **labels)


# --- what it serves ------------------------------------------------------------------------------


def test_it_serves_metrics_and_probes_and_nothing_else(process: ProxyProcess) -> None:
    port = admin_port(process)
    client = McpClient(HttpFront(process.base)).open()
    client.call("tools/call", {"name": "echo"})
    assert calls(port, gen_ai_tool_name="echo", mcp_server="default", error_type="") == 1
    assert get(port, "/healthz") == (200, b'{"status":"ok"}')
    status, body = get(port, "/readyz")
    assert (status, json.loads(body)["status"]) == (200, "ready")
    assert get(port, "/mcp")[0] == 404
    assert get(process.port, "/metrics")[0] == 404
    text = eventually(lambda: _with_children(get(port, "/metrics")[1]))
    assert sum_of(text, "mcp_proxy_children_started_total") == 1
    assert sum_of(text, "mcp_proxy_streams_left") > 0
    assert sum_of(text, "mcp_proxy_worker_resident_bytes") > 10_000_000


def _with_children(text: bytes) -> bytes | None:
    return text if sum_of(text, "mcp_proxy_children") == 1 else None


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}], ids=str
)
def test_hosts_and_origins_are_checked_as_at_the_main_address(
    process: ProxyProcess, headers: dict[str, str]
) -> None:
    assert get(admin_port(process), "/metrics", headers)[0] == 403
    assert get(admin_port(process), "/healthz", headers)[0] == 200


def test_a_client_that_says_nothing_or_reads_nothing_keeps_nobody_waiting(
    process: ProxyProcess,
) -> None:
    port = admin_port(process)
    with ExitStack() as stack:
        for said in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") * 10:
            silent = stack.enter_context(closing(socket.create_connection(("127.0.0.1", port))))
            silent.sendall(said)
        began = time.monotonic()
        assert get(port, "/healthz")[0] == 200
        assert time.monotonic() - began < 2
    for nonsense in (b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"x" * 20_000):
        with closing(socket.create_connection(("127.0.0.1", port))) as odd:
            odd.sendall(nonsense)
            odd.settimeout(10)
            while odd.recv(4096):
                pass
    assert get(port, "/healthz")[0] == 200


@needs.THREADS
def test_answers_come_soon_while_every_thread_is_taken() -> None:
    options = [*ADMIN, "--threads", "4"]
    with ProxyProcess(SCRIPTED, options=options) as process, ThreadPoolExecutor(8) as pool:
        port = admin_port(process)
        clients = [McpClient(HttpFront(process.base)).open() for _ in range(8)]
        get(port, "/readyz")
        held = [pool.submit(client.result, "sleep", {"seconds": 6}) for client in clients]
        eventually(lambda: not has_free_thread(process.port), 20, "not every thread is taken")
        for path in ("/metrics", "/readyz"):
            taken = [seconds_for(port, path) for _ in range(20)]
            print(f"{path}: median {statistics.median(taken) * 1000:.1f} ms", flush=True)
            assert statistics.median(taken) < SOON
        assert not any(each.done() for each in held)
        assert all(each.result()["slept"] == 6 for each in held)


# --- over workers that come and go ---------------------------------------------------------------


@pytest.mark.parametrize("way", [COMMAND, GUNICORN], ids=["command", "gunicorn"])
def test_a_worker_goes_on_with_the_counters_of_the_one_before_it(way: tuple[str, ...]) -> None:
    environment = {"MCP_PROXY_ADMIN_BIND": "127.0.0.1:0"}
    with ProxyProcess(SCRIPTED, environment=environment, way=way) as process:
        port = admin_port(process)
        for turn in range(1, 4):
            client = McpClient(HttpFront(process.base)).open()
            client.call("tools/call", {"name": "echo"})
            assert calls(port, gen_ai_tool_name="echo") == turn
            (worker,) = process.worker_pids()
            os.kill(worker, signal.SIGKILL)
            eventually(lambda old=worker: process.worker_pids() not in ([], [old]), 20)
            eventually(lambda: get(process.port, "/healthz")[0] == 200, 20)
        text = get(port, "/metrics")[1]
        assert [each["worker"] for each in series_of(text, "mcp_proxy_sessions")] == ["0"]


def test_readyz_is_that_of_the_instance_and_names_its_workers(
    redis_url: str, redis_prefix: str
) -> None:
    options, store = [*ADMIN, "--workers", "2"], needs.store_of_several(redis_url, redis_prefix)
    with ProxyProcess(SCRIPTED, options=options, environment=store) as process:
        port = admin_port(process)

        def states() -> dict[str, str]:
            status, body = get(port, "/readyz")
            assert status == 200
            return {name: part["state"] for name, part in json.loads(body)["checks"].items()}

        eventually(lambda: states() == {"worker 0": "ok", "worker 1": "ok"})
        victim = process.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: victim not in process.worker_pids())
        eventually(lambda: states() == {"worker 0": "ok", "worker 1": "ok"}, 20)


def test_a_second_master_takes_the_socket_over_and_gives_it_back(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    """By SIGUSR2; where the new master ends, the workers of the old one serve it again."""
    environment = {
        "MCP_PROXY_ADMIN_BIND": "127.0.0.1:0",
        "MCP_PROXY_REDIS_URL": redis_server.url,
        "MCP_PROXY_REDIS_PREFIX": redis_prefix,
    }
    with ProxyProcess(SCRIPTED, environment=environment, way=AS_A_SCRIPT) as process:
        port = admin_port(process)
        client = McpClient(HttpFront(process.base)).open()
        client.call("tools/call", {"name": "echo"})
        assert calls(port) == 1
        (old,) = process.worker_pids()
        os.kill(process.master_pid, signal.SIGUSR2)
        said = "metrics and probes at"
        eventually(lambda: process.log().count(said) == 2, 20)
        assert process.log().count(f"{said} http://127.0.0.1:{port}/metrics") == 2
        eventually(lambda: not any(calls(port) for _ in range(10)), 20, "the old worker answers")
        (new_master,) = [pid for pid in process.worker_pids() if pid != old]
        os.kill(new_master, signal.SIGQUIT)
        eventually(lambda: calls(port) == 1, 30, "the old worker does not answer again")


def test_an_address_that_is_taken_is_said_in_a_sentence(tmp_path: object) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BaseException, match="ended with 1") as failed:
            ProxyProcess(SCRIPTED, options=["--admin-bind", address])
        assert f"admin_bind: {address} cannot be used" in "".join(failed.value.__notes__)


# --- the wire of 2024-11-05 ----------------------------------------------------------------------


def test_calls_over_http_and_sse_are_counted_when_their_answer_leaves() -> None:
    with ProxyProcess(SCRIPTED, options=[*ADMIN]) as process:
        port = admin_port(process)
        with closing(SseClient(HttpFront(process.base))) as client:
            client.open()
            for _ in range(3):
                client.result("tools/call", {"name": "echo"})
            assert calls(port, gen_ai_tool_name="echo") == 3
        ended = "mcp_server_session_duration_seconds_count"
        eventually(lambda: sum_of(get(port, "/metrics")[1], ended) == 1)


# --- the page ------------------------------------------------------------------------------------


@needs.PASSING
def test_the_page_shows_all_workers_and_its_url_at_the_main_address_is_printed() -> None:
    with ProxyProcess(SCRIPTED, options=[*ADMIN, "--workers", "2"]) as process:
        port = admin_port(process)
        client = McpClient(HttpFront(process.base)).open()
        client.call("tools/call", {"name": "echo"})

        def told() -> Any:
            return json.loads(get(port, "/status.json")[1])

        eventually(lambda: len(told()["workers"]) == 2)
        eventually(lambda: {each["health"] for each in told()["workers"]} == {"ready"})
        assert {each["pid"] for each in told()["workers"]} == set(process.worker_pids())
        assert [each["id"] for each in told()["sessions"]] == [(client.session or "")[-8:]]
        found = re.search(r"Status: http://127[^/]+(/status\?token=\S+)", process.log())
        assert found is not None
        for path in (found[1], found[1].replace("/status", "/status.json")):
            assert get(process.port, path)[0] == 200
        assert get(process.port, "/status")[0] == 404
