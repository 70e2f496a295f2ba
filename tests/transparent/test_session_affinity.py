"""A backend that is lost, and its sessions brought back."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mcp_proxy import LocalStorage, ProxyOptions, RedisStorage, TransparentProxy
from mcp_proxy.replica import Replica
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import CLAIM
from mcp_proxy.transparent.balancing import Balancer
from tests.servers.http_backend import LOST_400, LOST_404, HttpBackend, Turn, reply, reset, stream
from tests.support.front import McpClient
from tests.support.transparent import BOTH, LocalFront, Transparent, transparent
from tests.support.waiting import eventually


@pytest.fixture(scope="module", params=BOTH)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as backend:
        yield backend


@pytest.fixture
def proxy(way: str, backend: HttpBackend, redis_server: Any) -> Iterator[Transparent]:
    with transparent(way, backend.url, redis_server.url, request_timeout=5) as proxy:
        yield proxy
        proxy.leave()


def lose_by_restart(backend: HttpBackend) -> None:
    backend.stop()
    backend.start()


def lose_session_404(backend: HttpBackend) -> None:
    backend.lost = LOST_404
    backend.sessions.clear()


def lose_session_400(backend: HttpBackend) -> None:
    backend.lost = LOST_400
    backend.sessions.clear()


@pytest.mark.parametrize("lose", [lose_by_restart, lose_session_404, lose_session_400])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_lost_session_is_initialized_again(
    proxy: Transparent, backend: HttpBackend, lose: Any, method: str
) -> None:
    client = proxy.client().open()
    session = client.session
    first = backend.calls("initialize")[0]
    client.result("tools/call")
    lose(backend)
    backend.reset()
    if method == "POST":
        answer = client.call(
            "tools/call", Authorization="Bearer current", Accept_Encoding="gzip", Last_Event_ID="7"
        )
        assert answer.message()["result"]["backend"] == "backend"
    else:
        answer = client.listen(Authorization="Bearer current")
    assert answer.status == 200
    again = [
        seen for seen in backend.seen if seen.rpc in ("initialize", "notifications/initialized")
    ]
    assert [seen.rpc for seen in again] == ["initialize", "notifications/initialized"]
    assert again[0].json == first.json
    assert again[0].header("Authorization") == "Bearer current"
    assert not again[0].names & {"mcp-session-id", "accept-encoding", "last-event-id"}
    new = again[1].header("Mcp-Session-Id")
    assert new in backend.sessions
    assert new != session
    assert backend.last.header("Mcp-Session-Id") == new
    assert new not in str(answer.headers)
    assert client.session == session
    client.result("tools/call")
    assert backend.executed["initialize"] == 1
    assert backend.executed["tools/call"] == (2 if method == "POST" else 1)
    assert client.delete().status == 200
    assert backend.ended == {new}
    assert client.call("tools/call").status == 404


def refusal(**fields: Any) -> bytes:
    error = {"code": -32600, "message": "Session not found"}
    return json.dumps({"jsonrpc": "2.0", **fields, "error": error}).encode()


_JSON = "Content-Type: application/json"
# What the TypeScript SDK says where its only transport was made anew.
_NOT_INITIALIZED = (
    b'{"jsonrpc":"2.0","error":{"code":-32000,"message":"Bad Request: Server not initialized"},'
    b'"id":null}'
)
_TEXT = b"Bad Request: No valid session ID provided"


@pytest.mark.parametrize(
    "act",
    [
        reply(404, refusal(id=None), _JSON),
        reply(404, refusal(), _JSON),
        reply(404, refusal(id=1.5), _JSON),
        reply(404, refusal(id=None, padding="x" * 100_000), _JSON),
        stream(refusal(id=None), status=404, content_type="application/json"),
        stream(
            *(
                refusal(id=None, padding="x" * 100_000)[n : n + 5000]
                for n in range(0, 105_000, 5000)
            ),
            status=404,
            content_type="application/json",
        ),
        stream(refusal(), status=404, content_type="application/json", framing="close"),
        reply(400, _TEXT),
        reply(400, _TEXT, "Content-Type: text/plain"),
        reply(404, gzip.compress(refusal(id=None)), _JSON, "Content-Encoding: gzip"),
        reply(404, zlib.compress(refusal(id=None)), _JSON, "Content-Encoding: deflate"),
        reply(400, gzip.compress(_TEXT), "Content-Type: text/plain", "Content-Encoding: gzip"),
        reply(400, _NOT_INITIALIZED, _JSON),
        reply(404, b"session not found\n", "Content-Type: text/plain; charset=utf-8"),
    ],
    ids=[
        *("null", "none", "float", "long", "chunked", "long-chunked", "close", "bare", "text"),
        *("gzip", "deflate", "gzip-text", "not-initialized", "go"),
    ],
)
def test_a_lost_session_is_understood_in_every_form(
    proxy: Transparent, backend: HttpBackend, act: Any
) -> None:
    client = proxy.client().open()
    session = client.session
    known = set(backend.sessions)

    def lost_once(turn: Turn) -> None:
        if turn.seen.header("Mcp-Session-Id") in known:
            act(turn)
        else:
            turn.result({"backend": "backend"})

    backend.rpc["tools/call"] = lost_once
    assert client.result("tools/call")["backend"] == "backend"
    assert client.session == session
    assert backend.executed["initialize"] == 2


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_refusal_too_long_to_be_read_passes_whole(
    proxy: Transparent, backend: HttpBackend, framing: str
) -> None:
    client = proxy.client().open()
    body = refusal(id=None, padding="x" * 1_500_000)
    pieces = [body[n : n + 60_000] for n in range(0, len(body), 60_000)]
    backend.rpc["x"] = stream(
        *pieces, status=404, content_type="application/json", framing=framing, length=len(body)
    )
    answer = client.call("x")
    assert (answer.status, answer.body()) == (404, body)
    assert backend.executed["initialize"] == 1


def test_a_refused_connection_is_another_target(way: str, redis_url: str) -> None:
    with (
        HttpBackend(name="one") as one,
        HttpBackend(name="two") as two,
        transparent(way, [one.url, two.url], redis_url) as proxy,
    ):
        clients = [proxy.client().open() for _ in range(4)]
        one.stop()
        for client in clients:
            for _ in range(2):
                assert client.result("tools/call")["backend"] == "two"
        assert two.executed["tools/call"] == 8
        assert two.executed["initialize"] == 4


def test_a_reset_is_an_error_and_the_next_request_works(
    proxy: Transparent, backend: HttpBackend
) -> None:
    client = proxy.client().open()
    backend.rpc["crash"] = reset
    answer = client.call("crash", key="k")
    assert (answer.status, answer.failure) == (200, "server-unreachable")
    message = answer.message()
    assert (message["id"], message["error"]["code"]) == ("k", -32000)
    client.result("tools/call")
    assert backend.executed["crash"] == 1
    assert backend.executed["tools/call"] == 1
    assert backend.executed["initialize"] == 1  # the backend lives, and so does the session


def test_an_answer_that_breaks_off_is_not_repeated(
    proxy: Transparent, backend: HttpBackend
) -> None:
    from tests.servers.http_backend import Feed

    client = proxy.client().open()
    feed = Feed()
    backend.rpc["half"] = stream(b"data: {}\n\n", feed)
    answer = client.call("half")
    feed.put(Feed.BREAK)
    assert answer.error()["code"] == -32000
    assert backend.executed["half"] == 1
    assert backend.executed["initialize"] == 1


_BOMB = gzip.compress(refusal(id=None, padding="x" * 50_000_000))


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (_BOMB, "gzip"),
        (b"not session", "gzip"),
        (gzip.compress(refusal(id=None))[:-9], "gzip"),
        (refusal(id=None), "br"),
    ],
    ids=["bomb", "garbage", "cut", "unknown"],
)
def test_a_compressed_refusal_that_cannot_be_read_passes_untouched(
    proxy: Transparent, backend: HttpBackend, body: bytes, coding: str
) -> None:
    client = proxy.client().open()
    backend.rpc["x"] = reply(404, body, _JSON, f"Content-Encoding: {coding}")
    answer = client.call("x")
    assert (answer.status, answer.body()) == (404, body)
    assert answer.headers["Content-Encoding"] == coding
    assert backend.executed["initialize"] == 1


@pytest.mark.parametrize("status", [404, 400])
@pytest.mark.parametrize(
    "body",
    [
        b"<html>no such page</html>",
        b'{"error":"not_found"}',
        b'{"jsonrpc":"2.0","id":1,"error":{"code":-32601,"message":"Method not found"}}',
        b'{"jsonrpc":"2.0","id":1,"result":{"session":1}}',
        b"",
    ],
)
def test_other_refusals_are_no_lost_session(
    proxy: Transparent, backend: HttpBackend, status: int, body: bytes
) -> None:
    client = proxy.client().open()
    backend.rpc["x"] = reply(status, body, "Content-Type: application/json")
    answer = client.call("x")
    assert (answer.status, answer.body()) == (status, body)
    assert backend.executed["initialize"] == 1


def test_a_session_that_stays_lost_is_not_tried_for_ever(
    proxy: Transparent, backend: HttpBackend
) -> None:
    client = proxy.client().open()
    backend.rpc["x"] = lambda turn: turn.error(404, -32001, "Session not found")
    assert client.call("x").status == 404
    assert backend.executed["initialize"] == 2
    assert client.call("tools/call").status == 404  # the client begins anew


def test_a_backend_that_cannot_be_had_is_an_error_and_the_session_stays(
    proxy: Transparent, backend: HttpBackend
) -> None:
    client = proxy.client().open()
    backend.stop()
    for _ in range(2):
        answer = client.call("tools/call", key=5)
        assert (answer.status, answer.failure) == (200, "server-unreachable")
        assert answer.message()["id"] == 5
    backend.start()
    assert client.result("tools/call")["backend"] == "backend"


@pytest.mark.parametrize(
    "refusal",
    [
        reply(401, b"{}", _JSON),
        lambda turn: turn.error(400, -32602, "clientInfo is missing"),
    ],
    ids=["401", "params"],
)
def test_a_backend_that_refuses_the_handshake_gave_a_bad_answer(
    proxy: Transparent, backend: HttpBackend, refusal: Any
) -> None:
    client = proxy.client().open()
    backend.sessions.clear()
    backend.rpc["initialize"] = refusal
    assert client.call("tools/call").failure == "bad-answer"
    del backend.rpc["initialize"]
    client.result("tools/call")


@pytest.mark.parametrize(
    ("version", "sid"), [("2025\r\nX: y", "s"), ("\u2603", "s"), ("1", "\x01")]
)
def test_a_handshake_whose_answer_cannot_be_sent_back_is_a_bad_answer(
    proxy: Transparent, backend: HttpBackend, version: str, sid: str
) -> None:
    client = proxy.client().open()
    backend.sessions.clear()
    backend.rpc["initialize"] = lambda turn: turn.result(
        {"protocolVersion": version}, f"Mcp-Session-Id: {sid}"
    )
    assert client.call("tools/call").failure == "bad-answer"
    del backend.rpc["initialize"]
    client.result("tools/call")


def test_another_version_is_another_session(proxy: Transparent, backend: HttpBackend) -> None:
    client = proxy.client().open("2025-06-18")
    backend.sessions.clear()

    def older(turn: Turn) -> None:
        turn.result({"protocolVersion": "2025-03-26"}, *backend.new_session())

    backend.rpc["initialize"] = older
    assert client.call("tools/call").status == 404
    assert client.call("tools/call").status == 404
    assert backend.executed["tools/call"] == 0


def test_a_handshake_answered_by_a_stream(proxy: Transparent, backend: HttpBackend) -> None:
    client = proxy.client().open()
    backend.sessions.clear()
    answer = {"jsonrpc": "2.0", "id": 0, "result": {"protocolVersion": "2025-06-18"}}
    event = b"data: " + json.dumps(answer).encode() + b"\n\n"

    def act(turn: Turn) -> None:
        stream(b": x\n\n", event, headers=tuple(backend.new_session()))(turn)

    backend.rpc["initialize"] = act
    client.result("tools/call")


def test_a_delete_never_initializes(proxy: Transparent, backend: HttpBackend) -> None:
    client = proxy.client().open()
    lose_session_404(backend)
    assert client.delete().status == 404
    other = proxy.client().open()
    lose_by_restart(backend)
    assert other.delete().status in (204, 404)
    assert backend.executed["initialize"] == 2
    assert client.call("tools/call").status == 404
    assert other.call("tools/call").status == 404


def test_a_handshake_too_long_to_keep_cannot_be_repeated(
    proxy: Transparent, backend: HttpBackend
) -> None:
    client = proxy.client()
    params = {"protocolVersion": "2025-06-18", "capabilities": {"x": "y" * 70_000}}
    body = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
    client.session = client.post(body).headers["Mcp-Session-Id"]
    client.result("tools/call")
    lose_session_404(backend)
    assert client.call("tools/call").status == 404
    assert client.call("tools/call").error()["code"] == -32001
    assert backend.executed["initialize"] == 1


def test_a_record_of_somebody_else_without_handshake_is_404(
    proxy: Transparent, backend: HttpBackend
) -> None:
    client = proxy.in_record(backend_url=backend.url)
    assert client.call("tools/call").status == 404


# --- two replicas --------------------------------------------------------------------------------


@pytest.fixture(params=["local", "redis"])
def storage(request: pytest.FixtureRequest, redis_server: Any) -> Iterator[Storage]:
    if request.param == "local":
        yield LocalStorage()
    else:
        with contextlib.closing(
            RedisStorage(redis_server.url, prefix=f"test-{uuid.uuid4().hex}:")
        ) as made:
            yield made


@pytest.fixture
def fronts(storage: Storage, backend: HttpBackend) -> Iterator[list[LocalFront]]:
    replicas = [TransparentProxy(backend.url, storage, name="server") for _ in range(2)]
    fronts = [LocalFront(replica) for replica in replicas]
    yield fronts
    for front, replica in zip(fronts, replicas, strict=True):
        front.close()
        replica.close()


def in_session(front: LocalFront, client: McpClient) -> McpClient:
    same = McpClient(front)
    same.session = client.session
    return same


@pytest.mark.parametrize("lose", [lose_by_restart, lose_session_404])
def test_replicas_that_notice_at_once_initialize_once(
    fronts: list[LocalFront], backend: HttpBackend, lose: Any
) -> None:
    def slowly(turn: Turn) -> None:
        threading.Event().wait(0.3)
        backend.initialize(turn)

    client = McpClient(fronts[0]).open()
    lose(backend)
    backend.reset()
    backend.rpc["initialize"] = slowly
    barrier = threading.Barrier(8)

    def call(number: int) -> str:
        one = in_session(fronts[number % 2], client)
        barrier.wait(10)
        return str(one.result("tools/call")["backend"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(8))) == ["backend"] * 8
    assert backend.executed["initialize"] == 1
    assert backend.executed["notifications/initialized"] == 1
    assert backend.executed["tools/call"] == 8


def test_refused_connections_noticed_at_once_initialize_once(
    storage: Storage, fronts: list[LocalFront], backend: HttpBackend
) -> None:
    with HttpBackend(name="new") as new:

        def slowly(turn: Turn) -> None:
            threading.Event().wait(0.3)
            new.initialize(turn)

        client = McpClient(fronts[0]).open()
        backend.stop()
        new.rpc["initialize"] = slowly
        urls = [backend.url, new.url]
        replicas = [TransparentProxy(urls, storage, name="server") for _ in range(2)]
        others = [LocalFront(replica) for replica in replicas]
        with ThreadPoolExecutor(6) as pool:
            calls = [
                pool.submit(in_session(others[n % 2], client).result, "tools/call")
                for n in range(6)
            ]
            assert [call.result(20)["backend"] for call in calls] == ["new"] * 6
        assert new.executed["initialize"] == 1
        for front, replica in zip(others, replicas, strict=True):
            front.close()
            replica.close()


def test_a_delete_during_the_handshake_wins(fronts: list[LocalFront], backend: HttpBackend) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slowly(turn: Turn) -> None:
        entered.set()
        go_on.wait(10)
        backend.initialize(turn)

    client = McpClient(fronts[0]).open()
    lose_session_404(backend)
    backend.rpc["initialize"] = slowly
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: in_session(fronts[0], client).call("tools/call").status)
        assert entered.wait(10)
        assert in_session(fronts[1], client).delete().status in (204, 404)
        go_on.set()
        assert call.result(10) == 404
    assert backend.executed["tools/call"] == 0
    eventually(lambda: not backend.sessions)
    assert len(backend.ended) == 1
    assert in_session(fronts[1], client).call("tools/call").status == 404


def test_who_was_thought_dead_finds_the_session_of_the_successor(
    fronts: list[LocalFront],
    backend: HttpBackend,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mcp_proxy.sessions import claims

    entered, go_on = threading.Event(), threading.Event()

    def slowly(turn: Turn) -> None:
        if not entered.is_set():
            entered.set()
            go_on.wait(10)
        backend.initialize(turn)

    client = McpClient(fronts[0]).open()
    lose_session_404(backend)
    backend.reset()
    backend.rpc["initialize"] = slowly
    monkeypatch.setattr(claims, "CLAIM_TIME", 0.1)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: in_session(fronts[0], client).result("tools/call")["backend"])
        assert entered.wait(10)
        threading.Event().wait(0.2)
        assert in_session(fronts[1], client).result("tools/call")["backend"] == "backend"
        go_on.set()
        assert call.result(10) == "backend"
    assert len(backend.sessions) == 1  # what the slow one had made was ended
    assert backend.executed["tools/call"] == 2


def test_nobody_waits_for_a_claimant_whose_process_has_ended(
    fronts: list[LocalFront], backend: HttpBackend, storage: Storage
) -> None:
    client = McpClient(fronts[0]).open()
    assert client.session is not None
    scoped = fronts[0].app.manager.storage
    record = scoped.load(client.session)
    own = Replica().id.split("-")
    ended = "-".join([*own[:-2], "1", own[-1]])  # this process, but of another start
    mark = f"4000000000.000 0123456789abcdef {ended}"
    assert scoped.swap(record, record.with_metadata(**{CLAIM: mark}))
    lose_session_404(backend)
    began = time.monotonic()
    assert client.result("tools/call")["backend"] == "backend"
    assert time.monotonic() - began < 5
    assert CLAIM not in scoped.load(client.session).metadata


def test_a_claim_of_somebody_else_is_waited_for_within_the_time_limit(backend: HttpBackend) -> None:
    with (
        TransparentProxy(backend.url, options=ProxyOptions(request_timeout=1)) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        client = McpClient(front).open()
        assert client.session is not None
        record = proxy.manager.load(client.session)
        mark = "4000000000.000 0123456789abcdef another-host-0-0"
        assert proxy.manager.swap(record, record.with_metadata(**{CLAIM: mark}))
        lose_session_404(backend)
        began = time.monotonic()
        assert client.call("tools/call").failure == "server-timeout"
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("body", ["no JSON", "[]", '{"jsonrpc":"2.0","method":"initialize"}', None])
def test_a_session_whose_initialize_cannot_be_read_is_over(
    fronts: list[LocalFront], backend: HttpBackend, body: str | None
) -> None:
    client = McpClient(fronts[0]).open()
    assert client.session is not None
    scoped = fronts[0].app.manager.storage
    record = scoped.load(client.session)
    assert scoped.swap(record, record.with_metadata(init_body=body))
    lose_session_404(backend)
    assert client.call("tools/call").status == 404
    assert not scoped.exists(client.session)


def test_a_claim_names_its_claimant_and_is_given_back_after_any_failure(
    fronts: list[LocalFront], backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = McpClient(fronts[0]).open()
    assert client.session is not None
    scoped = fronts[0].app.manager.storage
    seen = []

    def fail(self: Balancer, *given: object) -> None:
        assert client.session is not None
        seen.append(scoped.load(client.session).metadata[CLAIM].split()[2])
        raise RuntimeError("unforeseen")

    lose_session_404(backend)
    with monkeypatch.context() as patch:
        patch.setattr(Balancer, "first_reached", fail)
        assert client.call("tools/call").failure == "internal-error"
    assert len(seen) == 1
    assert str(os.getpid()) in seen[0].split("-")
    assert CLAIM not in scoped.load(client.session).metadata
    assert client.result("tools/call")["backend"] == "backend"
