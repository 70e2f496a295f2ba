"""What /readyz says about the threads that a worker cannot do without."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client

from mcp_proxy import ProxyConfig, create_app
from mcp_proxy.background import Worker
from tests.support.ended_threads import end_worker, threads_end
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.proxies import WsgiProxy, running
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

OF_SESSIONS = ["mcp-sweeper", "mcp-supervisor"]
OF_THE_RELAY = ["mcp-relay", "mcp-relay-sender", "mcp-relay-lease"]


@pytest.fixture
def proxy(redis_server: RedisServer, redis_prefix: str) -> Iterator[WsgiProxy]:
    """An application that shares its sessions."""
    with running("wsgi", redis_url=redis_server.url, redis_prefix=redis_prefix) as made:
        assert isinstance(made, WsgiProxy)
        yield made


def health(proxy: WsgiProxy, path: str = "/readyz") -> tuple[int, Any]:
    """The status, and what is said about the threads: its reason, None if all run."""
    answer = proxy.client().front.request("GET", path, {}, None)
    checks = json.loads(answer.body()).get("checks", {})
    reasons = [checks.get(name, {}).get("reason") for name in ("threads", "other threads")]
    return answer.status, next(filter(None, reasons), None)


def worker_of(proxy: WsgiProxy, name: str) -> Worker:
    """The worker of the application that has this name."""
    (found,) = (w for w in proxy.app.parts.workers.started if w.name == name)
    return found


def test_no_thread_is_missed_before_there_is_a_session(proxy: WsgiProxy) -> None:
    assert health(proxy) == (200, None)


@threads_end
@pytest.mark.parametrize("name", [*OF_SESSIONS, *OF_THE_RELAY])
def test_a_thread_that_has_ended_is_named(proxy: WsgiProxy, name: str) -> None:
    proxy.client().open()
    assert health(proxy) == (200, None)
    worker = worker_of(proxy, name)
    end_worker(worker)
    status = 503 if worker.is_essential else 200
    eventually(lambda: health(proxy) == (status, f"the thread {name} has ended"))
    assert health(proxy, "/healthz")[0] == 200
    worker.start()
    eventually(lambda: health(proxy) == (200, None))


@threads_end
def test_every_thread_that_has_ended_is_named(proxy: WsgiProxy) -> None:
    proxy.client().open()
    for name in OF_THE_RELAY:
        end_worker(worker_of(proxy, name))
    eventually(lambda: str(health(proxy)[1]).count("has ended") == len(OF_THE_RELAY))
    status, said = health(proxy)
    assert status == 503
    assert sorted(said.split("; ")) == sorted(
        f"the thread {name} has ended" for name in OF_THE_RELAY
    )
    for name in OF_THE_RELAY:
        worker_of(proxy, name).start()


@threads_end
def test_the_next_session_starts_the_threads_again(proxy: WsgiProxy) -> None:
    first = proxy.client().open()
    for name in OF_SESSIONS:
        end_worker(worker_of(proxy, name))
    assert first.result("count")["calls"] == 1, "a session goes on meanwhile"
    proxy.client().open()
    eventually(lambda: health(proxy) == (200, None))
    first.call("die")
    second: McpClient = proxy.client().open()
    assert second.result("count")["calls"] == 1
    eventually(lambda: first.result("count")["calls"] == 1)


def test_a_closed_application_misses_no_thread(proxy: WsgiProxy) -> None:
    proxy.client().open()
    proxy.app.close()
    assert health(proxy) == (503, None)  # it is shutting down


def test_one_server_of_several_that_cannot_be_served_is_no_reason_to_send_nobody(
    tmp_path: Path,
) -> None:
    entries = {
        "good": {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])},
        "gone": {"command": "/no/such/server"},
    }
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": entries}))
    app = create_app(ProxyConfig(config=str(file)))
    try:
        answer = Client(app).get("/readyz", base_url="http://127.0.0.1")
        assert (answer.status_code, answer.json["status"]) == (200, "degraded")
        assert answer.json["checks"]["server good"] == {"state": "ok"}
        reason = "/no/such/server is not an executable file"
        assert answer.json["checks"]["server gone"] == {"state": "failed", "reason": reason}
        stranger = Client(app).get("/readyz", headers={"Host": "a.example"})
        assert stranger.json["checks"]["server gone"] == {"state": "failed"}
    finally:
        app.close()


def test_a_server_that_is_in_use_is_served_although_a_client_could_not_begin(
    tmp_path: Path,
) -> None:
    file = tmp_path / "broken"
    server = [sys.executable, "-c", _DIES_IF, str(file), *SCRIPTED]
    with running("wsgi", server) as proxy:
        client = proxy.client().open()
        file.touch()
        for _ in range(2):
            assert proxy.client().initialize().failure == "server-exited"

        def said() -> tuple[int, str]:
            answer = client.front.request("GET", "/readyz", {}, None)
            return answer.status, json.loads(answer.body())["status"]

        eventually(lambda: said() == (200, "degraded"))
        client.delete()
        eventually(lambda: said() == (503, "not ready"))


def test_one_crash_at_the_start_makes_nobody_stay_away() -> None:
    """What the client has sent may be its reason."""
    with running("wsgi", [sys.executable, "-c", "raise SystemExit(1)"]) as proxy:
        client = proxy.client()

        def said() -> tuple[int, str, Any]:
            answer = client.front.request("GET", "/readyz", {}, None)
            document = json.loads(answer.body())
            return answer.status, document["status"], document["checks"]["server default"]

        assert client.initialize().failure == "server-exited"
        reason = "The server exited (exit code 1) before it answered; no start has succeeded so far"
        degraded = {"state": "degraded", "reason": reason}
        eventually(lambda: said() == (200, "degraded", degraded))
        assert client.initialize().failure == "server-exited"
        failed = {"state": "failed", "reason": reason}
        eventually(lambda: said() == (503, "not ready", failed))


def test_a_server_that_is_in_use_is_enough_where_the_others_are_gone(tmp_path: Path) -> None:
    entries = {
        "good": {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])},
        "gone": {"command": "/no/such/server"},
    }
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": entries}))
    with create_app(ProxyConfig(config=str(file))) as app:
        McpClient(WsgiFront(app), "/servers/good/mcp").open()
        assert app.not_ready_reason() is None


_DIES_IF = """
import os, sys
if os.path.exists(sys.argv[1]):
    sys.exit(3)
os.execv(sys.argv[2], sys.argv[2:])
"""
