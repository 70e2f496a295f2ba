"""A balancer's cookie goes with the session whose initialize brought it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from mcp_proxy import TransparentProxy
from tests.servers.http_backend import HttpBackend, Turn
from tests.support.front import McpClient
from tests.support.transparent import LocalFront, transparent


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as backend:
        number = iter(range(100))

        def initialize(turn: Turn) -> None:
            value = next(number)
            backend.initialize(turn, f"Set-Cookie: AWSALB=v{value}; Path=/", "Set-Cookie: login=x")

        backend.rpc["initialize"] = initialize
        yield backend


@pytest.fixture
def client(backend: HttpBackend) -> Iterator[McpClient]:
    with (
        TransparentProxy(backend.url) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        yield McpClient(front)


def test_it_is_sent_with_each_request_and_no_other_is(backend: HttpBackend, redis_url: str) -> None:
    with transparent("gunicorn", backend.url, redis_url) as proxy:
        client = proxy.client().open()
        client.result("tools/call")
        assert backend.last.header("Cookie") == "AWSALB=v0"
        client.call("tools/call", Cookie="a=b").body()
        assert backend.last.header("Cookie") == "a=b; AWSALB=v0"
        client.call("tools/call", Cookie="AWSALB=mine").body()
        assert backend.last.header("Cookie") == "AWSALB=mine"
        client.delete().body()
        assert backend.last.header("Cookie") == "AWSALB=v0"


def test_it_follows_what_the_balancer_sets_later(client: McpClient, backend: HttpBackend) -> None:
    client.open()
    backend.rpc["move"] = lambda turn: turn.result({}, "Set-Cookie: AWSALB=moved; Path=/")
    client.result("move")
    client.result("tools/call")
    assert backend.last.header("Cookie") == "AWSALB=moved"
    backend.rpc["move"] = lambda turn: turn.result({}, "Set-Cookie: AWSALB=; Max-Age=0")
    client.result("move")
    client.result("tools/call")
    assert backend.last.header("Cookie") is None


def test_a_session_that_is_initialized_again_has_a_new_one(
    client: McpClient, backend: HttpBackend
) -> None:
    client.open()
    backend.sessions.clear()
    backend.seen.clear()
    client.result("tools/call")
    _, begun, told, last = backend.seen
    assert begun.header("Cookie") is None
    assert told.header("Cookie") == last.header("Cookie") == "AWSALB=v1"
