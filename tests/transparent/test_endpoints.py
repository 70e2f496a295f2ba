"""Each server's MCP endpoint is where its own URL says, also for the calls that are the proxy's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from mcp_proxy import LocalStorage, ProxyOptions, TransparentProxy
from mcp_proxy.storage.session import BACKEND_HOST, BACKEND_URL, UNSENT, new_session
from tests.servers.http_backend import HttpBackend
from tests.support.front import McpClient
from tests.support.transparent import LocalFront, transparent


@pytest.fixture
def one() -> Iterator[HttpBackend]:
    with HttpBackend(name="one") as backend:
        yield backend


@pytest.fixture
def two() -> Iterator[HttpBackend]:
    with HttpBackend(name="two") as backend:
        yield backend


def targets(backend: HttpBackend) -> set[str]:
    """Path and query of everything that came."""
    return {seen.target for seen in backend.seen}


@pytest.mark.parametrize("first", ["", "/v2/mcp?t=1"])
@pytest.mark.parametrize(
    ("suffix", "endpoint"), [("/z?u=1", "/z?u=1"), ("", "/mcp"), ("/v2/mcp?t=2", "/v2/mcp?t=2")]
)
def test_a_second_target_has_its_own(
    one: HttpBackend, two: HttpBackend, first: str, suffix: str, endpoint: str, redis_url: str
) -> None:
    urls = [one.url + first, two.url + suffix]
    with transparent("gunicorn", urls, redis_url, threads=4) as proxy:
        clients = [proxy.client().open() for _ in range(2)]
        homes = [client.result("tools/call")["backend"] for client in clients]
        assert sorted(homes) == ["one", "two"]
        two.sessions.clear()  # initialized again, at either
        for client in clients:
            client.result("tools/call")
            client.delete().body()
    assert targets(one) == {first or "/mcp"}
    assert targets(two) == {endpoint}
    assert one.executed["initialize"] + two.executed["initialize"] == 3


def test_two_targets_may_share_a_host(one: HttpBackend) -> None:
    storage = LocalStorage()
    urls = [f"{one.url}/{name}/mcp" for name in "ab"]
    with TransparentProxy(urls, storage) as proxy, contextlib.closing(LocalFront(proxy)) as front:
        clients = [McpClient(front).open() for _ in range(2)]
        for client in clients:
            one.seen.clear()
            for _ in range(3):
                client.result("tools/call")
            assert len(targets(one)) == 1


def test_pings_go_to_the_endpoint_of_each(one: HttpBackend, two: HttpBackend) -> None:
    options = ProxyOptions(unknown_session_status="ask")
    with (
        TransparentProxy([one.url, f"{two.url}/z"], options=options) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        two.sessions.add("known")
        client = McpClient(front)
        client.session = "known"
        for _ in range(2):
            assert client.result("tools/call")["backend"] == "two"
        assert two.executed["ping"] >= 1
        assert targets(one) <= {"/mcp"}  # whose turn came first
        assert targets(two) == {"/z"}
        record = proxy.manager.storage.load("known")
        assert record.backend_url == f"{two.url}/z"


def test_what_is_sent_ahead_goes_to_the_path_in_the_record(
    one: HttpBackend, two: HttpBackend
) -> None:
    with (
        TransparentProxy(one.url) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        two.sessions.add("s")
        where = {BACKEND_URL: f"{two.url}/z", BACKEND_HOST: "localhost", UNSENT: "1"}
        proxy.manager.create(new_session("s", "mcp", **where))
        client = McpClient(front)
        client.session = "s"
        client.result("tools/call")
        assert [seen.rpc for seen in two.seen] == ["notifications/initialized", "tools/call"]
        assert targets(two) == {"/z"}
        client.delete().body()
        assert targets(two) == {"/z"}
        assert one.seen == []
