"""Standing streams of 2026-07-28 through the transparent proxy: POSTs that ask for one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.servers.http_backend import Feed, HttpBackend, stream, turn_wait
from tests.support.front import Answer, Json
from tests.support.transparent import Transparent, transparent
from tests.support.waiting import eventually

MODERN = "2026-07-28"
METHODS = ["subscriptions/listen", "events/stream"]
ACKNOWLEDGED = b'data: {"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged"}\n\n'


@pytest.fixture
def proxy(proxy: Transparent, target: HttpBackend) -> Iterator[Transparent]:
    for method in METHODS:
        target.rpc[method] = stream(ACKNOWLEDGED, turn_wait)
    yield proxy
    proxy.leave()
    eventually(lambda: len(target.gone) == len(target.seen))


def listening(proxy: Transparent, method: str = METHODS[0], key: object = 1) -> Answer:
    """The answer to a request for a standing stream."""
    meta: Json = {"io.modelcontextprotocol/protocolVersion": MODERN}
    message = {"jsonrpc": "2.0", "id": key, "method": method, "params": {"_meta": meta}}
    return proxy.client().post(message, Mcp_Protocol_Version=MODERN, Mcp_Method=method)


def begun(answer: Answer) -> Iterator[Json]:
    """The messages of a stream after the first, which has come."""
    messages = answer.stream()
    assert next(messages)["method"] == "notifications/subscriptions/acknowledged"
    return messages


@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize("method", METHODS)
def test_it_may_be_silent_beyond_the_time_limit(
    proxy: Transparent, target: HttpBackend, method: str, framing: str
) -> None:
    feed = Feed()
    target.rpc[method] = stream(ACKNOWLEDGED, feed, framing=framing)
    messages = begun(listening(proxy, method))
    time.sleep(1.5)
    feed.put(b'data: {"jsonrpc":"2.0","method":"n"}\n\n')
    assert next(messages)["method"] == "n"
    proxy.leave()


@pytest.mark.parametrize("method", METHODS)
def test_it_takes_a_place_among_the_streams(
    proxy: Transparent, target: HttpBackend, method: str
) -> None:
    first, second = listening(proxy, method), listening(proxy, method)
    begun(first), begun(second)
    refused = listening(proxy, method, key="third")
    assert (refused.status, refused.failure) == (200, "overloaded")
    message = refused.message()
    assert (message["id"], message["error"]["code"]) == ("third", -32000)
    assert len(target.calls(method)) == 2  # the refused one asked nobody
    proxy.leave()

    def has_place() -> bool:
        answer = listening(proxy, method)
        answer.close()
        return answer.is_stream

    eventually(has_place)


@pytest.mark.parametrize(
    "act",
    [
        lambda turn: turn.error(404, -32601, "Method not found"),
        lambda turn: turn.result({}),
        lambda turn: turn.reset(),
        stream(b"data: {", b"", framing="close"),
    ],
    ids=["refused", "answered", "reset", "broken"],
)
def test_its_place_is_given_back_however_it_ends(
    proxy: Transparent, target: HttpBackend, act: Any
) -> None:
    target.rpc[METHODS[0]] = act
    for _ in range(4):  # of two places
        answer = listening(proxy)
        assert answer.failure != "overloaded"
        answer.body()
    target.gone = [0.0] * len(target.seen)


def test_the_client_that_leaves_is_noticed_while_the_backend_is_silent(
    target: HttpBackend, redis_url: str
) -> None:
    target.reset()
    target.rpc[METHODS[0]] = stream(ACKNOWLEDGED, turn_wait)
    with transparent("gunicorn", target.url, redis_url) as proxy:  # keepalives: 15 s
        begun(listening(proxy))
        left = time.monotonic()
        proxy.leave()
        eventually(lambda: target.gone)
        assert target.gone[0] - left < 4


@pytest.mark.parametrize("has_begun", [True, False])
def test_sigterm_ends_it(target: HttpBackend, redis_url: str, has_begun: bool) -> None:
    target.reset()
    target.rpc[METHODS[0]] = stream(ACKNOWLEDGED, turn_wait) if has_begun else turn_wait
    with transparent("gunicorn", target.url, redis_url) as proxy, ThreadPoolExecutor(1) as pool:
        assert proxy.process is not None
        call = pool.submit(listening, proxy, METHODS[0], "mine")
        eventually(lambda: target.calls(METHODS[0]))
        messages = begun(call.result(20)) if has_begun else None
        since = time.monotonic()
        os.kill(proxy.process.master_pid, signal.SIGTERM)
        if messages is not None:
            assert list(messages) == []  # a proper end
        else:
            answer = call.result(20)
            assert (answer.failure, json.loads(answer.body())["id"]) == ("draining", "mine")
        proxy.process.wait(15)
        assert time.monotonic() - since < 6
