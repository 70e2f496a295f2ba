"""Backends that cannot be reached: asked last, and tried again by a thread of ours."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp_proxy import TransparentProxy
from mcp_proxy.config import ProxyOptions
from mcp_proxy.errors import BackendUnreached
from mcp_proxy.transparent.balancing import Balancer, Names
from mcp_proxy.transparent.reachability import READY_WAIT, Reachability
from mcp_proxy.wire.urls import Address, parse_target
from tests.servers.http_backend import HttpBackend
from tests.support.front import McpClient
from tests.support.tls import Certificates
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually

A, B = Address("http", "10.0.0.1", 1), Address("http", "10.0.0.2", 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Hosts:
    """What a connect leads to: a reason, or None."""

    def __init__(self) -> None:
        self.down: dict[Address, str] = {}
        self.tried: list[Address] = []
        self.hang = threading.Event()
        self.silent: set[Address] = set()

    def __call__(self, address: Address) -> BackendUnreached | None:
        self.tried.append(address)
        if address in self.silent:
            self.hang.wait(10)
        return unreached(self.down[address]) if address in self.down else None


def unreached(detail: str, message: str | None = None) -> BackendUnreached:
    """What a connect has found."""
    error = BackendUnreached(message)
    error.detail = detail
    return error


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.hang.set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reachability(hosts: Hosts, clock: Clock) -> Iterator[Reachability]:
    made = Reachability(hosts, clock=clock)
    yield made
    made.stop()


def test_the_pause_doubles_up_to_a_minute_and_ends_with_a_connect(
    reachability: Reachability, hosts: Hosts, clock: Clock
) -> None:
    hosts.down[A] = "gone"
    reachability.failed(A, unreached("refused"))
    for pause in (10, 20, 40, 60, 60):
        tries = len(hosts.tried)
        clock.now += pause - 0.5
        reachability.look()
        time.sleep(0.05)
        assert len(hosts.tried) == tries
        clock.now += 0.5
        reachability.look()
        eventually(lambda tries=tries: len(hosts.tried) == tries + 1)
        time.sleep(0.05)
        assert reachability.is_left_out(A)
    hosts.down.clear()
    clock.now += 60
    reachability.look()
    eventually(lambda: not reachability.is_left_out(A))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are tried by the test's own thread."""
    submit = "mcp_proxy.background.KeyedExecutor.submit"
    monkeypatch.setattr(submit, lambda self, key, act: act())


@pytest.mark.usefixtures("at_once")
def test_an_outage_goes_on_while_somebody_asks(
    reachability: Reachability, hosts: Hosts, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """However long: else a client's request is the next to wait for the host."""
    hosts.down[A] = "gone"
    reachability.failed(A, unreached("refused"))
    for clock.now in range(600, 9001, 600):
        assert reachability.is_left_out(A)
        reachability.look()
    assert len(hosts.tried) == 15
    hosts.down.clear()
    clock.now = 9100
    reachability.look()
    assert not reachability.is_left_out(A)
    assert lines_of(caplog)[-1] == "http://10.0.0.1:1 is reachable again after 9100 s"


@pytest.mark.usefixtures("at_once")
def test_an_address_is_forgotten_when_nobody_has_asked_for_it_for_an_hour(
    reachability: Reachability, hosts: Hosts, clock: Clock
) -> None:
    hosts.down[A] = "gone"
    reachability.failed(A, unreached("refused"))
    clock.now = 1000
    assert reachability.is_left_out(A)
    for clock.now in range(1600, 4400, 600):
        reachability.look()
        assert A.url in repr(reachability)
    assert len(hosts.tried) == 5
    clock.now = 4600
    reachability.look()
    assert "left_out=[]" in repr(reachability)


def test_what_is_left_out_comes_last(reachability: Reachability) -> None:
    targets = [found for url in ("http://a:1", "http://b:1") if (found := parse_target(url))]
    balancer = Balancer(targets, 100, lambda host, port: [host], reachability=reachability)
    a, b = (target.address for target in targets)
    balancer.add("s", b)
    reachability.failed(a, unreached("silent"))
    assert [balancer.candidates() for _ in range(3)] == [[b, a]] * 3
    reachability.reached(a)
    assert balancer.candidates() == [a, b]
    balancer.stop()


def test_readiness_knows_of_one_that_can_be_reached(
    reachability: Reachability, hosts: Hosts
) -> None:
    hosts.silent = {A}
    assert reachability.not_ready_reason([A, B]) is None
    hosts.tried.clear()
    assert reachability.not_ready_reason([A, B]) is None
    assert hosts.tried == []  # known


def test_readiness_waits_for_nobody_who_hangs(reachability: Reachability, hosts: Hosts) -> None:
    hosts.silent, hosts.down = {A}, {B: "http://10.0.0.2:1: refused"}
    for _ in range(2):
        begun = time.monotonic()
        reason = reachability.not_ready_reason([A, B])
        assert reason == "http://10.0.0.1:1: no answer yet; http://10.0.0.2:1: refused"
        assert time.monotonic() - begun < 2


@pytest.fixture
def swallowing() -> Iterator[str]:
    """A port whose queue is full: a connect to it is not answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield f"http://127.0.0.1:{port}"
        for filler in fillers:
            filler.close()


def test_a_silent_target_costs_one_client_its_time_and_no_other(swallowing: str) -> None:
    options = ProxyOptions(connect_timeout=2)
    with (
        HttpBackend() as backend,
        TransparentProxy([swallowing, backend.url], options=options) as proxy,
    ):
        front = LocalFront(proxy)
        begun = time.monotonic()
        for _ in range(6):
            assert McpClient(front).open().result("tools/call")["backend"] == "backend"
        assert time.monotonic() - begun < 4
        begun = time.monotonic()
        assert proxy.not_ready_reason() is None
        assert time.monotonic() - begun < 2
        front.close()


def test_a_session_at_a_silent_address_pays_once(swallowing: str) -> None:
    options = ProxyOptions(connect_timeout=2)
    with (
        HttpBackend() as backend,
        TransparentProxy([swallowing, backend.url], options=options) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        clients = [McpClient(front).open() for _ in range(4)]
        for client in clients:
            assert client.session is not None
            store = proxy.manager.storage
            record = store.load(client.session)
            assert store.swap(record, record.with_metadata(backend_url=swallowing))
        proxy.reachability.reached(
            next(a for a in proxy.balancer.candidates() if a.url == swallowing)
        )
        begun = time.monotonic()
        for client in clients:
            for _ in range(3):
                assert client.result("tools/call")["backend"] == "backend"
        assert 2 <= time.monotonic() - begun < 4


def test_where_all_are_silent_one_request_pays(swallowing: str) -> None:
    options = ProxyOptions(connect_timeout=2)
    with (
        TransparentProxy(swallowing, options=options) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        begun = time.monotonic()
        for _ in range(3):
            assert McpClient(front).initialize().failure == "server-unreachable"
        assert 2 <= time.monotonic() - begun < 2 + 2 * READY_WAIT + 1


def test_what_found_no_thread_is_tried_again(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    reachability = Reachability(hosts)
    names = Names(lambda host, port: [host])
    with monkeypatch.context() as patch:
        patch.setattr("mcp_proxy.background.KeyedExecutor.submit", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            reachability.not_ready_reason([A])
        with pytest.raises(RuntimeError, match="can't start"):
            names.addresses("a", 1, 5)
    assert reachability.not_ready_reason([A]) is None
    assert names.addresses("a", 1, 5) == ("a",)
    reachability.stop()
    names.stop()


def test_what_a_connect_has_found_is_known_before_it_counts_as_over(
    reachability: Reachability, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a request that asks in between takes a server that is back for one that is not."""
    is_found, reached = threading.Event(), reachability.reached

    class AskedWhileFound(list[Address]):
        def __iter__(self) -> Iterator[Address]:
            yield from super().__iter__()
            is_found.wait(10)

    def slowly(address: Address) -> None:
        is_found.set()
        time.sleep(0.2)
        reached(address)

    monkeypatch.setattr(reachability, "reached", slowly)
    reachability.failed(A, unreached("refused"))
    assert reachability.back(AskedWhileFound([A])) == [A]


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [each for each in caplog.records if each.levelname == "WARNING"]
    return [each.getMessage() for each in found if each.name.endswith("reachability")]


def test_an_outage_is_a_line_at_once_and_one_a_minute_and_one_at_its_end(
    reachability: Reachability, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for clock.now in (0, 1, 30, 59, 60, 61, 119):
        reachability.failed(A, unreached("http://10.0.0.1:1: Connection refused"))
    reachability.failed(B, unreached("http://10.0.0.2:1: No route to host"))
    clock.now = 130
    for _ in range(2):
        reachability.reached(A)
    assert lines_of(caplog) == [
        "a server cannot be reached: http://10.0.0.1:1: Connection refused",
        "a server cannot be reached: http://10.0.0.1:1: Connection refused",
        "a server cannot be reached: http://10.0.0.2:1: No route to host",
        "http://10.0.0.1:1 is reachable again after 130 s",
    ]
    reachability.failed(A, unreached("http://10.0.0.1:1: Connection refused"))
    assert len(lines_of(caplog)) == 5


@pytest.mark.parametrize("is_named", [False, True])
def test_a_server_that_is_down_is_named_in_the_log_and_not_to_clients(
    caplog: pytest.LogCaptureFixture, is_named: bool
) -> None:
    with HttpBackend() as backend:
        url = f"http://localhost:{backend.port}" if is_named else backend.url
        shown = f"{backend.url} (localhost)" if is_named else url
        with (
            TransparentProxy(url, resolver=lambda host, port: ["127.0.0.1"]) as proxy,
            contextlib.closing(LocalFront(proxy)) as front,
        ):
            client = McpClient(front).open()
            backend.stop()
            failed = [client.call("tools/call"), McpClient(front).initialize()]
            for answer in failed:
                assert answer.failure == "server-unreachable"
                sentence = "The server cannot be reached: the connection was refused"
                assert answer.error()["message"] == sentence
            assert lines_of(caplog) == [f"a server cannot be reached: {shown}: Connection refused"]
            backend.start()
            McpClient(front).open()
            client.result("tools/call")
            assert len(lines_of(caplog)) == 2
            assert lines_of(caplog)[1].startswith(f"{shown} is reachable again after ")


def test_a_server_whose_certificate_is_refused_is_not_ready_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That it takes connections says nothing of a server with TLS."""
    tls = Certificates(tmp_path).for_anybody()
    with (
        HttpBackend(tls=tls) as backend,
        TransparentProxy(f"https://127.0.0.1:{backend.port}") as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        for _ in range(3):
            eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in (proxy.not_ready_reason() or ""))
            told = McpClient(front).initialize()
            assert told.failure == "server-unreachable"
            assert "certificate or TLS is not acceptable: " in told.error()["message"]
        address = proxy.balancer.candidates()[0]
        assert proxy.reachability.back([address]) == []
        reason = proxy.not_ready_reason()
        assert backend.seen == []
    (line,) = lines_of(caplog)
    start = f"https://127.0.0.1:{backend.port}: [SSL: CERTIFICATE_VERIFY_FAILED] "
    assert line.startswith(f"a server cannot be reached: {start}")
    assert reason is not None
    assert start in reason


def test_a_client_is_told_what_our_own_connect_has_found() -> None:
    with HttpBackend() as backend:
        backend.stop()
        with (
            TransparentProxy(backend.url) as proxy,
            contextlib.closing(LocalFront(proxy)) as front,
        ):
            eventually(proxy.not_ready_reason)
            told = McpClient(front).initialize().error()["message"]
            assert told == "The server cannot be reached: the connection was refused"
            assert backend.seen == []


def test_an_outbound_proxy_that_is_down_is_named_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = ProxyOptions(backend_proxy=f"http://user:secret@127.0.0.1:{port}")
    with (
        TransparentProxy("http://server.invalid", options=options) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        for _ in range(2):
            answer = McpClient(front).initialize()
            assert answer.failure == "server-unreachable"
            assert str(port) not in answer.error()["message"]
    (line,) = lines_of(caplog)
    what = f"the outbound proxy http://127.0.0.1:{port} of http://server.invalid:80"
    assert line == f"a server cannot be reached: {what}: Connection refused"


def test_a_name_that_is_not_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with (
        TransparentProxy("http://server.invalid") as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        assert McpClient(front).initialize().failure == "server-unreachable"
    (line,) = lines_of(caplog)
    # The resolver's words: there is none here, or it knows no such name.
    start = "a server cannot be reached: http://server.invalid:80: "
    assert line.startswith((f"{start}Name or service", f"{start}Temporary failure"))
