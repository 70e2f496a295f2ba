"""`rate_limit_scope=deployment`: hosts with one Redis count a caller's requests together."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest

from mcp_proxy import ProxyConfig, ProxyOptions, StreamableProxy, create_app, rate_buckets
from mcp_proxy.errors import ConfigError, StorageUnavailable
from mcp_proxy.rate_buckets import CountEverywhere, Rate, key_of, rate_of
from mcp_proxy.redis.storage import RedisStorage
from tests.servers.http_backend import HttpBackend
from tests.support.front import SCRIPTED, HttpFront, Json, McpClient
from tests.support.modern_client import ModernClient
from tests.support.proxies import as_options
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually

KEY = key_of("caller")


@pytest.fixture(autouse=True)
def _fresh_buckets() -> None:
    rate_buckets.share()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that a test may stop."""
    with RedisServer() as server:
        yield server


def settings_for(redis_url: str, **more: object) -> Json:
    """What the hosts of one deployment have."""
    prefix = f"t-{uuid.uuid4().hex}:"
    return {
        "redis_url": redis_url,
        "redis_prefix": prefix,
        "rate_limit_scope": "deployment",
        **more,
    }


# --- what is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("20/second", (20, 1)),
        ("20/second:5", (20, 1)),
        ("600/minute:50", (600, 60)),
        ("20/second:50", (60, 3)),
        ("1/minute:4", (4, 240)),
    ],
)
def test_a_window_lets_come_at_once_what_the_limit_does(text: str, window: tuple[int, int]) -> None:
    rate = rate_of(text)
    assert rate is not None
    assert rate.window == window


def counter(url: str, prefix: str) -> CountEverywhere:
    """What one host counts with."""
    return RedisStorage(url, prefix=prefix, timeout=2).scoped("default").rate_counter()


def test_several_hosts_count_a_caller_together(redis_url: str) -> None:
    prefix, rate = f"t-{uuid.uuid4().hex}:", Rate(4 / 60, 4, 60)
    one, other = counter(redis_url, prefix), counter(redis_url, prefix)
    assert [count(KEY, rate, 1) for count in (one, other, one, other)] == [0] * 4
    assert 1 <= one(KEY, rate, 1) <= 60
    assert 1 <= other(KEY, rate, 2) <= 60
    assert other(key_of("another"), rate, 4) == 0


def test_what_was_put_back_can_be_taken_again(redis_url: str) -> None:
    count, rate = counter(redis_url, f"t-{uuid.uuid4().hex}:"), Rate(4 / 60, 4, 60)
    assert count(KEY, rate, 4) == 0
    assert count(KEY, rate, 1) > 0
    assert count(KEY, rate, -2) == 0
    assert count(KEY, rate, 2) == 0
    assert count(KEY, rate, 1) > 0


def test_requests_may_come_again_after_the_wait(redis_url: str) -> None:
    count, rate = counter(redis_url, f"t-{uuid.uuid4().hex}:"), Rate(2, 2)
    assert count(KEY, rate, 2) == 0
    assert count(KEY, rate, 1) > 0
    eventually(lambda: count(KEY, rate, 1) == 0, 10)


def test_a_redis_that_is_away_is_not_waited_for_by_each_request(own_redis: RedisServer) -> None:
    count, rate = counter(own_redis.url, "t:"), Rate(10, 10)
    assert count(KEY, rate, 1) == 0
    own_redis.pause()
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(StorageUnavailable):
            count(KEY, rate, 1)
    assert time.monotonic() - began < 10
    own_redis.resume()
    eventually(lambda: _counts(count, rate), 20)


def _counts(count: CountEverywhere, rate: Rate) -> bool:
    try:
        return count(KEY, rate, 1) == 0
    except StorageUnavailable:
        return False


# --- what callers see ----------------------------------------------------------------------------


def test_two_hosts_let_through_what_one_does(redis_server: RedisServer) -> None:
    settings = settings_for(redis_server.url, workers=2, rate_limit="6/minute")
    with (
        ProxyProcess(SCRIPTED, options=as_options(settings)) as one,
        ProxyProcess(SCRIPTED, options=as_options(settings)) as other,
    ):
        fronts = [HttpFront(proxy.base) for proxy in (one, other)] * 5
        answers = [McpClient(front).initialize() for front in fronts]
        assert [answer.failure for answer in answers] == [None] * 6 + ["rate-limited"] * 4
        for answer in answers[6:]:
            assert answer.status == 200
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            said = "Too many requests: 6/minute are allowed; try again in"
            assert answer.error()["message"].startswith(said)


def test_a_request_that_is_passed_counts_once(redis_server: RedisServer) -> None:
    """Some of the sessions begin at the worker that has not the connection."""
    count = 24
    settings = settings_for(redis_server.url, workers=3, rate_limit=f"{count}/minute")
    with ProxyProcess(SCRIPTED, options=as_options(settings)) as proxy:
        client = McpClient(HttpFront(proxy.base)).open()
        failures = [client.at(HttpFront(proxy.base)).call("ping").failure for _ in range(count)]
        assert failures == [None] * (count - 1) + ["rate-limited"]


def test_while_redis_is_away_the_host_counts(own_redis: RedisServer) -> None:
    settings = settings_for(own_redis.url, rate_limit="4/minute", connect_timeout=1)
    with (
        HttpBackend() as backend,
        create_app(ProxyConfig(target_url=(backend.url,), **settings)) as app,
    ):
        client = ModernClient(LocalFront(app))
        assert client.call("tools/list").failure != "rate-limited"
        own_redis.kill()
        failures = [client.call("tools/list").failure for _ in range(5)]
        assert [failure == "rate-limited" for failure in failures] == [False] * 3 + [True] * 2


def test_what_the_host_refuses_costs_redis_nothing(own_redis: RedisServer) -> None:
    settings = settings_for(own_redis.url, rate_limit="2/minute")
    config = ProxyConfig(command=SCRIPTED, threads=8, **settings)
    with create_app(config) as app, own_redis.client() as redis:
        front = LocalFront(app)
        assert [McpClient(front).initialize().failure for _ in range(3)][2] == "rate-limited"

        def scripts() -> int:
            return int(redis.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))

        before = scripts()
        for _ in range(20):
            assert McpClient(front).initialize().failure == "rate-limited"
        assert scripts() - before < 5  # the application's own
        front.close()


# --- settings ------------------------------------------------------------------------------------


def test_a_deployment_counts_in_redis_alone() -> None:
    said = "rate_limit_scope=deployment needs"
    with pytest.raises(ConfigError, match=f"{said} redis_url"):
        create_app(ProxyConfig(rate_limit="1/second", rate_limit_scope="deployment"))
    options = ProxyOptions(rate_limit="1/second", rate_limit_scope="deployment")
    with pytest.raises(ConfigError, match=f"{said} sessions in Redis"):
        StreamableProxy(SCRIPTED, options=options)
