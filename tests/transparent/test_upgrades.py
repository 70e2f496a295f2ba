"""An http target that redirects to https: its sessions live there, and nothing goes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from mcp_proxy import LocalStorage, ProxyOptions, TransparentProxy
from mcp_proxy.storage.session import BACKEND_HOST
from tests.servers.http_backend import HttpBackend, reply
from tests.support.front import McpClient
from tests.support.tls import Certificates
from tests.support.transparent import BOTH, LocalFront, Transparent, transparent


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure(certificates: Certificates) -> Iterator[HttpBackend]:
    with HttpBackend(tls=certificates.for_anybody(), name="secure") as backend:
        yield backend


@pytest.fixture
def plain(secure: HttpBackend) -> Iterator[HttpBackend]:
    with HttpBackend(name="plain") as backend:
        for method in ("POST", "GET", "DELETE"):
            backend.on(method, "/mcp", reply(308, b"", f"Location: {secure.url}/mcp"))
        yield backend


@pytest.fixture(params=BOTH)
def proxy(
    request: pytest.FixtureRequest, plain: HttpBackend, certificates: Certificates, redis_url: str
) -> Iterator[Transparent]:
    ca_file = certificates.path("ca.pem")
    with transparent(request.param, plain.url, redis_url, ca_file=ca_file, threads=4) as proxy:
        yield proxy


@pytest.mark.parametrize("status", [307, 308])
def test_a_session_lives_where_its_initialize_was_led(
    proxy: Transparent, plain: HttpBackend, secure: HttpBackend, status: int
) -> None:
    plain.on("POST", "/mcp", reply(status, b"", f"Location: {secure.url}/mcp"))
    client = proxy.client().open()
    assert client.result("tools/call")["backend"] == "secure"
    assert client.session is not None
    record = proxy.manager.storage.load(client.session)
    assert record.backend_url == secure.url
    assert client.listen().status == 200
    assert [seen.rpc for seen in plain.seen] == ["initialize"]  # nothing else was redirected
    secure.sessions.clear()
    assert client.result("tools/call")["backend"] == "secure"  # initialized again
    assert proxy.client().open().result("tools/call")["backend"] == "secure"
    assert client.delete().status == 200
    assert [seen.rpc for seen in plain.seen] == ["initialize"]


def test_a_replica_that_saw_no_redirect_believes_the_record(
    proxy: Transparent,
    plain: HttpBackend,
    secure: HttpBackend,
) -> None:
    record = proxy.record(backend_url=secure.url)
    secure.sessions.add(record.id)
    client = proxy.client()
    client.session = record.id
    assert client.result("tools/call")["backend"] == "secure"
    assert plain.seen == []


def test_the_name_of_a_target_stays_with_it(
    plain: HttpBackend, secure: HttpBackend, certificates: Certificates
) -> None:
    there = f"https://localhost:{secure.port}"
    plain.on("POST", "/mcp", reply(308, b"", f"Location: {there}/mcp"))
    with (
        TransparentProxy(
            f"http://localhost:{plain.port}",
            allowed_backends=(),
            verify=certificates.path("ca.pem"),
            resolver=lambda host, port: ["127.0.0.1"],
        ) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        client = McpClient(front).open()
        assert client.session is not None
        record = proxy.manager.storage.load(client.session)
        assert (record.backend_url, record.metadata[BACKEND_HOST]) == (secure.url, "localhost")
        assert client.result("tools/call")["backend"] == "secure"
        assert secure.last.header("Host") == f"localhost:{secure.port}"
        assert len(plain.seen) == 1


def test_a_session_that_begins_anew_is_recorded_where_that_was_answered(
    plain: HttpBackend, secure: HttpBackend, certificates: Certificates
) -> None:
    storage, verify = LocalStorage(), certificates.path("ca.pem")
    options = ProxyOptions(unknown_session_status="ask")
    with contextlib.ExitStack() as stack:
        fronts = []
        for _ in range(3):  # the second and third have seen no redirect
            proxy = stack.enter_context(
                TransparentProxy(
                    plain.url,
                    storage,
                    name="same",
                    allowed_backends=(),
                    verify=verify,
                    options=options,
                )
            )
            fronts.append(stack.enter_context(contextlib.closing(LocalFront(proxy))))
        client = McpClient(fronts[0]).open()
        assert client.session is not None
        secure.sessions.clear()
        assert client.at(fronts[1]).result("tools/call")["backend"] == "secure"
        assert proxy.manager.storage.load(client.session).backend_url == secure.url
        client.session = "asked"
        secure.sessions.add("asked")
        assert client.at(fronts[2]).result("tools/call")["backend"] == "secure"
        assert proxy.manager.storage.load("asked").backend_url == secure.url


def test_a_server_that_is_away_is_not_looked_for_without_tls(
    proxy: Transparent, plain: HttpBackend, secure: HttpBackend
) -> None:
    client = proxy.client().open()
    seen = len(plain.seen)
    secure.stop()
    answer = client.call("tools/call", Authorization="Bearer secret")
    assert answer.failure == "server-unreachable"
    assert len(plain.seen) == seen


def test_the_way_back_is_not_taken(
    proxy: Transparent, plain: HttpBackend, secure: HttpBackend
) -> None:
    client = proxy.client().open()
    plain.acts.clear()
    secure.on("POST", "/mcp", reply(307, b"", f"Location: {plain.url}/mcp"))
    seen = len(plain.seen)
    assert client.call("tools/call").failure == "bad-answer"
    assert len(plain.seen) == seen
