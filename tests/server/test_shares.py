"""The share of one session: its calls leave threads to the others, and none of them is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from tests.live.connections import Connection
from tests.support.front import HttpFront, Json, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

# Long enough for a test to look on meanwhile, in seconds.
PAUSE = 0.5

SHARED = {"threads": ("--threads", "4"), "without passing": ("--threads", "4", "--passing", "off")}


@pytest.fixture(params=[*SHARED.values(), (*SHARED["threads"], "--workers", "2")], ids=str)
def proxy(request: pytest.FixtureRequest) -> Iterator[ProxyProcess]:
    with ProxyProcess(options=request.param) as process:
        yield process


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def session_of(proxy: ProxyProcess, version: str = "2025-06-18") -> McpClient:
    return McpClient(HttpFront(proxy.base)).open(version)


def count(client: McpClient, key: int, to: int = 1) -> Json:
    """The answer to a call that takes a while, which is an error where none comes."""
    arguments = {"to": to, "pause": PAUSE}
    answer = client.call("tools/call", {"name": "count", "arguments": arguments}, key)
    return answer.message()


def counting(pool: ThreadPoolExecutor, client: McpClient, keys: Sequence[int]) -> list[Future[Any]]:
    return [pool.submit(count, client, key) for key in keys]


def test_the_calls_of_one_session_leave_threads_to_the_others(
    proxy: ProxyProcess, pool: ThreadPoolExecutor
) -> None:
    greedy, modest = session_of(proxy), session_of(proxy)
    calls = counting(pool, greedy, range(10, 22))
    eventually(lambda: any(call.done() for call in calls))
    answered = 0
    while not all(call.done() for call in calls):
        before = time.monotonic()
        modest.result("ping")
        assert time.monotonic() - before < PAUSE
        answered += 1
    assert answered > 3
    answers = [call.result() for call in calls]
    assert [answer["id"] for answer in answers] == list(range(10, 22))
    texts = {answer["result"]["content"][0]["text"] for answer in answers}
    assert texts == {"counted to 1"}


def test_what_calls_may_wait_for_does_not_wait(
    proxy: ProxyProcess, pool: ThreadPoolExecutor
) -> None:
    client = session_of(proxy)
    calls = [pool.submit(count, client, key, 600) for key in range(10, 16)]
    done = threading.Event()

    def cancel() -> None:
        while not done.is_set():
            for key in range(10, 16):  # a call that waits is not there yet to be cancelled
                params = {"requestId": key}
                assert client.notify("notifications/cancelled", params).status == 202
            done.wait(0.1)

    cancelling = pool.submit(cancel)
    try:
        eventually(lambda: all(call.done() for call in calls), 30)
    finally:
        done.set()
    cancelling.result()
    assert client.delete().status == 204


def test_a_batch_is_a_call_of_its_session(proxy: ProxyProcess, pool: ThreadPoolExecutor) -> None:
    client, other = session_of(proxy, "2025-03-26"), session_of(proxy)
    params = {"name": "count", "arguments": {"to": 1, "pause": PAUSE}}
    part = {"jsonrpc": "2.0", "method": "tools/call", "params": params}

    def batch(key: int) -> list[int]:
        answers = client.post([{**part, "id": key}, {**part, "id": key + 100}]).messages()
        return sorted(answer["id"] for answer in answers)

    batches = [pool.submit(batch, key) for key in range(8)]
    other.result("ping")
    assert [each.result() for each in batches] == [[key, key + 100] for key in range(8)]


def test_a_call_that_waits_keeps_its_connection(pool: ThreadPoolExecutor) -> None:
    """And what comes behind it on the connection is answered after it."""
    with ProxyProcess(options=SHARED["threads"]) as proxy:
        client = session_of(proxy)
        calls = counting(pool, client, (1, 2))
        body = b'{"jsonrpc":"2.0","id":%d,"method":"%s"}'
        with closing(Connection(proxy.port)) as connection:
            for key, method in ((7, b"tools/list"), (8, b"ping")):
                data = body % (key, method)
                head = (
                    f"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    f"Accept: application/json\r\nMcp-Session-Id: {client.session}\r\n"
                    f"Content-Length: {len(data)}\r\n\r\n"
                )
                connection.send_raw(head.encode() + data)
            assert b'"id":7' in connection.read_head().read()
            assert b'"id":8' in connection.read_head().read()
        assert {call.result()["id"] for call in calls} == {1, 2}


def test_in_front_of_an_http_server(pool: ThreadPoolExecutor) -> None:
    with (
        ProxyProcess(options=("--threads", "32")) as server,
        ProxyProcess(options=("--threads", "4", "--target-url", f"{server.base}/mcp")) as proxy,
    ):
        greedy, modest = session_of(proxy), session_of(proxy)
        calls = counting(pool, greedy, range(10, 18))
        while not all(call.done() for call in calls):
            before = time.monotonic()
            modest.result("ping")
            assert time.monotonic() - before < PAUSE
        assert [call.result()["id"] for call in calls] == list(range(10, 18))


def test_a_call_that_waits_too_long_is_refused(pool: ThreadPoolExecutor) -> None:
    options = ("--threads", "4", "--request-timeout", "1.5")
    with ProxyProcess(options=options) as proxy:
        client = session_of(proxy)
        params = {"name": "count", "arguments": {"to": 1, "pause": 600}}
        calls = [pool.submit(client.call, "tools/call", params, key) for key in range(6)]
        kinds = [call.result().failure for call in calls]
    assert set(kinds) == {"overloaded", "server-timeout"}
    assert kinds.count("overloaded") >= 2  # two more may have begun when the first two ended
