"""Signals to the master that gunicorn alone would answer by ending sessions."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import COMMAND, GUNICORN, ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

ENTRY = {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])}


def client_of(process: ProxyProcess, name: str) -> McpClient:
    return McpClient(HttpFront(process.base), f"/servers/{name}/mcp")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the server `one`."""
    made = tmp_path / "servers.json"
    write(made, "one")
    return made


def write(file: Path, *names: str) -> None:
    file.write_text(json.dumps({"mcpServers": dict.fromkeys(names, ENTRY)}))


@pytest.fixture(params=[COMMAND, GUNICORN], ids=["command", "gunicorn"])
def process(request: pytest.FixtureRequest, file: Path) -> Iterator[ProxyProcess]:
    """A proxy that serves what is in `file`."""
    environment = {"MCP_PROXY_CONFIG": str(file)}
    with ProxyProcess(way=request.param, environment=environment) as made:
        yield made


def test_a_mistake_in_the_file_changes_nothing_and_is_said(
    process: ProxyProcess, file: Path
) -> None:
    client = client_of(process, "one").open()
    workers = process.worker_pids()
    file.write_text('{"mcpServers": {"one": {"comm')
    os.kill(process.master_pid, signal.SIGHUP)
    eventually(lambda: "nothing is reloaded" in process.log())
    assert client.result("count")["calls"] == 1
    assert process.worker_pids() == workers
    write(file, "two")
    os.kill(process.master_pid, signal.SIGHUP)
    eventually(lambda: client_of(process, "two").initialize().status == 200, 20)
    eventually(lambda: set(process.worker_pids()).isdisjoint(workers), 30)


@pytest.mark.parametrize("last_good", ["one", "two"])
def test_a_worker_that_starts_meanwhile_has_the_last_good_servers(
    process: ProxyProcess, file: Path, last_good: str
) -> None:
    """Those of the start, or of the last reload."""
    if last_good != "one":
        write(file, last_good)
        os.kill(process.master_pid, signal.SIGHUP)
    eventually(lambda: client_of(process, last_good).initialize().status == 200, 20)
    file.write_text("")
    (worker,) = eventually(lambda: len(process.worker_pids()) == 1 and process.worker_pids(), 30)
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: "starts with what was in the file before" in process.log(), 20)
    client = eventually(lambda: try_open(process, last_good), 20)
    assert client.result("count")["calls"] == 1


def try_open(process: ProxyProcess, name: str) -> McpClient | None:
    """A session, None while nobody listens."""
    try:
        return client_of(process, name).open()
    except OSError:
        return None


def test_no_worker_is_added_whose_sessions_the_others_do_not_know() -> None:
    with ProxyProcess(SCRIPTED) as process:
        client = McpClient(HttpFront(process.base), "/mcp").open()
        os.kill(process.master_pid, signal.SIGTTIN)
        eventually(lambda: "no worker is added: 2 workers do not know" in process.log())
        assert client.result("count")["calls"] == 1
        assert len(process.worker_pids()) == 1


def test_a_worker_is_added_where_redis_has_the_sessions(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    options = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(SCRIPTED, options=options) as process:
        os.kill(process.master_pid, signal.SIGTTIN)
        eventually(lambda: len(process.worker_pids()) == 2, 20)
