"""The real command and real gunicorn: start, refusals, signals, kinds of workers, departures."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.ways_in import with_certificate
from tests.support import needs
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import (
    COMMAND,
    GUNICORN,
    GUNICORN_CHECKOUT,
    ProxyProcess,
    is_alive,
)
from tests.support.redis_server import RedisServer
from tests.support.tls import Certificates
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]


def client_of(process: ProxyProcess, path: str = "/mcp") -> McpClient:
    return McpClient(HttpFront(process.base), path)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


THREADS = "mcp_proxy.server.worker.KeepaliveWorker"
GREENLETS = "mcp_proxy.server.gevent_worker.GeventWorker"

#: The proxy under a configuration that is not ours.
PLAIN = ("-m", "gunicorn", "-c", "python:tests.live.plain_gunicorn", "mcp_proxy.wsgi:app")


# --- the worker class ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        (["-k", "gevent"], GREENLETS),
        (["-k", "gthread"], THREADS),
        (["-k", "sync", "--threads", "1"], THREADS),
    ],
)
def test_with_our_configuration_gunicorns_worker_classes_are_ours(
    options: list[str], ours: str
) -> None:
    with ProxyProcess(SCRIPTED, options=options, way=GUNICORN) as process:
        assert f"Using worker: {ours}" in process.log()
        assert client_of(process).open().result("count")["calls"] == 1
        (before,) = process.worker_pids()
        os.kill(process.master_pid, signal.SIGHUP)
        eventually(lambda: before not in process.worker_pids(), 20)
        assert process.log().count(f": {ours} is used") == 2
        assert client_of(process).open().result("count")["calls"] == 1
        assert 'worker_class = "' not in process.log()


@pytest.mark.parametrize(("kind", "ours"), [("gthread", THREADS), ("gevent", GREENLETS)])
def test_a_worker_class_that_is_not_ours_is_told_at_the_first_request(kind: str, ours: str) -> None:
    with ProxyProcess(SCRIPTED, options=["-k", kind], way=PLAIN) as process:
        eventually(lambda: f'worker_class = "{ours}"' in process.log())
        client_of(process).open()
        assert process.log().count("worker_class = ") == 1
    with ProxyProcess(SCRIPTED, options=["-k", ours], way=PLAIN) as process:
        client_of(process).open()
        assert "worker_class = " not in process.log()


@pytest.mark.parametrize("ours", [THREADS, GREENLETS])
def test_a_deadline_that_does_not_fit_is_refused_at_the_start(ours: str) -> None:
    way = ("-m", "gunicorn", "-c", "python:tests.live.plain_gunicorn", "-k", ours)
    for options, environment in (
        ((), {"MCP_PROXY_CLIENT_TIMEOUT": "soon"}),
        (("-e", "MCP_PROXY_CLIENT_TIMEOUT=soon"), {}),
    ):
        ended = run(*way, *options, "tests.live.held:app", **environment)
        assert ended.returncode == 1
        assert "mcp-wsgi-proxy: client_timeout: expected a number above 0" in ended.stderr
        assert "Traceback" not in ended.stderr


# --- starting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [COMMAND, GUNICORN, GUNICORN_CHECKOUT])
def test_the_demo_is_served_when_nothing_is_configured(way: tuple[str, ...]) -> None:
    with ProxyProcess(way=way) as process:
        client = client_of(process).open()
        result = client.result("tools/call", {"name": "add", "arguments": {"a": 2, "b": 3}})
        assert result["content"][0]["text"] == "5"


def test_the_banner_has_a_block_to_paste() -> None:
    with ProxyProcess(SCRIPTED) as process:
        eventually(lambda: "Health:" in process.log())
        block = re.search(r"^    \{.*?^    \}", process.log(), re.DOTALL | re.MULTILINE)
        assert block is not None
        assert json.loads(block[0])["mcpServers"]["scripted"] == {
            "type": "http",
            "url": process.url,
        }


def test_preload_works() -> None:
    with ProxyProcess(SCRIPTED, options=["--preload"], way=GUNICORN) as process:
        client = client_of(process).open()
        assert client.result("count")["calls"] == 1


def test_gevent_works(redis_server: RedisServer, redis_prefix: str) -> None:
    options = ["--worker-class", "gevent", "--keepalive-interval", "0.2", "--sse-after", "0.2"]
    store = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(SCRIPTED, options=[*options, *store]) as process:
        client = client_of(process).open()
        stream = client.listen()
        slow = client.call("sleep", {"seconds": 1})
        assert client.result("count")["calls"] == 1
        assert slow.message()["result"]["slept"] == 1
        client.result("later", {"message": {"method": "notifications/message", "params": {}}})
        assert next(stream.stream())["method"] == "notifications/message"
        stream.close()
        assert client.call("die", {"code": 3}).failure == "server-exited"
        assert client.result("count")["calls"] == 1


def test_settings_of_gunicorns_own_that_the_command_does_not_read_are_named() -> None:
    environment = {"GUNICORN_CMD_ARGS": "--max-requests 6"}
    with ProxyProcess(environment=environment) as process:
        assert "GUNICORN_CMD_ARGS is not read by this command" in process.log()
    with ProxyProcess(environment=environment, way=GUNICORN) as process:
        assert "is not read" not in process.log()


def test_max_requests_restarts_the_worker_and_redis_keeps_the_session(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    store = {"MCP_PROXY_REDIS_URL": redis_server.url, "MCP_PROXY_REDIS_PREFIX": redis_prefix}
    options = ["--max-requests", "6"]
    with ProxyProcess(SCRIPTED, options=options, way=GUNICORN, environment=store) as process:
        client = client_of(process).open()
        (worker,) = process.worker_pids()
        assert client.result("count")["calls"] == 1
        eventually(lambda: client.result("count")["calls"] == 1)  # by a server of the next worker
        assert process.worker_pids() != [worker]


def test_several_servers_stand_under_their_names(tmp_path: Path) -> None:
    entry = {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])}
    servers = {
        "one": {**entry, "env": {"WHO": "${WHOSE}-one"}, "cwd": str(tmp_path)},
        "two": entry,
        "off": {**entry, "disabled": True},
    }
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    options = ["--config", str(file)]
    with ProxyProcess(options=options, environment={"WHOSE": "mine"}) as process:
        one = client_of(process, "/servers/one/mcp").open()
        environment = one.result("environment")
        assert environment["environ"]["WHO"] == "mine-one"
        assert environment["cwd"] == str(tmp_path)
        two = client_of(process, "/servers/two/mcp/").open()
        assert two.result("count")["calls"] == 1
        two.session = one.session
        assert two.call("count").status == 404
        for path in ("/mcp", "/servers/three/mcp", "/servers/one/other", "/"):
            assert client_of(process, path).initialize().status == 404
        assert client_of(process, "/servers/off/mcp").initialize().failure == "disabled"
        ready = one.front.request("GET", "/readyz", {}, None)
        assert json.loads(ready.body())["checks"]["server two"] == {"state": "ok"}


# --- refusals ------------------------------------------------------------------------------------


#: What keeps workers from passing, and the options for it.
REASONS = {
    "passing is off": ("--passing", "off", "--", *SCRIPTED),
    "worker_class is gevent": ("--worker-class", "gevent", "--", *SCRIPTED),
    "there is an HTTP server": ("--target-url", "http://127.0.0.1:1/mcp"),
}


def test_more_than_one_worker_is_refused_where_sessions_are_in_memory_and_stay() -> None:
    for why, options in REASONS.items():
        refused = run("-m", "mcp_proxy", "--workers", "2", *options)
        assert refused.returncode == 2
        assert "2 workers do not know each other's sessions" in refused.stderr
        assert f"and {why}: set redis_url" in refused.stderr


def test_more_than_one_worker_is_refused_by_our_gunicorn_configuration(
    tmp_path: Path,
) -> None:
    refused = run(*GUNICORN, "-w", "2", "-b", "127.0.0.1:0", MCP_PROXY_PASSING="off")
    assert refused.returncode != 0
    assert "2 workers do not know each other's sessions" in refused.stderr
    refused = run(
        *GUNICORN, "-w", "2", "-b", "127.0.0.1:0", *with_certificate(Certificates(tmp_path))
    )
    assert "TLS is in the worker" in refused.stderr


def test_a_bad_setting_is_one_sentence() -> None:
    refused = run("-m", "mcp_proxy", MCP_PROXY_SESSION_TTL="soon")
    assert refused.returncode == 2
    assert refused.stderr == (
        "mcp-wsgi-proxy: session_ttl: expected a number above 0 and at most 315360000, got 'soon'\n"
    )


def test_check_prints_a_table(redis_server: RedisServer) -> None:
    store = ["--redis-url", redis_server.url]
    good = run("-m", "mcp_proxy", "check", *store, "--", *SCRIPTED)
    assert good.returncode == 0, good.stdout + good.stderr
    assert re.search(r"ok +sessions +Redis \d+\.\d+", good.stdout)
    assert re.search(r"ok +server default +stdio +scripted 1, revision 2025-11-25", good.stdout)


def test_check_says_when_workers_need_redis() -> None:
    workers = ("-m", "mcp_proxy", "check", "--workers", "3")
    bad = run(*workers, "--passing", "off", "--", *SCRIPTED)
    assert bad.returncode == 1
    assert re.search(r"FAIL +workers +3 workers do not know", bad.stdout)
    good = run(*workers, "--", *SCRIPTED)
    assert good.returncode == 0
    assert re.search(r"ok +sessions +in the memory of the worker of each, which", good.stdout)


def test_check_says_what_is_wrong() -> None:
    lost = ["--redis-url", "redis://127.0.0.1:1", "--workers", "3"]
    bad = run("-m", "mcp_proxy", "check", *lost, "--", *SCRIPTED, "--die-on-initialize")
    assert bad.returncode == 1
    assert re.search(r"ok +workers +3 with 64 threads", bad.stdout)
    assert re.search(r"FAIL +sessions", bad.stdout)
    assert re.search(r"FAIL +server default +stdio +The server exited \(exit code 3\)", bad.stdout)
    assert "stderr: cannot find my database" in bad.stdout


# --- health --------------------------------------------------------------------------------------


def test_health_while_redis_is_away(own_redis: Any) -> None:
    redis = own_redis()
    options = ["--redis-url", redis.url, "--connect-timeout", "1"]
    with ProxyProcess(SCRIPTED, options=options) as process:
        front = HttpFront(process.base)

        def status(path: str) -> int:
            answer = front.request("GET", path, {"Host": "a.pod.example"}, None)
            answer.close()
            return answer.status

        assert (status("/healthz"), status("/readyz"), status("/health")) == (200, 200, 200)
        redis.stop()
        eventually(lambda: (status("/readyz"), status("/health")) == (503, 503))
        assert status("/healthz") == 200
        redis.start()
        eventually(lambda: status("/readyz") == 200)
        assert front.request("POST", "/healthz", {}, b"").status == 405


# --- CPUs ----------------------------------------------------------------------------------------


@needs.PINNING
def test_the_worker_has_one_cpu_and_its_children_all() -> None:
    everything = os.sched_getaffinity(0)
    with ProxyProcess(SCRIPTED, options=["--cpu-affinity", str(max(everything))]) as process:
        (worker,) = process.worker_pids()
        eventually(lambda: os.sched_getaffinity(worker) == {max(everything)})
        assert os.sched_getscheduler(worker) == os.SCHED_BATCH
        client = client_of(process).open()
        assert set(client.result("environment")["cpus"]) == everything
        (server,) = process.server_pids()
        assert os.sched_getscheduler(server) == os.SCHED_OTHER


def test_affinity_can_be_off() -> None:
    with ProxyProcess(SCRIPTED, options=["--cpu-affinity", "off"]) as process:
        (worker,) = process.worker_pids()
        assert os.sched_getaffinity(worker) == os.sched_getaffinity(0)


# --- logs ----------------------------------------------------------------------------------------


def test_json_logs_carry_the_request_and_hide_secrets(redis_server: RedisServer) -> None:
    options = ["--log-format", "json", "--redis-url", redis_server.url]
    with ProxyProcess(SCRIPTED, options=options) as process:
        client = client_of(process)
        answer = client.initialize()
        request = answer.headers["X-Request-ID"]
        assert client.call("echo", X_Request_ID="my-own-id").headers["X-Request-ID"] == "my-own-id"
        eventually(lambda: "my-own-id" in process.log())
        lines = [json.loads(line) for line in process.log().splitlines() if line.startswith('{"')]
        (line,) = [line for line in lines if line.get("request") == request]
        assert line["rpc"] == "initialize"
        assert line["status"] == 200
        assert client.session not in process.log()


# --- servers that flood --------------------------------------------------------------------------


def rate_of(client: McpClient, seconds: float = 2.0) -> float:
    """Calls a second of one client after another."""
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        client.call("echo").body()
        count += 1
    return count / (time.monotonic() - began)


@pytest.mark.parametrize("output", ["noise", "messages", "stderr"])
def test_a_flood_of_one_session_costs_its_neighbours_next_to_nothing(output: str) -> None:
    with ProxyProcess(SCRIPTED) as process:
        loud, neighbour = client_of(process).open(), client_of(process).open()
        quiet = rate_of(neighbour)
        size = len(process.log())
        loud.call("flood", {"with": output}).body()
        during = rate_of(neighbour)
        print(f"{output}: {quiet:.0f} calls a second, {during:.0f} during the flood:", end=" ")
        print(f"{during / quiet:.2f}")
        assert during > quiet / 3  # of a machine that has other things to do, too
        assert len(process.log()) - size < 1_000_000
        if output == "stderr":
            assert loud.result("echo", {"a": 1}) == {"a": 1}


# --- clients that leave --------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_place_within_a_keepalive() -> None:
    options = ["--max-streams", "1", "--keepalive-interval", "0.3"]
    with ProxyProcess(SCRIPTED, options=options) as process:
        client = client_of(process).open()
        for _ in range(3):
            eventually(lambda: client.listen().status == 200, timeout=2)


def test_a_connection_that_is_reset_frees_its_place() -> None:
    options = ["--max-streams", "1", "--keepalive-interval", "0.3"]
    with ProxyProcess(SCRIPTED, options=options) as process:
        client = client_of(process).open()
        with socket.create_connection(("127.0.0.1", process.port)) as connection:
            request = (
                f"GET /mcp HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
                f"Mcp-Session-Id: {client.session}\r\n\r\n"
            )
            connection.sendall(request.encode())
            assert b"200 OK" in connection.recv(4096)
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        eventually(lambda: client.listen().status == 200, timeout=2)


def leave(process: ProxyProcess, method: str, params: dict[str, Any], session: str = "") -> None:
    """Makes a call as a client that takes JSON alone, and leaves while the server is silent."""
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    named = f"Mcp-Session-Id: {session}\r\n" if session else ""
    head = (
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        f"Content-Type: application/json\r\n{named}Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", process.port)) as connection:
        connection.sendall(head.encode() + body)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_callers_that_take_json_alone_free_their_threads_when_they_leave(kind: str) -> None:
    with ProxyProcess(SCRIPTED, options=["--threads", "4", "--worker-class", kind]) as process:
        client = client_of(process).open()
        with ThreadPoolExecutor(4) as pool:
            left = [
                pool.submit(leave, process, "sleep", {"seconds": 60}, str(client.session))
                for _ in range(4)
            ]
            for one in left:
                one.result(10)
        began = time.monotonic()
        assert client.result("count")["calls"] == 1
        assert time.monotonic() - began < 5
        eventually(lambda: " 499 " in process.log())


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_a_client_that_gives_up_during_a_slow_initialize_leaves_nothing(kind: str) -> None:
    command = [*SCRIPTED, "--slow-start", "2"]
    options = ["--max-sessions", "1", "--worker-class", kind]
    with ProxyProcess(command, options=options) as process:
        leave(process, "initialize", {"protocolVersion": "2025-06-18"})
        eventually(lambda: client_of(process).initialize().has_succeeded, timeout=20)


def test_a_call_survives_its_client() -> None:
    with ProxyProcess(SCRIPTED, options=["--sse-after", "0.1"]) as process:
        client = client_of(process).open()
        leaving = client.call("sleep", {"seconds": 0.5})
        leaving.close()
        eventually(lambda: client.result("count")["calls"] > 0)
        methods = [m.get("method") for m in client.result("seen")["messages"]]
        assert "notifications/cancelled" not in methods


# --- the end -------------------------------------------------------------------------------------


def test_sigterm_ends_streams_and_gives_calls_time() -> None:
    with ProxyProcess(SCRIPTED, options=["--sse-after", "0.1"]) as process:
        client = client_of(process).open()
        stream = client.listen()
        call = client.call("sleep", {"seconds": 1})
        (server,) = process.server_pids()
        os.kill(process.master_pid, signal.SIGTERM)
        assert list(stream.stream()) == []
        assert call.message()["result"]["slept"] == 1
        assert process.wait(15) == 0
        assert not is_alive(server)


def test_sigint_ends_everything_at_once() -> None:
    with ProxyProcess(SCRIPTED) as process:
        client = client_of(process).open()
        client.listen()
        (server,) = process.server_pids()
        os.kill(process.master_pid, signal.SIGINT)
        process.wait(10)
        assert not is_alive(server)


def test_a_killed_worker_leaves_nothing_within_two_seconds() -> None:
    with ProxyProcess([*SCRIPTED, "--ignore-eof", "--ignore-term"]) as process:
        client = client_of(process).open()
        grandchild = client.result("grandchild", {"escape": True})["pid"]
        (server,), (worker,) = process.server_pids(), process.worker_pids()
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: not is_alive(server) and not is_alive(grandchild), timeout=2)


# --- what is not HTTP ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nhello\r\n0\r\n\r\n",
        b"5 ;a=b\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nContent-Length: 7\r\nbad name: 1\r\n\r\n",
        b"5\r\nhelloXX0\r\n\r\n",
    ],
)
def test_a_badly_framed_body_is_a_400_and_a_path_forges_no_log_line(body: bytes) -> None:
    head = b"POST /mcp/x%0aFORGED%1b[31m HTTP/1.1\r\nHost: localhost\r\n\r\n"
    chunked = (
        b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    with ProxyProcess(SCRIPTED) as process:
        for request, status in ((head, b"404"), (chunked + body, b"400")):
            with socket.create_connection(("127.0.0.1", process.port), timeout=20) as connection:
                connection.sendall(request)
                assert connection.recv(4096).split()[1] == status
        eventually(lambda: "FORGED" in process.log())
        log = process.log()
    assert not any(line.startswith("FORGED") for line in log.splitlines())
    assert r"/mcp/x\nFORGED\x1b[31m" in log
    assert "not foreseen" not in log
    assert "failed unexpectedly" not in log
