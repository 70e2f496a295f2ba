"""`rate_limit` over the workers of a real gunicorn: they count together, and each request once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.live.test_passing import LABELLED, Pair
from tests.support import needs
from tests.support.front import SCRIPTED, HttpFront, Json, McpClient
from tests.support.proxies import as_options
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.scrapes import ADMIN, admin_port, get, sum_of
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

RATE = 60
BURST = 30
LASTS = 6.0

# What workers that take tokens at the same moment may let through beyond the limit, and what is
# lost while all threads wait for the two cores: a part of all.
_MORE = 0.05
_LESS = 0.1


def served_until(client: McpClient, until: float) -> int:
    """How many calls of a session are served, of as many as can be sent."""
    served = 0
    while time.monotonic() < until:
        answer = client.call("ping")
        answer.body()
        served += answer.failure is None
    return served


@pytest.mark.parametrize("store", [pytest.param("memory", marks=needs.MEMORY), "redis"])
def test_workers_together_keep_the_limit(store: str, redis_server: RedisServer) -> None:
    """Sessions are of all workers, and so every request may be passed on its way."""
    settings: Json = {"workers": 3, "rate_limit": f"{RATE}/second:{BURST}"}
    if store == "redis":
        settings["redis_url"] = redis_server.url
    with ProxyProcess(SCRIPTED, options=as_options(settings)) as proxy:
        clients = [McpClient(HttpFront(proxy.base)).open() for _ in range(6)]
        began = time.monotonic()
        with ThreadPoolExecutor(len(clients)) as pool:
            each = [pool.submit(served_until, client, began + LASTS) for client in clients]
            served = sum(one.result() for one in each)
        lasted = time.monotonic() - began
        told = f"{served} served in {lasted:.2f} s"
        assert served <= (BURST + RATE * lasted) * (1 + _MORE), told
        assert served >= RATE * LASTS * (1 - _LESS), told


@needs.PASSING
def test_a_request_that_is_passed_counts_once() -> None:
    """Each comes to the worker that has not the session, and is given to the other one."""
    count = 8
    variables = {"MCP_PROXY_WORKERS": "2", "MCP_PROXY_RATE_LIMIT": f"1/minute:{count}"}
    with (
        ProxyProcess(SCRIPTED, way=LABELLED, environment=variables) as proxy,
        contextlib.ExitStack() as stack,
    ):
        pair = Pair(proxy, stack)
        session, owner = pair.open()
        for _ in range(count - 1):
            told = pair.at(pair.other(owner)).call("ping", session=session)
            assert (told.is_passed, told.worker, told.result) == (True, owner, {})
        refused = pair.at(pair.other(owner)).call("ping", session=session)
        assert json.loads(refused.body)["error"]["code"] == -32000


@needs.PASSING
def test_the_last_request_that_is_allowed_is_served_where_it_is_passed() -> None:
    """Also where the worker that has given it is slow to go on."""
    way = (*LABELLED[:-1], "tests.live.slow_giving:app")
    variables = {"MCP_PROXY_WORKERS": "2", "MCP_PROXY_RATE_LIMIT": "1/minute:3"}
    with (
        ProxyProcess(SCRIPTED, way=way, environment=variables) as proxy,
        contextlib.ExitStack() as stack,
    ):
        pair = Pair(proxy, stack)
        session, owner = pair.open()
        for _ in range(2):
            told = pair.at(pair.other(owner)).call("ping", session=session)
            assert (told.is_passed, told.result) == (True, {})
        refused = pair.at(owner).call("ping", session=session)
        assert json.loads(refused.body)["error"]["code"] == -32000


@needs.PASSING
@pytest.mark.parametrize("store", ["memory", "redis"])
def test_whichever_worker_gets_it_a_refusal_is_said_on_the_stream(
    store: str, redis_server: RedisServer
) -> None:
    """Half of the messages of HTTP+SSE are passed to the worker that has the stream."""
    settings: Json = {"workers": 2, "rate_limit": "1/minute:8"}
    if store == "redis":
        settings["redis_url"] = redis_server.url
    with ProxyProcess(SCRIPTED, options=[*as_options(settings), *ADMIN]) as proxy:
        client = SseClient(HttpFront(proxy.base)).open()
        answers = [client.answer(client.call("ping")) for _ in range(16)]
        assert ["result" in answer for answer in answers] == [True] * 7 + [False] * 9
        assert all(answer["error"]["code"] == -32000 for answer in answers[7:])
        counted = get(admin_port(proxy), "/metrics")[1]
        assert sum_of(counted, "mcp_proxy_refused_total", reason="rate-limited") == 9
        client.close()


def test_a_call_that_waits_for_others_of_its_session_counts_once() -> None:
    """More calls than half of the threads are put off, and come again."""
    count = 13
    settings: Json = {"threads": 8, "rate_limit": f"1/minute:{count}"}
    with ProxyProcess(SCRIPTED, options=as_options(settings)) as proxy:
        client = McpClient(HttpFront(proxy.base)).open()
        with ThreadPoolExecutor(count) as pool:
            calls = [pool.submit(client.call, "sleep", {"seconds": 0.1}) for _ in range(count - 1)]
            failures = [call.result().failure for call in calls]
        assert failures == [None] * (count - 1)
        assert client.call("ping").failure == "rate-limited"


def test_a_worker_that_comes_later_counts_with_the_others(
    redis_url: str, redis_prefix: str
) -> None:
    settings: Json = {"workers": 2, "rate_limit": "1/minute:3"}
    store = needs.store_of_several(redis_url, redis_prefix)
    with ProxyProcess(SCRIPTED, options=as_options(settings), environment=store) as proxy:
        for _ in range(3):
            assert McpClient(HttpFront(proxy.base)).initialize().failure is None
        before = proxy.worker_pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(set(proxy.worker_pids()) - set(before)) == 2, 20)
        for _ in range(6):
            assert McpClient(HttpFront(proxy.base)).initialize().failure == "rate-limited"


def test_gevent_workers_count_together(redis_server: RedisServer) -> None:
    settings: Json = {"workers": 2, "worker_class": "gevent", "rate_limit": "1/minute:3"}
    settings["redis_url"] = redis_server.url
    with ProxyProcess(SCRIPTED, options=as_options(settings)) as proxy:
        failures = [McpClient(HttpFront(proxy.base)).initialize().failure for _ in range(10)]
        assert failures == [None] * 3 + ["rate-limited"] * 7
