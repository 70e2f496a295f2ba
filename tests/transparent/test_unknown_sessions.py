"""Sessions that have no record any more, and `unknown_session_status=ask`."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcp_proxy import ConfigError, ProxyOptions, SSEProxy, StreamableProxy, TransparentProxy
from mcp_proxy.config import ProxyConfig
from tests.servers.http_backend import LOST_400, HttpBackend, Turn, reply
from tests.support.front import McpClient
from tests.support.transparent import BOTH, LocalFront, Transparent, transparent
from tests.support.waiting import eventually
from tests.transparent.test_forwarding import leaving

ASK = ProxyOptions(unknown_session_status="ask")


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as backend:
        yield backend


@pytest.fixture(params=BOTH)
def proxy(
    request: pytest.FixtureRequest, backend: HttpBackend, redis_url: str
) -> Iterator[Transparent]:
    with transparent(request.param, backend.url, redis_url, unknown_session_status="ask") as proxy:
        yield proxy


@pytest.fixture
def embedded(backend: HttpBackend) -> Iterator[TransparentProxy]:
    with TransparentProxy(backend.url, options=ASK) as proxy:
        yield proxy


@pytest.fixture
def front(embedded: TransparentProxy) -> Iterator[LocalFront]:
    with contextlib.closing(LocalFront(embedded)) as front:
        yield front


def left_over(backend: HttpBackend, client: McpClient) -> McpClient:
    """A client whose session the backend knows, and the proxy does not."""
    client.session = f"old-{uuid.uuid4().hex}"
    backend.sessions.add(client.session)
    return client


def test_a_session_that_the_server_knows_is_taken_up(
    proxy: Transparent, backend: HttpBackend
) -> None:
    client = left_over(backend, proxy.client())
    assert client.session is not None
    for _ in range(2):
        answer = client.call(
            "tools/call", Authorization="Bearer mine", MCP_Protocol_Version="2025-06-18"
        )
        assert answer.message()["result"]["backend"] == "backend"
    asked, tried, *calls = backend.seen
    assert asked.rpc == tried.rpc == "ping"
    assert asked.header("Mcp-Session-Id") == client.session
    assert asked.header("Authorization") == "Bearer mine"
    assert asked.header("MCP-Protocol-Version") == "2025-06-18"
    assert tried.header("Mcp-Session-Id") not in backend.sessions
    assert [seen.rpc for seen in calls] == ["tools/call"] * 2
    record = proxy.manager.storage.load(client.session)
    assert (record.type, record.backend_url) == ("mcp", backend.url)
    assert record.metadata["protocol_version"] == "2025-06-18"
    assert "init_body" not in record.metadata


def test_a_stream_is_taken_up_too(proxy: Transparent, backend: HttpBackend) -> None:
    stream = left_over(backend, proxy.client()).listen()
    assert (stream.status, stream.is_stream) == (200, True)
    stream.close()


@pytest.mark.parametrize("lost", ["404", LOST_400])
def test_what_no_server_knows_is_404_and_not_asked_for_again(
    proxy: Transparent, backend: HttpBackend, lost: str
) -> None:
    backend.lost = lost
    client = proxy.client()
    client.session = "nobody-knows"
    for _ in range(3):
        answer = client.call("tools/call", key=5)
        assert answer.status == 404
        assert "id" not in answer.message()
    assert [seen.rpc for seen in backend.seen] == ["ping"]


def test_messages_that_are_no_requests_ask_nobody(proxy: Transparent, backend: HttpBackend) -> None:
    client = left_over(backend, proxy.client())
    assert client.notify("notifications/cancelled", {"requestId": 1}).status == 400
    assert client.post({"jsonrpc": "2.0", "id": 1, "result": {}}).status == 400
    assert client.delete().status == 400
    client.session = f"mcp-01234567-{'0' * 32}"  # of our own form: it has ended
    assert client.call("tools/call").status == 404
    assert backend.seen == []


def test_a_server_that_takes_every_id_is_left_alone(
    proxy: Transparent, backend: HttpBackend
) -> None:
    backend.issues_sessions = False
    for number in range(15):  # more than ten a second: nothing is asked
        client = proxy.client()
        client.session = f"any-{number}"
        assert client.result("tools/call")["backend"] == "backend"
        assert not proxy.manager.exists(client.session)
    assert backend.executed["ping"] == 2
    assert backend.last.header("Mcp-Session-Id") == "any-14"


def test_the_clients_own_trouble_with_the_server_is_its_own(
    proxy: Transparent, backend: HttpBackend
) -> None:
    backend.on("POST", "/mcp", reply(401, b"who are you", "WWW-Authenticate: Bearer"))
    client = left_over(backend, proxy.client())
    answer = client.call("tools/call")
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_server_that_cannot_be_asked_has_not_forgotten(
    proxy: Transparent, backend: HttpBackend
) -> None:
    client = left_over(backend, proxy.client())
    known = set(backend.sessions)
    backend.stop()
    assert client.call("tools/call").failure == "server-unreachable"
    backend.start()
    backend.sessions = known
    assert client.result("tools/call")["backend"] == "backend"


def test_each_target_is_asked() -> None:
    with (
        HttpBackend(name="one") as one,
        HttpBackend(name="two") as two,
        TransparentProxy([one.url, two.url], options=ASK) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        for backend in (one, two):
            client = left_over(backend, McpClient(front))
            for _ in range(2):
                assert client.result("tools/call")["backend"] == backend.name


def test_ten_ids_a_second_are_asked_for(front: LocalFront, backend: HttpBackend) -> None:
    clients = [left_over(backend, McpClient(front)) for _ in range(15)]
    failures = [client.call("tools/call").failure for client in clients]
    assert "overloaded" in failures or backend.executed["ping"] >= 15
    for client in clients:  # nothing is lost
        eventually(lambda client=client: client.call("tools/call").failure is None)


def test_one_question_at_a_time_for_an_id(front: LocalFront, backend: HttpBackend) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(turn: Turn) -> None:
        begun.set()
        go_on.wait(10)
        turn.result({})

    backend.rpc["ping"] = slowly
    client = left_over(backend, McpClient(front))
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(client.at(front).result, "tools/call") for _ in range(4)]
        assert begun.wait(10)
        go_on.set()
        assert [call.result(20)["backend"] for call in calls] == ["backend"] * 4
    assert backend.executed["ping"] == 1  # the one with an id of our own was refused
    assert [seen.rpc for seen in backend.seen].count("ping") == 2


def test_who_waits_for_the_question_of_another_and_leaves_frees_its_thread(
    backend: HttpBackend, redis_url: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(turn: Turn) -> None:
        begun.set()
        go_on.wait(30)
        turn.result({})

    backend.rpc["ping"] = slowly
    ask = {"unknown_session_status": "ask"}
    with (
        transparent("gunicorn", backend.url, redis_url, **ask) as proxy,
        ThreadPoolExecutor(1) as pool,
    ):
        assert proxy.process is not None
        client = left_over(backend, proxy.client())
        asking = pool.submit(client.result, "tools/call")
        try:
            assert begun.wait(10)
            leaving(
                proxy.process.base, b'{"jsonrpc":"2.0","id":9,"method":"x"}', client.session or ""
            )
            log = proxy.process.log
            eventually(lambda: " POST /mcp x -> 499 " in log(), 8)
            assert not asking.done()
        finally:
            go_on.set()
        assert asking.result(20)["backend"] == "backend"


def test_a_session_without_its_handshake_cannot_be_brought_back(
    front: LocalFront, backend: HttpBackend
) -> None:
    client = left_over(backend, McpClient(front))
    client.result("tools/call")
    backend.sessions.clear()
    assert client.call("tools/call").status == 404


def test_ask_is_refused_where_there_is_nobody_to_ask() -> None:
    with pytest.raises(ConfigError, match="asks HTTP servers"):
        ProxyConfig(command=("cat",), unknown_session_status="ask").servers()
    for kind in (StreamableProxy, SSEProxy):
        with pytest.raises(ConfigError, match="for HTTP servers"):
            kind("cat", options=ASK)


def test_without_ask_the_log_names_it_once_a_minute(
    backend: HttpBackend, caplog: pytest.LogCaptureFixture
) -> None:
    for status, lines in ((400, 1), (404, 0)):
        caplog.clear()
        options = ProxyOptions(unknown_session_status=status)
        with (
            TransparentProxy(backend.url, options=options) as proxy,
            contextlib.closing(LocalFront(proxy)) as front,
        ):
            client = left_over(backend, McpClient(front))
            assert [client.call("tools/call").status for _ in range(3)] == [status] * 3
        found = [line for line in caplog.messages if "unknown_session_status=ask" in line]
        assert len(found) == lines
    assert backend.seen == []
