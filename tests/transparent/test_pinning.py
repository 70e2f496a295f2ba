"""A session stays at the address that began it, and is looked for before it begins anew."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from mcp_proxy import LocalStorage, TransparentProxy
from mcp_proxy.transparent.balancing import LOOK_UP
from tests.servers.http_backend import HttpBackend
from tests.support.front import McpClient
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually


class Name:
    """A host name with two servers, one at each of two addresses and both at one port."""

    def __init__(self, one: HttpBackend, two: HttpBackend) -> None:
        self.one, self.two = one, two
        self.hosts = [one.host]
        self.url = f"http://server:{one.port}/mcp"

    def __call__(self, host: str, port: int) -> list[str]:
        return self.hosts if host == "server" else [host]


@pytest.fixture
def name() -> Iterator[Name]:
    with (
        HttpBackend(name="one") as one,
        HttpBackend(one.port, host="127.0.0.2", name="two") as two,
    ):
        yield Name(one, two)


@pytest.fixture
def storage() -> LocalStorage:
    return LocalStorage()


@pytest.fixture
def proxy(name: Name, storage: LocalStorage) -> Iterator[TransparentProxy]:
    with TransparentProxy(name.url, storage, name="server", resolver=name) as proxy:
        yield proxy


@pytest.fixture
def front(proxy: TransparentProxy) -> Iterator[LocalFront]:
    with contextlib.closing(LocalFront(proxy)) as front:
        yield front


def changed(proxy: TransparentProxy, name: Name, *hosts: str) -> None:
    """The name has these addresses, and the proxy knows it."""
    name.hosts = list(hosts)

    def is_known() -> bool:
        return {address.host for address in proxy.balancer.candidates()} == set(hosts)

    eventually(is_known, 10 * LOOK_UP)


def test_a_name_that_gains_an_address_moves_no_session(
    proxy: TransparentProxy, front: LocalFront, name: Name
) -> None:
    clients = [McpClient(front).open() for _ in range(6)]
    changed(proxy, name, name.one.host, name.two.host)
    for client in clients:
        for _ in range(3):
            assert client.result("tools/call")["backend"] == "one"
    assert name.one.executed["initialize"] == 6
    assert name.two.seen == []
    assert name.one.last.header("Host") == f"server:{name.one.port}"


def test_an_address_that_a_name_has_no_more_serves_while_it_lives(
    proxy: TransparentProxy, front: LocalFront, name: Name
) -> None:
    client = McpClient(front).open()
    changed(proxy, name, name.two.host)
    assert client.result("tools/call")["backend"] == "one"


def test_another_address_of_the_name_may_know_the_session(
    proxy: TransparentProxy, front: LocalFront, name: Name
) -> None:
    client = McpClient(front).open()
    name.two.sessions = set(name.one.sessions)
    changed(proxy, name, name.two.host)
    name.one.stop()
    for _ in range(2):
        assert client.result("tools/call")["backend"] == "two"
    assert name.two.executed["initialize"] == 0
    assert {seen.header("Mcp-Session-Id") for seen in name.two.seen} == {client.session}
    assert client.session is not None
    record = proxy.manager.storage.load(client.session)
    assert record.backend_url == name.two.url  # the next request asks nobody else
    assert record.metadata["backend_host"] == "server"


def test_a_session_begins_anew_only_where_nobody_knows_it(
    proxy: TransparentProxy, front: LocalFront, name: Name
) -> None:
    client = McpClient(front).open()
    session = client.session
    changed(proxy, name, name.two.host)
    name.one.stop()
    assert client.result("tools/call")["backend"] == "two"
    assert client.session == session
    first, second, third, last = name.two.seen
    assert first.header("Mcp-Session-Id") == session
    assert [second.rpc, third.rpc] == ["initialize", "notifications/initialized"]
    assert last.rpc == "tools/call"


def test_a_replica_that_never_saw_the_address_asks_the_others(
    storage: LocalStorage, front: LocalFront, name: Name
) -> None:
    client = McpClient(front).open()
    name.two.sessions = set(name.one.sessions)
    name.hosts = [name.two.host]
    with (
        TransparentProxy(
            name.url, storage, name="server", resolver=name, allowed_backends=()
        ) as other,
        contextlib.closing(LocalFront(other)) as way,
    ):
        for _ in range(2):
            assert client.at(way).result("tools/call")["backend"] == "two"
        assert name.two.executed["initialize"] == 0


def test_another_target_may_know_the_session() -> None:
    with (
        HttpBackend(name="one") as one,
        HttpBackend(name="two") as two,
        TransparentProxy([one.url, two.url]) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        client = McpClient(front).open()
        one.sessions = two.sessions = one.sessions | two.sessions
        kept = one.sessions
        gone, left = (one, two) if one.executed["initialize"] else (two, one)
        gone.stop()
        left.sessions = kept
        assert client.result("tools/call")["backend"] == left.name
        assert left.executed["initialize"] == 0
        assert client.delete().status == 200
        assert left.ended == {client.session}


class Alternating(HttpBackend):
    """One address that stands for two servers: each connection leads to the other one."""

    def __init__(self, one: HttpBackend, two: HttpBackend) -> None:
        self._servers = (one, two)
        super().__init__()

    def serve(self, sock: socket.socket, number: int) -> None:
        self._servers[number % 2].serve(sock, number)


def test_servers_that_share_an_address_and_no_sessions_are_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        HttpBackend(name="one", requests_per_connection=1) as one,
        HttpBackend(name="two", requests_per_connection=1) as two,
        Alternating(one, two) as both,
        TransparentProxy(both.url) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        for _ in range(2):
            client = McpClient(front)
            assert client.initialize().status == 200
            eventually(lambda client=client: client.call("tools/call").status == 404)
    warnings = [line for line in caplog.messages if "several servers" in line]
    assert len(warnings) == 1  # a minute
    assert both.url in warnings[0]


def test_a_server_that_forgets_again_and_again_is_initialized_again(
    front: LocalFront, name: Name
) -> None:
    client = McpClient(front).open()
    session = client.session
    for _ in range(4):
        name.one.sessions.clear()
        assert client.result("tools/call")["backend"] == "one"
    assert client.session == session
