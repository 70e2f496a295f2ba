"""A group on several workers: its sessions are served by any, and outlive a worker."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.front import HttpFront, McpClient
from tests.support.groups import call, entry, tools
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with two servers, and a group of them."""
    path = tmp_path / "servers.json"
    servers = {"one": entry("A"), "two": entry("B")}
    groups = {"g": {"members": ["one", "two"]}}
    path.write_text(json.dumps({"mcpServers": servers, "groups": groups}), encoding="utf-8")
    return path


def opened(proxy: ProxyProcess) -> McpClient:
    """A client of the group with a session."""
    return McpClient(HttpFront(proxy.base), "/groups/g/mcp").open()


@pytest.mark.parametrize("store", [pytest.param("memory", marks=needs.MEMORY), "redis"])
def test_every_worker_serves_every_session(
    file: Path, store: str, request: pytest.FixtureRequest
) -> None:
    options = ["--workers", "3", "--config", str(file)]
    if store == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        options += ["--redis-url", redis.url, "--redis-prefix", "groups:"]
    with ProxyProcess([], options=options) as proxy:
        clients = [opened(proxy) for _ in range(6)]
        pids = [
            [call(client, f"{name}__who")["pid"] for name in ("one", "two")] for client in clients
        ]
        assert len({pid for of_one in pids for pid in of_one}) == 12
        for client, of_one in zip(clients, pids, strict=True):
            assert len(tools(client)) == 10
            again = [call(client, f"{name}__who")["pid"] for name in ("one", "two")]
            assert again == of_one


def test_a_session_of_a_killed_worker_goes_on_at_another(
    file: Path, redis_server: RedisServer
) -> None:
    options = ["--workers", "2", "--config", str(file)]
    options += ["--redis-url", redis_server.url, "--redis-prefix", "killed-groups:"]
    with ProxyProcess([], options=options) as proxy:
        client = opened(proxy)
        client.result("logging/setLevel", {"level": "error"})
        before = {name: call(client, f"{name}__who")["pid"] for name in ("one", "two")}
        for pid in proxy.worker_pids():
            os.kill(pid, signal.SIGKILL)

        def goes_on() -> bool:
            try:
                answer = client.call("tools/call", {"name": "two__who", "arguments": {}})
                return answer.has_succeeded and "result" in answer.message()
            except OSError:  # nobody listens just now
                return False

        eventually(goes_on, 40, "the session is not served any more")
        after = call(client, "two__who")
        assert after["pid"] != before["two"]
        assert "logging/setLevel" in [each["method"] for each in after["seen"]]
        assert len(tools(client)) == 10
