"""Messages that nobody answers: what becomes of them when the server, or the store, is away."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mcp_proxy import ProxyOptions, TransparentProxy
from tests.proofs.hell import drip
from tests.servers.http_backend import (
    LOST_400,
    HttpBackend,
    Turn,
    reset,
    silent,
    stream,
    turn_wait,
)
from tests.support.front import Json, McpClient
from tests.support.redis_server import RedisServer
from tests.support.transparent import BOTH, LocalFront, Transparent, transparent
from tests.support.waiting import eventually

INITIALIZED = "notifications/initialized"


class StrictBackend(HttpBackend):
    """Refuses calls of a session until it has been told that it is initialized, as Python's SDK."""

    def reset(self) -> None:
        super().reset()
        self.told: set[str | None] = set()
        self.refuse: Callable[[Turn], None] | None = None
        self.rpc[INITIALIZED] = self._initialized
        self.rpc["tools/call"] = self._call

    def _initialized(self, turn: Turn) -> None:
        if self.refuse is not None:
            self.refuse(turn)
        self.told.add(turn.seen.header("Mcp-Session-Id"))
        turn.reply(202)

    def _call(self, turn: Turn) -> None:
        if turn.seen.header("Mcp-Session-Id") in self.told:
            turn.result({"backend": self.name})
        else:
            turn.error(400, -32602, "Received request before initialization was complete")


@pytest.fixture
def backend() -> Iterator[StrictBackend]:
    with StrictBackend() as backend:
        yield backend


@pytest.fixture(params=BOTH)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def proxy(way: str, backend: HttpBackend, redis_url: str) -> Iterator[Transparent]:
    with transparent(way, backend.url, redis_url, connect_timeout=2) as proxy:
        yield proxy


def begun(client: McpClient) -> McpClient:
    """A client that has got its session, and has sent nothing more."""
    answer = client.initialize()
    assert answer.message()["result"]
    return client


@pytest.mark.parametrize("refuse", [reset, silent], ids=["reset", "silent"])
def test_an_initialized_that_was_lost_is_sent_ahead_of_the_next_message(
    proxy: Transparent, backend: StrictBackend, refuse: Any
) -> None:
    client = begun(proxy.client())
    backend.refuse = refuse
    told = client.notify(INITIALIZED)
    assert told.status == 202
    assert told.failure is not None
    backend.refuse = None
    backend.seen.clear()
    for _ in range(2):
        answer = client.call("tools/call", Authorization="Bearer mine")
        assert answer.message()["result"]["backend"] == "backend"
    assert [seen.rpc for seen in backend.seen] == [INITIALIZED, "tools/call", "tools/call"]
    assert backend.seen[0].header("Authorization") == "Bearer mine"
    assert backend.seen[0].header("MCP-Protocol-Version") == "2025-06-18"
    assert client.session is not None
    assert "unsent" not in proxy.manager.storage.load(client.session).metadata


def test_an_initialized_is_kept_while_the_store_is_away(
    backend: StrictBackend, own_redis: Callable[[], RedisServer]
) -> None:
    server = own_redis()
    with transparent("gunicorn", backend.url, server.url, connect_timeout=1) as proxy:
        client = begun(proxy.client())
        server.pause()
        assert client.notify(INITIALIZED).failure == "store-unavailable"
        server.resume()
        assert client.result("tools/call")["backend"] == "backend"
        assert client.result("tools/call")["backend"] == "backend"
        assert backend.executed[INITIALIZED] == 1


def test_a_session_that_is_initialized_again_was_told(
    proxy: Transparent, backend: StrictBackend
) -> None:
    client = begun(proxy.client())
    backend.refuse = reset
    assert client.notify(INITIALIZED).status == 202
    backend.refuse = None
    backend.stop()
    backend.start()
    for _ in range(2):
        assert client.result("tools/call")["backend"] == "backend"
    new = backend.last.header("Mcp-Session-Id")
    sent = [seen for seen in backend.calls(INITIALIZED) if seen.header("Mcp-Session-Id") == new]
    assert len(sent) == 1


ABOUT_THE_PAST: list[Json | list[Json]] = [
    {"jsonrpc": "2.0", "id": 7, "result": {}},
    {"jsonrpc": "2.0", "id": 7, "error": {"code": 1, "message": "no"}},
    {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
    [{"jsonrpc": "2.0", "id": 7, "result": {}}, {"jsonrpc": "2.0", "id": 8, "result": {}}],
]


@pytest.mark.parametrize("lost", ["404", LOST_400])
@pytest.mark.parametrize("message", ABOUT_THE_PAST, ids=["result", "error", "cancelled", "batch"])
def test_what_concerns_a_lost_server_starts_no_new_one(
    proxy: Transparent, backend: StrictBackend, message: Any, lost: str
) -> None:
    backend.lost = lost
    client = proxy.client().open()
    backend.sessions.clear()
    told = client.post(message)
    assert (told.status, told.failure, told.body()) == (202, "bad-answer", b"")
    assert backend.executed["initialize"] == 1
    assert client.result("tools/call")["backend"] == "backend"


def test_other_notifications_are_tried_as_requests_are(
    proxy: Transparent, backend: StrictBackend
) -> None:
    client = proxy.client().open()
    backend.sessions.clear()
    told = client.notify("notifications/roots/list_changed")
    assert (told.status, told.failure) == (202, None)
    assert backend.executed["initialize"] == 2
    assert backend.executed["notifications/roots/list_changed"] == 1


@pytest.mark.parametrize(
    "message", [*ABOUT_THE_PAST, {"jsonrpc": "2.0", "method": "notifications/x"}]
)
def test_nobody_waits_long_for_what_is_not_answered(backend: StrictBackend, message: Any) -> None:
    options = ProxyOptions(connect_timeout=1)
    with (
        TransparentProxy(backend.url, options=options) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        client = McpClient(front).open()
        backend.on("POST", "/mcp", silent)
        started = time.monotonic()
        told = client.post(message)
        assert (told.status, told.failure) == (202, "server-timeout")
        assert time.monotonic() - started < 4


# --- DELETE --------------------------------------------------------------------------------------


SILENCES: dict[str, Callable[[Turn], None]] = {
    "no head": silent,
    "half a head": drip(b"HTTP/1.1 200 OK\r\nX-Drops: ", b"x"),
    "no body": stream(turn_wait, framing="length", length=9, content_type="text/plain"),
    "half a body": stream(b'{"a":', turn_wait, content_type="application/json"),
}


@pytest.mark.parametrize("act", SILENCES.values(), ids=SILENCES)
def test_a_delete_that_a_server_does_not_answer_ends_the_session_in_time(
    way: str, backend: HttpBackend, redis_url: str, act: Callable[[Turn], None]
) -> None:
    with transparent(way, backend.url, redis_url, connect_timeout=1, request_timeout=15) as proxy:
        client = proxy.client().open()
        backend.on("DELETE", "/mcp", act)
        begun = time.monotonic()
        assert client.delete().status == 204
        assert time.monotonic() - begun < 10
        assert client.session is not None
        assert not proxy.manager.exists(client.session)


def test_a_delete_that_its_client_gives_up_ends_the_session(
    backend: HttpBackend, redis_url: str
) -> None:
    with transparent("gunicorn", backend.url, redis_url, connect_timeout=60) as proxy:
        client = proxy.client().open()
        assert client.session is not None
        backend.on("DELETE", "/mcp", silent)
        assert proxy.process is not None
        host, _, port = proxy.process.base.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as leaving:
            head = f"DELETE /mcp HTTP/1.1\r\nHost: {host}:{port}\r\n"
            leaving.sendall(f"{head}Mcp-Session-Id: {client.session}\r\n\r\n".encode())
            eventually(lambda: backend.last.method == "DELETE")
        session = client.session
        eventually(lambda: not proxy.manager.exists(session))
