"""Calls through an outbound proxy: a real one, which alone can look the servers' names up."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.errors import BackendTimeout, BackendUnreached, ClientLeft
from mcp_proxy.wire.urls import Address, parse_target
from tests.proofs.hell import drip
from tests.servers.http_backend import HttpBackend, reply, silent
from tests.support import outbound
from tests.support.outbound import Act, OutboundProxy
from tests.support.tls import Certificates
from tests.support.waiting import eventually

NAME = "server.invalid"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"), NAME)


@pytest.fixture(params=["http", "https"])
def backend(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[HttpBackend]:
    tls = certificates.for_anybody() if request.param == "https" else None
    with HttpBackend(tls=tls) as backend:
        backend.on("GET", "/x", reply(200, b"found"))
        yield backend


@pytest.fixture
def secure(certificates: Certificates) -> Iterator[HttpBackend]:
    with HttpBackend(tls=certificates.for_anybody()) as backend:
        yield backend


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> Iterator[OutboundProxy]:
    with OutboundProxy({}) as proxy:
        yield proxy


Make = Callable[..., HttpClient]


@pytest.fixture
def client_of(certificates: Certificates) -> Iterator[Make]:
    with contextlib.ExitStack() as made:

        def make(url: str | None, connect_timeout: float = 5) -> HttpClient:
            client = HttpClient(connect_timeout, 2, certificates.path("ca.pem"), url)
            made.callback(client.close)
            return client

        yield make


def address_of(backend: HttpBackend, proxy: OutboundProxy) -> Address:
    """The backend under a name that only the proxy knows."""
    proxy.names[NAME] = backend.port
    return Address("https" if backend.tls else "http", NAME, backend.port)


def got(client: HttpClient, address: Address, target: str = "/x", timeout: float = 5) -> bytes:
    call = HttpCall(client, address, "GET", target, {}, b"")
    try:
        call.send(timeout)
        assert call.status == 200, call.status
        return call.read(1000)
    finally:
        call.close()


# --- through it ----------------------------------------------------------------------------------


def test_a_server_is_reached_by_a_name_that_the_proxy_knows(
    backend: HttpBackend, proxy: OutboundProxy, client_of: Make
) -> None:
    address, client = address_of(backend, proxy), client_of(proxy.url.replace("http", "HTTP"))
    for _ in range(3):
        assert got(client, address, "/x?a=%2F&b") == b"found"
    assert backend.last.target == "/x?a=%2F&b"
    assert backend.last.header("Host") == f"{NAME}:{backend.port}"
    assert {name for name in backend.last.names if name.startswith("proxy")} == set()
    is_tunnel = backend.tls is not None
    line = f"CONNECT {NAME}:{backend.port} " if is_tunnel else f"GET {address.url}/x?a=%2F&b "
    assert all(asked.startswith(line) for asked in proxy.asked)
    assert len(proxy.asked) == (1 if is_tunnel else 3)  # a tunnel is kept


def test_an_address_that_was_pinned_before_goes_by_its_name(
    backend: HttpBackend, proxy: OutboundProxy, client_of: Make
) -> None:
    address = address_of(backend, proxy)._replace(host="192.0.2.1", name=NAME)
    assert got(client_of(proxy.url), address) == b"found"
    assert "192.0.2.1" not in str(proxy.asked)


def test_a_tunnel_that_was_idle_is_opened_again(
    secure: HttpBackend, proxy: OutboundProxy, client_of: Make
) -> None:
    secure.on("GET", "/x", reply(200, b"found"))
    address, client = address_of(secure, proxy), client_of(proxy.url)
    assert got(client, address) == b"found"
    secure.drop_connections()
    eventually(lambda: proxy.open_connections == 0)
    assert got(client, address) == b"found"
    assert len(proxy.asked) == 2


def test_the_certificate_is_the_servers(
    secure: HttpBackend, proxy: OutboundProxy, client_of: Make
) -> None:
    address = address_of(secure, proxy)._replace(host="other.invalid")
    proxy.names["other.invalid"] = secure.port
    with pytest.raises(BackendUnreached, match="certificate"):
        got(client_of(proxy.url), address)
    assert secure.seen == []


def test_the_password_is_the_proxys_alone(backend: HttpBackend, client_of: Make) -> None:
    with OutboundProxy({}, "user:p%40ss") as proxy:
        proxy.password = "user:p@ss"
        url = f"http://user:p%40ss@127.0.0.1:{proxy.port}"
        assert got(client_of(url), address_of(backend, proxy)) == b"found"
        assert "proxy-authorization" not in backend.last.names


def test_a_proxy_that_wants_a_password_says_so(secure: HttpBackend, client_of: Make) -> None:
    with OutboundProxy({}, "user:secret") as proxy:
        url = f"http://user:wrong-one@127.0.0.1:{proxy.port}"
        with pytest.raises(BackendUnreached, match="407 Proxy Authentication Required") as caught:
            got(client_of(url), address_of(secure, proxy))
        assert "wrong-one" not in str(caught.value)


# --- time, and clients that leave ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (outbound.silent, "in time"),
        (outbound.dripping, "in time"),
        (outbound.refusing, "does not connect: 403 Not allowed here"),
        (outbound.breaking, "broke off"),
    ],
)
def test_a_proxy_that_does_not_connect_is_a_server_that_is_not_reached(
    secure: HttpBackend, proxy: OutboundProxy, client_of: Make, act: Act, sentence: str
) -> None:
    proxy.on_connect = act
    client, address = client_of(proxy.url, connect_timeout=0.5), address_of(secure, proxy)
    begun = time.monotonic()
    with pytest.raises(BackendUnreached, match=sentence):
        got(client, address, timeout=60)
    assert time.monotonic() - begun < 10


def test_a_proxy_that_is_away(backend: HttpBackend, client_of: Make) -> None:
    with OutboundProxy({}) as proxy:
        address = address_of(backend, proxy)
    client = client_of(f"http://user:secret@127.0.0.1:{proxy.port}")
    with pytest.raises(BackendUnreached, match="The outbound proxy cannot be reached"):
        got(client, address)
    reason = client.probe(address)
    assert reason is not None
    where = f"http://127.0.0.1:{proxy.port} of {address.url}"
    assert reason.message == "The outbound proxy cannot be reached"
    assert reason.detail == f"the outbound proxy {where}: Connection refused"


def test_of_a_server_behind_a_proxy_only_the_proxy_is_probed(
    backend: HttpBackend, proxy: OutboundProxy, client_of: Make
) -> None:
    address = address_of(backend, proxy)
    assert client_of(proxy.url).probe(address) is None
    assert client_of("off", connect_timeout=2).probe(address) is not None
    assert (proxy.asked, backend.connections) == ([], 0)


def test_a_client_that_leaves_while_the_proxy_is_silent(
    secure: HttpBackend, proxy: OutboundProxy, client_of: Make
) -> None:
    proxy.on_connect = outbound.silent
    call = HttpCall(client_of(proxy.url, 60), address_of(secure, proxy), "GET", "/x", {}, b"")

    def leave() -> None:
        eventually(lambda: proxy.asked)
        call.abort()

    thread = threading.Thread(target=leave)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(ClientLeft):
        call.send(60)
    assert time.monotonic() - begun < 20
    thread.join()
    call.close()


def test_a_client_that_leaves_while_the_server_is_silent(
    backend: HttpBackend, proxy: OutboundProxy, client_of: Make
) -> None:
    backend.on("GET", "/x", silent)
    call = HttpCall(client_of(proxy.url), address_of(backend, proxy), "GET", "/x", {}, b"")

    def leave() -> None:
        eventually(lambda: backend.seen)
        call.abort()

    thread = threading.Thread(target=leave)
    thread.start()
    with pytest.raises(ClientLeft):
        call.send(60)
    thread.join()
    call.close()
    eventually(lambda: backend.gone)  # the server hears of it through the proxy


@pytest.mark.parametrize("before", [b"", OK])
def test_the_deadline_of_a_call_holds_through_it(
    backend: HttpBackend, proxy: OutboundProxy, client_of: Make, before: bytes
) -> None:
    backend.on("GET", "/x", drip(before or b"HTTP/1.1 2", b"0"))
    with pytest.raises(BackendTimeout):
        got(client_of(proxy.url), address_of(backend, proxy), timeout=1)


# --- which one -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url", "expected"),
    [
        ({}, "https://a.example", None),
        ({"HTTPS_PROXY": "http://p:1"}, "https://a.example", "http://p:1"),
        ({"https_proxy": "http://p:1"}, "https://a.example", "http://p:1"),
        ({"HTTPS_PROXY": "p:1"}, "https://a.example", "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, "http://a.example", None),
        ({"HTTP_PROXY": "http://p:2"}, "http://a.example", "http://p:2"),
        ({"HTTP_PROXY": "http://p:2"}, "https://a.example", None),
        ({"ALL_PROXY": "http://p:3"}, "https://a.example", "http://p:3"),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "a.example"}, "http://a.example", None),
        ({"HTTP_PROXY": "http://p", "no_proxy": ".example"}, "http://a.example:81", None),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "b"}, "http://a.example", "http://p"),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "10.0.0.0/8"}, "http://10.1.2.3", None),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "*"}, "http://a.example", None),
        *(
            ({"HTTP_PROXY": "http://p", "HTTPS_PROXY": "http://p"}, f"{scheme}://{host}:8", None)
            for host in ("localhost", "a.localhost", "127.0.0.1", "127.8.9.1", "[::1]")
            for scheme in ("http", "https")
        ),
    ],
)
def test_the_environment_names_a_proxy_unless_a_setting_does(
    monkeypatch: pytest.MonkeyPatch,
    client_of: Make,
    given: dict[str, str],
    url: str,
    expected: str | None,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    target = parse_target(url)
    assert target is not None
    assert client_of(None).proxy_of(target.address) == expected
    assert client_of("off").proxy_of(target.address) is None
    assert client_of("http://mine:9").proxy_of(target.address) == "http://mine:9"


def test_a_pinned_address_is_judged_by_its_name(
    monkeypatch: pytest.MonkeyPatch, client_of: Make
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://p")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    client = client_of(None)
    assert client.proxy_of(Address("https", "10.0.0.1", 443, "inside.example")) is None
    assert client.proxy_of(Address("https", "10.0.0.1", 443, "outside.example")) == "http://p"


@pytest.mark.parametrize("url", ["socks5://p:1", "https://p:1"])
def test_a_proxy_that_is_not_spoken_to_is_named(
    monkeypatch: pytest.MonkeyPatch, client_of: Make, url: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    client, address = client_of(None), Address("https", "a.example", 443)
    with pytest.raises(BackendUnreached, match="backend_proxy"):
        got(client, address)
    found = client.probe(address)
    assert found is not None
    assert "backend_proxy" in found.message
    assert "backend_proxy" in found.detail
