"""The command `ctl` against a proxy that runs."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ROOT, ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the socket is."""
    return tmp_path / "ctl.sock"


@pytest.fixture(params=["memory", "redis"])
def process(
    request: pytest.FixtureRequest, path: Path, redis_server: RedisServer, redis_prefix: str
) -> Iterator[ProxyProcess]:
    """A proxy of two workers."""
    options = ["--ctl-socket", str(path), "--workers", "2"]
    if request.param == "redis":
        options += ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(SCRIPTED, options=options) as made:
        yield made


def ctl(path: Path, *words: str) -> tuple[int, str]:
    """The exit code of the command, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "mcp_proxy", "ctl", "--ctl-socket", str(path), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_session_is_ended_whichever_worker_has_it(process: ProxyProcess, path: Path) -> None:
    clients = [McpClient(HttpFront(process.base)).open() for _ in range(6)]
    for client in clients[:4]:
        assert ctl(path, "end", client.session or "") == (0, "the session is ended\n")
    assert [client.call("ping").status for client in clients] == [404] * 4 + [200] * 2
    eventually(lambda: len(process.server_pids()) == 2)
    assert ctl(path, "end", clients[0].session or "") == (1, "no such session\n")
    assert ctl(path, "end", "never-issued") == (1, "no such session\n")


def test_status_shows_servers_workers_and_sessions(process: ProxyProcess, path: Path) -> None:
    client = McpClient(HttpFront(process.base)).open()
    client.call("die")

    def said() -> str:
        code, text = ctl(path, "status")
        assert code == 0
        return text if text.count("worker ") == 2 else ""

    text = eventually(said, 20)
    assert "server  default  ok" in text
    assert f"session ...{(client.session or '')[-8:]}" in text
    assert (client.session or "") not in text
    assert "exited (exit code 1)" in text


def test_the_socket_is_for_the_user_alone_and_what_is_left_of_one_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with ProxyProcess(SCRIPTED, options=["--ctl-socket", str(path)]):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert ctl(path, "status")[0] == 0
        with pytest.raises(BaseException, match="ended with 1") as failed:
            ProxyProcess(SCRIPTED, options=["--ctl-socket", str(path)])
        assert "Address already in use" in "".join(failed.value.__notes__)


def test_what_cannot_be_asked_is_said_in_a_sentence(path: Path) -> None:
    code, text = ctl(path, "status")
    assert (code, f"no proxy answers at {path}" in text) == (2, True)
    for words in ((), ("stop",), ("end",), ("end", "a", "b"), ("status", "now")):
        code, text = ctl(path, *words)
        assert (code, "ctl takes status, or end SESSION" in text) == (2, True), words
