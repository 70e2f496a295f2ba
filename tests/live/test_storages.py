"""`StreamableProxy` on its own, in memory and in Redis, by the test client and by real gunicorn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from mcp_proxy import RedisStorage, StreamableProxy
from tests.support.front import SCRIPTED, HttpFront, McpClient, WsgiFront
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

# A configuration of somebody else's: none of our hooks and settings.
BARE = (
    "-m",
    "gunicorn",
    "-c",
    "python:tests.live.plain_gunicorn",
    "tests.live.bare_streamable:app",
)


@contextlib.contextmanager
def bare(way: str, redis: RedisServer | None, prefix: str) -> Iterator[McpClient]:
    """A client of a transport that runs in `way` over Redis, or over memory."""
    if way == "gunicorn":
        variables = {} if redis is None else {"BARE_REDIS_URL": redis.url, "BARE_PREFIX": prefix}
        with ProxyProcess(way=BARE, environment=variables) as process:
            yield McpClient(HttpFront(process.base))
        return
    storage = None if redis is None else RedisStorage(redis.url, prefix=prefix, timeout=1)
    app = StreamableProxy(SCRIPTED, session_storage=storage)
    try:
        yield McpClient(WsgiFront(app))
    finally:
        app.close()
        if storage is not None:
            storage.close()


@pytest.mark.parametrize("store", ["memory", "redis"])
@pytest.mark.parametrize("way", ["wsgi", "gunicorn"])
def test_the_same_behaviour_everywhere(
    way: str, store: str, redis_server: RedisServer, redis_prefix: str
) -> None:
    with bare(way, redis_server if store == "redis" else None, redis_prefix) as client:
        client.open()
        assert client.result("echo", {"a": 1}) == {"a": 1}
        assert client.call("notify", {"count": 1}).is_stream
        ended = client.session
        assert client.delete().status == 204
        assert client.call("echo").status == 404
        client.session = "never-issued"
        assert client.call("echo").status == 400
        assert client.initialize().status == 200
        assert client.session != ended
        client.delete().body()


@pytest.mark.parametrize("way", ["wsgi", "gunicorn"])
def test_a_stopped_redis_is_an_error_and_nothing_is_lost(
    way: str, own_redis: Callable[..., RedisServer], redis_prefix: str
) -> None:
    redis = own_redis()
    with bare(way, redis, redis_prefix) as client:
        client.open()
        pid = client.result("count")["pid"]
        redis.stop()
        eventually(lambda: client.call("echo").failure == "store-unavailable")
        started = time.monotonic()
        answers = (client.call("count", key=7), client.listen())
        assert [answer.status for answer in answers] == [200, 503]
        for answer in answers:
            assert answer.failure == "store-unavailable"
            assert answer.headers["Retry-After"] == "1"
            assert answer.error()["code"] == -32000
        assert time.monotonic() - started < 5
        redis.start()
        assert client.result("count") == {"calls": 2, "pid": pid}


@pytest.mark.parametrize("way", ["wsgi", "gunicorn"])
def test_a_stopped_redis_opens_no_session_and_leaves_no_child(
    way: str, own_redis: Callable[..., RedisServer], redis_prefix: str
) -> None:
    redis = own_redis()
    with bare(way, redis, redis_prefix) as client:
        redis.stop()
        answer = client.initialize()
        assert (answer.status, answer.failure) == (200, "store-unavailable")
        assert "Mcp-Session-Id" not in answer.headers
        redis.start()
        eventually(lambda: client.initialize().has_succeeded)
        client.delete().body()


def test_a_session_goes_on_in_the_next_process_with_redis(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    with bare("gunicorn", redis_server, redis_prefix) as client:
        client.open("2025-11-25")
        client.result("count")
        session = client.session
    with bare("gunicorn", redis_server, redis_prefix) as client:
        client.session = session
        assert client.result("count")["calls"] == 1
        client.delete().body()
        assert client.call("count").status == 404
