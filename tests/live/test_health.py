"""What /readyz says about the threads that a worker cannot do without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mcp_proxy.background import Worker
from tests.support.ended_threads import end_worker, threads_end
from tests.support.front import McpClient
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
    """The status, and what is said about the threads."""
    answer = proxy.client().front.request("GET", path, {}, None)
    return answer.status, json.loads(answer.body()).get("checks", {}).get("threads")


def worker_of(proxy: WsgiProxy, name: str) -> Worker:
    """The worker of the application that has this name."""
    (found,) = (w for w in proxy.app.parts.workers._started if w.name == name)
    return found


def test_no_thread_is_missed_before_there_is_a_session(proxy: WsgiProxy) -> None:
    assert health(proxy) == (200, "ok")


@threads_end
@pytest.mark.parametrize("name", [*OF_SESSIONS, *OF_THE_RELAY])
def test_a_thread_that_has_ended_is_named(proxy: WsgiProxy, name: str) -> None:
    proxy.client().open()
    assert health(proxy) == (200, "ok")
    worker = worker_of(proxy, name)
    end_worker(worker)
    assert health(proxy) == (503, f"the thread {name} has ended")
    assert health(proxy, "/healthz")[0] == 200
    worker.start()
    assert health(proxy) == (200, "ok")


@threads_end
def test_every_thread_that_has_ended_is_named(proxy: WsgiProxy) -> None:
    proxy.client().open()
    for name in OF_SESSIONS:
        end_worker(worker_of(proxy, name))
    status, said = health(proxy)
    assert status == 503
    assert sorted(said.split("; ")) == sorted(
        f"the thread {name} has ended" for name in OF_SESSIONS
    )
    for name in OF_SESSIONS:
        worker_of(proxy, name).start()


@threads_end
def test_the_next_session_starts_the_threads_again(proxy: WsgiProxy) -> None:
    first = proxy.client().open()
    for name in OF_SESSIONS:
        end_worker(worker_of(proxy, name))
    assert first.result("count")["calls"] == 1, "a session goes on meanwhile"
    proxy.client().open()
    assert health(proxy) == (200, "ok")
    first.call("die")
    second: McpClient = proxy.client().open()
    assert second.result("count")["calls"] == 1
    eventually(lambda: first.result("count")["calls"] == 1)


def test_a_closed_application_misses_no_thread(proxy: WsgiProxy) -> None:
    proxy.client().open()
    proxy.app.close()
    assert health(proxy) == (503, "ok")  # it is shutting down
