"""Servers that only an outbound proxy can reach: nothing of theirs is looked up or pinned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp_proxy import LocalStorage, ProxyOptions, TransparentProxy
from mcp_proxy.storage.session import BACKEND_HOST, BACKEND_URL, new_session
from tests.servers.http_backend import HttpBackend, reply
from tests.support.front import McpClient
from tests.support.outbound import OutboundProxy
from tests.support.tls import Certificates
from tests.support.transparent import LocalFront, transparent
from tests.support.waiting import eventually

NAMES = ["one.server.invalid", "two.server.invalid"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"), "*.server.invalid")


@pytest.fixture(params=["http", "https"])
def backends(
    request: pytest.FixtureRequest, certificates: Certificates
) -> Iterator[list[HttpBackend]]:
    tls = certificates.for_anybody() if request.param == "https" else None
    with HttpBackend(tls=tls, name="one") as one, HttpBackend(tls=tls, name="two") as two:
        yield [one, two]


@pytest.fixture
def outbound(backends: list[HttpBackend]) -> Iterator[OutboundProxy]:
    names = {name: backend.port for name, backend in zip(NAMES, backends, strict=True)}
    with OutboundProxy(names, "user:very-secret") as outbound:
        yield outbound


@pytest.fixture
def targets(backends: list[HttpBackend]) -> list[str]:
    return [
        f"{'https' if backend.tls else 'http'}://{name}:{backend.port}"
        for name, backend in zip(NAMES, backends, strict=True)
    ]


def never(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host} was looked up")


def test_sessions_stay_at_the_targets_own_urls(
    backends: list[HttpBackend],
    outbound: OutboundProxy,
    targets: list[str],
    certificates: Certificates,
    redis_url: str,
) -> None:
    options = {"backend_proxy": outbound.url, "ca_file": certificates.path("ca.pem")}
    with transparent("gunicorn", targets, redis_url, **options) as proxy:
        assert proxy.request("GET", "/readyz").status == 200
        clients = [proxy.client().open() for _ in range(4)]
        homes = [client.result("tools/call")["backend"] for client in clients]
        assert sorted(homes) == ["one", "one", "two", "two"]
        for client, home in zip(clients, homes, strict=True):
            assert client.session is not None
            record = proxy.manager.storage.load(client.session)
            assert record.metadata[BACKEND_URL] == targets[0 if home == "one" else 1]
            assert BACKEND_HOST not in record.metadata
            assert client.result("tools/call")["backend"] == home
            assert client.listen().status == 200
        proxy.leave()
        backends[0].stop()  # its sessions go on at the other one
        backends[0].start()
        for client in clients:
            client.result("tools/call")
            assert client.delete().status == 200
        assert proxy.process is not None
        assert "very-secret" not in proxy.process.log()
    assert all(
        seen.header("Proxy-Authorization") is None for each in backends for seen in each.seen
    )


def test_nothing_is_looked_up(
    backends: list[HttpBackend],
    outbound: OutboundProxy,
    targets: list[str],
    certificates: Certificates,
) -> None:
    with (
        TransparentProxy(
            targets,
            LocalStorage(),
            allowed_backends=(),
            verify=certificates.path("ca.pem"),
            resolver=never,
            options=ProxyOptions(backend_proxy=outbound.url),
        ) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        client = McpClient(front).open()
        home = client.result("tools/call")["backend"]
        backend = backends[home == "two"]
        where = {BACKEND_URL: backend.url, BACKEND_HOST: NAMES[home == "two"]}
        backend.sessions.add("pinned")  # before there was an outbound proxy
        proxy.manager.create(new_session("pinned", "mcp", **where))
        client.session = "pinned"
        assert client.result("tools/call")["backend"] in ("one", "two")
        assert proxy.server_reason() is None
    assert all(name in str(outbound.asked) for name in [NAMES[home == "two"]])
    assert "127.0.0.1" not in str(outbound.asked)


def test_a_proxy_that_is_away_is_named(
    backends: list[HttpBackend],
    outbound: OutboundProxy,
    targets: list[str],
    certificates: Certificates,
) -> None:
    outbound.close()
    with (
        TransparentProxy(
            targets,
            verify=certificates.path("ca.pem"),
            options=ProxyOptions(backend_proxy=outbound.url),
        ) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        answer = McpClient(front).initialize()
        assert answer.failure == "server-unreachable"
        assert answer.error()["message"] == "The outbound proxy cannot be reached"
        reason = eventually(proxy.server_reason)
        assert "outbound proxy" in reason
        assert "very-secret" not in reason
        assert backends[0].connections + backends[1].connections == 0


def test_no_proxy_and_off_reach_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "inside.invalid")
    with HttpBackend() as backend:
        for name, setting in (("inside.invalid", None), ("outside.invalid", "off")):
            with (
                TransparentProxy(
                    f"http://{name}:{backend.port}",
                    resolver=lambda host, port: ["127.0.0.1"],
                    options=ProxyOptions(backend_proxy=setting),
                ) as proxy,
                contextlib.closing(LocalFront(proxy)) as front,
            ):
                assert McpClient(front).open().result("tools/call")["backend"] == "backend"
                assert backend.last.header("Host") == f"{name}:{backend.port}"


def test_redirects_lead_through_it(certificates: Certificates) -> None:
    with (
        HttpBackend(tls=certificates.for_anybody(), name="secure") as secure,
        HttpBackend() as plain,
        OutboundProxy({"one.server.invalid": plain.port}) as outbound,
    ):
        there = f"https://one.server.invalid:{secure.port}"

        def reply_and_learn(turn: object) -> None:
            outbound.names["one.server.invalid"] = secure.port
            reply(308, b"", f"Location: {there}/mcp")(turn)  # type: ignore[arg-type]

        plain.on("POST", "/mcp", reply_and_learn)
        with (
            TransparentProxy(
                f"http://one.server.invalid:{plain.port}",
                allowed_backends=(),
                verify=certificates.path("ca.pem"),
                resolver=never,
                options=ProxyOptions(backend_proxy=outbound.url),
            ) as proxy,
            contextlib.closing(LocalFront(proxy)) as front,
        ):
            client = McpClient(front).open()
            assert client.result("tools/call")["backend"] == "secure"
            assert client.session is not None
            assert proxy.manager.storage.load(client.session).backend_url == there
            assert len(plain.seen) == 1


def test_a_redirect_may_lead_from_outside_to_inside_of_it(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        HttpBackend(tls=certificates.for_anybody(), name="secure") as secure,
        HttpBackend() as plain,
        OutboundProxy({"one.server.invalid": secure.port}) as outbound,
    ):
        there = f"https://one.server.invalid:{secure.port}"
        plain.on("POST", "/mcp", reply(308, b"", f"Location: {there}/mcp"))
        monkeypatch.setenv("https_proxy", outbound.url)
        with (
            TransparentProxy(
                f"http://one.server.invalid:{plain.port}",
                allowed_backends=(),
                verify=certificates.path("ca.pem"),
                resolver=lambda host, port: ["127.0.0.1"],
            ) as proxy,
            contextlib.closing(LocalFront(proxy)) as front,
        ):
            for _ in range(2):
                client = McpClient(front).open()
                assert client.result("tools/call")["backend"] == "secure"
                assert client.session is not None
                assert proxy.manager.storage.load(client.session).backend_url == there
            assert len(plain.seen) == 1
        assert {line.split()[1] for line in outbound.asked} == {there.removeprefix("https://")}
