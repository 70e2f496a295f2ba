"""Signals to the master that gunicorn alone would answer by ending sessions."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import COMMAND, GUNICORN, ProxyProcess, is_alive
from tests.support.redis_server import RedisServer
from tests.support.reloads import (
    ENTRY,
    client_of,
    hang_up,
    play,
    require_undisturbed,
    write,
)
from tests.support.waiting import eventually


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the server `one`."""
    made = tmp_path / "servers.json"
    write(made, one=ENTRY)
    return made


@pytest.fixture(params=[COMMAND, GUNICORN], ids=["command", "gunicorn"])
def process(request: pytest.FixtureRequest, file: Path) -> Iterator[ProxyProcess]:
    """A proxy that serves what is in `file`, in both ways to start it."""
    environment = {"MCP_PROXY_CONFIG": str(file)}
    with ProxyProcess(way=request.param, environment=environment) as made:
        yield made


@pytest.fixture
def proxy(file: Path) -> Iterator[ProxyProcess]:
    """The same in one way."""
    with ProxyProcess(way=GUNICORN, environment={"MCP_PROXY_CONFIG": str(file)}) as made:
        yield made


def readiness(process: ProxyProcess) -> dict[str, str]:
    """What /readyz says of the configuration."""
    answer = HttpFront(process.base).request("GET", "/readyz", {}, None)
    found: dict[str, str] = json.loads(answer.body())["checks"]["configuration"]
    return found


def try_open(process: ProxyProcess, name: str) -> McpClient | None:
    """A session, None while nobody serves it."""
    client = client_of(process, name)
    try:
        return client if client.initialize().has_succeeded else None
    except OSError:
        return None


# --- a file of servers ---------------------------------------------------------------------------


@pytest.mark.parametrize("store", [pytest.param("memory", marks=needs.MEMORY), "redis"])
def test_nobody_notices_a_reload_whose_server_stays(
    store: str, tmp_path: Path, redis_server: RedisServer, redis_prefix: str
) -> None:
    """Three workers under load: servers changed, added and removed, and files that are broken."""
    file = tmp_path / "servers.json"
    write(file, kept=ENTRY, changed=ENTRY, extra0=ENTRY)
    environment = {"MCP_PROXY_CONFIG": str(file), "MCP_PROXY_WORKERS": "3"}
    if store == "redis":
        environment["MCP_PROXY_REDIS_URL"] = redis_server.url
        environment["MCP_PROXY_REDIS_PREFIX"] = redis_prefix
    with ProxyProcess(way=GUNICORN, environment=environment) as process:
        callers = play(process, file, rounds=4, sessions=3)
        require_undisturbed(callers, rounds=4)


def test_a_mistake_in_the_file_changes_nothing_and_is_said(
    process: ProxyProcess, file: Path
) -> None:
    client = client_of(process, "one").open()
    workers = process.worker_pids()
    assert readiness(process) == {"state": "ok"}
    file.write_text('{"mcpServers": {"one": {"comm')
    hang_up(process)
    eventually(lambda: "nothing is reloaded" in process.log())
    assert client.result("count")["calls"] == 1
    eventually(lambda: readiness(process)["state"] == "degraded")
    assert "servers.json, line 1" in readiness(process)["reason"]
    write(file, two=ENTRY)
    hang_up(process)
    eventually(lambda: try_open(process, "two"), 20)
    eventually(lambda: readiness(process) == {"state": "ok"})
    assert process.worker_pids() == workers


@needs.MEMORY
def test_an_http_server_that_workers_could_not_share_is_a_mistake_of_its_entry(file: Path) -> None:
    environment = {"MCP_PROXY_CONFIG": str(file), "MCP_PROXY_WORKERS": "2"}
    with ProxyProcess(way=GUNICORN, environment=environment) as process:
        write(file, one=ENTRY, two=ENTRY, web={"url": "http://127.0.0.1:9/mcp"})
        hang_up(process)
        eventually(lambda: try_open(process, "two"), 20)
        eventually(lambda: client_of(process, "web").initialize().failure == "misconfigured")
        eventually(lambda: "redis_url" in readiness(process).get("reason", ""))


@pytest.mark.parametrize("last_good", ["one", "two"])
def test_a_worker_that_starts_meanwhile_has_the_last_good_servers(
    process: ProxyProcess, file: Path, last_good: str
) -> None:
    """Those of the start, or of the last reload."""
    if last_good != "one":
        write(file, **{last_good: ENTRY})
        hang_up(process)
    eventually(lambda: try_open(process, last_good), 20)
    file.write_text("")
    (worker,) = process.worker_pids()
    os.kill(worker, signal.SIGKILL)
    client = eventually(
        lambda: set(process.worker_pids()) - {worker} and try_open(process, last_good), 20
    )
    assert client.result("count")["calls"] == 1
    assert (try_open(process, "one") is None) == (last_good != "one")


def test_a_changed_server_has_a_new_process_after_the_call_and_the_same_session(
    proxy: ProxyProcess, file: Path
) -> None:
    client = client_of(proxy, "one").open()
    before = client.result("count")["pid"]
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.result, "hold", {"name": "a", "_meta": {"progressToken": 1}})
        eventually(lambda: '"hold"' in json.dumps(client.result("seen")))
        write(file, one={**ENTRY, "env": {"A": "1"}}, two=ENTRY)
        hang_up(proxy)
        eventually(lambda: try_open(proxy, "two"), 20)
        assert client.result("count") == {"calls": 2, "pid": before}  # it goes where the call is
        client.result("release", {"name": "a"})
        assert held.result()["held"] == "a"
    after = client.result("count")
    assert after["calls"] == 1
    assert after["pid"] != before
    eventually(lambda: not is_alive(before))
    assert "keeps ending" not in proxy.log()


def test_a_process_of_a_changed_server_ends_although_nobody_calls(
    proxy: ProxyProcess, file: Path
) -> None:
    client = client_of(proxy, "one").open()
    before = client.result("count")["pid"]
    stream = client.listen()
    write(file, one={**ENTRY, "cwd": "/"})
    hang_up(proxy)
    eventually(lambda: not is_alive(before))
    assert stream.messages() == []  # it has ended, as after a crash
    assert client.result("count")["calls"] == 1


def test_another_time_limit_holds_from_the_next_call_on_in_the_same_process(
    proxy: ProxyProcess, file: Path
) -> None:
    client = client_of(proxy, "one").open()
    before = client.result("count")
    write(file, one={**ENTRY, "timeout": 0.2}, two=ENTRY)
    hang_up(proxy)
    eventually(lambda: try_open(proxy, "two"), 20)
    assert client.call("sleep", {"seconds": 30}).failure == "server-timeout"
    assert client.result("count") == {"calls": 2, "pid": before["pid"]}


def test_a_removed_server_ends_after_its_calls_and_is_said_to_be_removed(
    proxy: ProxyProcess, file: Path
) -> None:
    client = client_of(proxy, "one").open()
    pid = client.result("count")["pid"]
    with ThreadPoolExecutor(1) as pool:
        asked = client.call("ask", {"method": "roots/list", "id": "q"})
        question = next(asked.stream())
        write(file, two=ENTRY)
        hang_up(proxy)
        eventually(lambda: try_open(proxy, "two"), 20)
        for answer in (client.call("count"), client_of(proxy, "one").initialize()):
            assert answer.status == 404
            assert answer.error()["message"] == "The server has been removed from this proxy"
        answered = {"jsonrpc": "2.0", "id": question["id"], "result": {"roots": []}}
        assert pool.submit(client.post, answered).result().status == 202
        assert next(asked.stream())["result"]["result"] == {"roots": []}
        asked.close()
    eventually(lambda: not is_alive(pid))
    assert client.notify("notifications/x").status == 404


def test_a_signal_to_a_worker_does_nothing(proxy: ProxyProcess, file: Path) -> None:
    client = client_of(proxy, "one").open()
    before = client.result("count")
    workers = proxy.worker_pids()
    write(file, two=ENTRY)
    for worker in workers:
        os.kill(worker, signal.SIGHUP)
    assert client.result("count") == {"calls": 2, "pid": before["pid"]}
    hang_up(proxy)
    eventually(lambda: try_open(proxy, "two"), 20)
    assert proxy.worker_pids() == workers


@pytest.mark.parametrize("options", [["--worker-class", "gevent"], ["--preload"], ["--reload"]])
def test_the_file_is_reloaded_however_gunicorn_runs(file: Path, options: list[str]) -> None:
    environment = {"MCP_PROXY_CONFIG": str(file)}
    with ProxyProcess(way=GUNICORN, options=options, environment=environment) as process:
        client = client_of(process, "one").open()
        before = client.result("count")
        workers = process.worker_pids()
        write(file, one=ENTRY, two=ENTRY)
        hang_up(process)
        eventually(lambda: try_open(process, "two"), 20)
        assert client.result("count") == {"calls": 2, "pid": before["pid"]}
        for worker in workers:
            os.kill(worker, signal.SIGHUP)
        assert client.result("count")["calls"] == 3
        assert process.worker_pids() == workers


def test_the_file_is_served_when_it_has_changed_where_that_is_wanted(file: Path) -> None:
    secret = file.with_name("secret")
    secret.write_text("1")
    named = {**ENTRY, "env": {"A": f"${{file:{secret}}}"}}
    write(file, one=ENTRY, three=named)
    options = ["--config", str(file), "--reload-on-change", "on"]
    with ProxyProcess(options=options) as process:
        client = client_of(process, "three").open()
        assert client.result("count")["calls"] == 1
        write(file, two=ENTRY, three=named)
        eventually(lambda: try_open(process, "two"), 20)
        assert client.result("count")["calls"] == 2
        secret.write_text("2")
        eventually(lambda: client.result("count")["calls"] == 1, 20)
        file.unlink()
        eventually(lambda: "nothing is reloaded" in process.log(), 20)
        assert client.result("count")["calls"] > 1
        write(file, two=ENTRY, four=ENTRY)
        eventually(lambda: try_open(process, "four"), 20)
        assert process.log().count("nothing is reloaded") == 1


def test_log_files_are_opened_anew(file: Path, tmp_path: Path) -> None:
    log = tmp_path / "error.log"
    environment = {"MCP_PROXY_CONFIG": str(file)}
    options = ["--log-file", str(log)]
    with ProxyProcess(way=GUNICORN, options=options, environment=environment) as process:
        eventually(log.exists)
        log.rename(tmp_path / "older.log")
        hang_up(process)
        eventually(log.exists)
        write(file, two=ENTRY)
        hang_up(process)
        eventually(lambda: try_open(process, "two"), 20)


def test_a_second_master_reads_the_file_and_reloads_it(
    file: Path, redis_server: RedisServer, redis_prefix: str
) -> None:
    options = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(options=["--config", str(file), *options]) as process:
        (worker,) = process.worker_pids()
        client = client_of(process, "one").open()
        assert client.result("count")["calls"] == 1
        write(file, one=ENTRY, two=ENTRY)
        os.kill(process.master_pid, signal.SIGUSR2)
        eventually(lambda: process.log().count("Booting worker") == 2, 20)
        (second,) = set(process.worker_pids()) - {worker}
        os.kill(worker, signal.SIGSTOP)  # so that the other one accepts
        eventually(lambda: try_open(process, "two"), 20)
        write(file, one=ENTRY, three=ENTRY)
        os.kill(second, signal.SIGHUP)
        eventually(lambda: try_open(process, "three"), 20)
        os.kill(worker, signal.SIGCONT)
        assert client.result("count")["calls"] == 2
        os.kill(second, signal.SIGTERM)
        eventually(lambda: process.worker_pids() == [worker], 20)


# --- no file: gunicorn's own ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_new_clients_meet_the_new_worker_while_a_call_goes_on_at_the_old_one(kind: str) -> None:
    with (
        ProxyProcess(SCRIPTED, options=["--worker-class", kind]) as process,
        ThreadPoolExecutor(1) as pool,
    ):
        client = McpClient(HttpFront(process.base)).open()
        slow = pool.submit(client.call, "sleep", {"seconds": 6}, Accept="application/json")
        eventually(lambda: "sleep" in json.dumps(client.result("seen")))
        os.kill(process.master_pid, signal.SIGHUP)
        eventually(lambda: process.log().count("Booting worker") == 2)

        def is_at_new_worker() -> bool:
            new = McpClient(HttpFront(process.base))
            assert "result" in new.initialize().message()
            return new.call("count").has_succeeded  # else it began in the moment of the signal

        eventually(is_at_new_worker)
        while not slow.done():
            new = McpClient(HttpFront(process.base)).open()
            assert new.result("count")["calls"] == 1
            new.request("DELETE", None)
        assert slow.result().message()["result"]["slept"] == 6
    assert "with several workers" not in process.log()


def test_no_worker_is_added_whose_sessions_the_others_do_not_know() -> None:
    with ProxyProcess(SCRIPTED, options=["--passing", "off"]) as process:
        client = McpClient(HttpFront(process.base), "/mcp").open()
        os.kill(process.master_pid, signal.SIGTTIN)
        eventually(lambda: "no worker is added: 2 workers do not know" in process.log())
        assert client.result("count")["calls"] == 1
        assert len(process.worker_pids()) == 1


def test_no_second_master_is_begun_whose_sessions_the_first_does_not_know() -> None:
    with ProxyProcess(SCRIPTED) as process:
        client = McpClient(HttpFront(process.base), "/mcp").open()
        before = process.worker_pids()
        os.kill(process.master_pid, signal.SIGUSR2)
        eventually(lambda: "no second master is begun: 2 workers do not know" in process.log())
        assert client.result("count")["calls"] == 1
        assert process.worker_pids() == before


def test_a_second_master_is_begun_where_redis_has_the_sessions(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    options = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(SCRIPTED, options=options) as process:
        (worker,) = process.worker_pids()
        os.kill(process.master_pid, signal.SIGUSR2)
        eventually(lambda: process.log().count("Booting worker") == 2, 20)
        (second,) = set(process.worker_pids()) - {worker}
        os.kill(second, signal.SIGTERM)
        # A worker that still boots misses the signal, and is killed after `graceful_timeout`.
        eventually(lambda: process.worker_pids() == [worker], 40)


def test_a_worker_is_added_where_redis_has_the_sessions(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    options = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(SCRIPTED, options=options) as process:
        os.kill(process.master_pid, signal.SIGTTIN)
        eventually(lambda: len(process.worker_pids()) == 2, 20)
