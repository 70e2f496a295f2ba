"""HTTP+SSE in front of a stdio server: one replica, real gunicorn, posts that land elsewhere."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy import LocalStorage, RedisStorage, SSEProxy, StreamableProxy, create_app
from mcp_proxy.ownership.owner import Owner
from tests.support.front import SCRIPTED, McpClient, RotatingFront, WsgiFront
from tests.support.proxies import (
    GunicornProxy,
    Replicas,
    WsgiProxy,
    configured,
    replicas,
    running,
)
from tests.support.proxy_process import is_alive
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.threads import run_together
from tests.support.waiting import eventually

Proxy = WsgiProxy | GunicornProxy | Replicas

BOTH = ["wsgi", "gunicorn"]
QUICK: dict[str, Any] = {"keepalive_interval": 0.2}
NOTE = "notifications/message"


@pytest.fixture(scope="module", params=[*BOTH, "local replicas", "redis replicas"])
def proxy(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Proxy]:
    """One replica in each way, and several, where no message lands on the replica of the stream."""
    store: dict[str, Any] = {
        "redis_url": redis_server.url,
        "redis_prefix": f"test-{uuid.uuid4().hex}:",
    }
    if request.param == "local replicas":
        with replicas(3, kind=SSEProxy, **QUICK) as several:
            yield several
    elif request.param == "redis replicas":
        with replicas(2, kind=SSEProxy, **store, **QUICK) as several:
            yield several
    else:
        with running(request.param, **QUICK) as proxy:
            yield proxy


def client_of(proxy: Proxy) -> SseClient:
    """A client without a session."""
    if isinstance(proxy, Replicas):
        first, *others = (replica.front for replica in proxy.each)
        return SseClient(first, RotatingFront(others))
    return SseClient(proxy.client().front)


@pytest.fixture
def client(proxy: Proxy) -> Iterator[SseClient]:
    client = client_of(proxy).open()
    yield client
    client.close()


def methods(client: SseClient) -> list[str]:
    """The methods that have reached the server."""
    return [message["method"] for message in client.seen() if "method" in message]


def processes(proxy: Proxy) -> int:
    """How many servers run."""
    if isinstance(proxy, Replicas):
        return sum(replica.children for replica in proxy.each)
    if isinstance(proxy, WsgiProxy):
        return proxy.app.parts.supervisor.children
    return len(proxy.process.server_pids())


# --- the stream ----------------------------------------------------------------------------------


def test_the_stream_begins_with_the_uri_for_messages(proxy: Proxy) -> None:
    client = client_of(proxy)
    answer = client.connect()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert "no-cache" in answer.headers["Cache-Control"]
    assert "Content-Length" not in answer.headers
    assert client.uri.startswith("/messages?session_id=mcp-")
    client.close()


def test_every_message_of_the_server_is_a_message_event(client: SseClient) -> None:
    key = client.call("notify", {"count": 2})
    events = [next(client.events()) for _ in range(3)]
    assert {event.event for event in events} == {b"message"}
    first, second, answer = (json.loads(event.data or b"") for event in events)
    assert [first["params"]["number"], second["params"]["number"]] == [0, 1]
    assert answer == {"jsonrpc": "2.0", "id": key, "result": {}}


def test_a_silent_stream_sends_keepalives(client: SseClient) -> None:
    assert client.stream is not None
    pieces = client.stream.pieces
    assert next(pieces) == b": keepalive\n\n"
    assert next(pieces) == b": keepalive\n\n"


def test_what_the_server_says_unasked_comes_at_once(client: SseClient) -> None:
    client.result("later", {"message": {"method": NOTE, "params": {"n": 1}}})
    assert client.next()["params"] == {"n": 1}


@pytest.mark.parametrize("accept", ["", "*/*", "text/*", "text/event-stream, application/json"])
def test_a_stream_is_served_unless_accept_forbids_it(proxy: Proxy, accept: str) -> None:
    client = client_of(proxy)
    assert client.connect(Accept=accept).status == 200
    client.close()


def test_accept_without_event_streams_is_a_406(proxy: Proxy) -> None:
    assert client_of(proxy).connect(Accept="application/json").status == 406


# --- where messages go ---------------------------------------------------------------------------

PREFIX = {"X_Forwarded_Prefix": "/public/"}


@pytest.mark.parametrize(
    ("mount", "trusted", "headers", "path"),
    [
        ("", (), {}, "/messages"),
        ("/tools", (), {}, "/tools/messages"),
        ("/a b/ü", (), {}, "/a%20b/%C3%BC/messages"),
        ("", (), PREFIX, "/messages"),
        ("/tools", (), PREFIX, "/tools/messages"),
        ("", ("10.0.0.1",), PREFIX, "/messages"),
        ("", ("*",), PREFIX, "/public/messages"),
        ("/tools", ("*",), PREFIX, "/public/tools/messages"),
        ("", ("*",), {"X_Forwarded_Prefix": "/"}, "/messages"),
        ("", ("*",), {"X_Forwarded_Prefix": "//evil.example"}, "/messages"),
        ("", ("*",), {"X_Forwarded_Prefix": "http://evil.example/"}, "/messages"),
        ("", ("*",), {"X_Forwarded_Prefix": "/a?b#c"}, "/messages"),
    ],
)
def test_the_uri_honours_the_mount_and_who_is_trusted(
    mount: str, trusted: tuple[str, ...], headers: dict[str, str], path: str
) -> None:
    with running("wsgi", trusted_proxies=trusted) as proxy:
        assert isinstance(proxy, WsgiProxy)
        as_wsgi_has_it = mount.encode().decode("latin-1")
        app = DispatcherMiddleware(NotFound(), {as_wsgi_has_it: proxy.app}) if mount else proxy.app
        client = SseClient(WsgiFront(app), path=f"{mount}/sse")
        client.connect(**headers)
        assert client.uri.partition("?")[0] == path
        client.uri = client.uri.removeprefix("/public")  # as the proxy in front would
        client.initialize()
        client.close()


def test_the_header_of_a_trusted_peer_counts_in_gunicorn() -> None:
    with running("gunicorn", trusted_proxies="127.0.0.1") as proxy:
        client = client_of(proxy)
        client.connect(X_Forwarded_Prefix="/public")
        assert client.uri.startswith("/public/messages?")
        client.close()


def test_both_spellings_of_the_parameter_are_understood(client: SseClient) -> None:
    session = client.session
    for name in ("session_id", "sessionId", "session_id=&sessionId"):
        client.uri = f"/messages?x=1&{name}={session}"
        client.call("echo", {"a": 1}, key="k")
        assert client.answer("k")["result"] == {"a": 1}


def test_a_slash_at_the_end_changes_nothing(proxy: Proxy) -> None:
    client = client_of(proxy)
    client.path = "/sse/"
    client.connect()
    client.uri = client.uri.replace("/messages", "/messages/")
    client.call("echo", key=1)
    assert client.answer(1)["result"] == {}
    client.close()


# --- messages of the client ----------------------------------------------------------------------


def test_the_answer_carries_the_id_as_it_came(client: SseClient) -> None:
    for key in (0, "", "1", 1, 2**60, 2**53 + 1, "a\nb", "ü"):
        client.call("echo", {"x": 1}, key)
        assert client.answer(key)["result"] == {"x": 1}
    assert client.heard == []


def test_two_calls_under_one_id_each_get_their_answer(client: SseClient) -> None:
    for token in (1, 2):
        client.call("sleep", {"seconds": 0.1, "token": token}, key=1)
    assert {client.answer(1)["result"]["token"] for _ in range(2)} == {1, 2}


def test_notifications_reach_the_server_in_order(client: SseClient) -> None:
    for number in range(20):
        answer = client.notify(f"notifications/x{number}")
        assert (answer.status, answer.body()) == (202, b"")
        assert answer.headers["Content-Length"] == "0"
    assert methods(client)[2:22] == [f"notifications/x{number}" for number in range(20)]


def test_progress_comes_under_the_token_of_its_call(client: SseClient) -> None:
    for number in range(2):
        meta = {"progressToken": "t"}
        client.call("progress", {"_meta": meta, "seconds": 0.1, "for": number}, key="same")
    messages = [client.next() for _ in range(4)]
    told = [m["params"]["progressToken"] for m in messages if "params" in m]
    assert told == ["t", "t"]
    assert {m["result"]["for"] for m in messages if "result" in m} == {0, 1}


def test_large_messages_pass_both_ways(client: SseClient) -> None:
    text = "".join(map(chr, range(32, 127))) * 30_000  # 2.8 MB
    assert client.result("echo", {"text": text}) == {"text": text}
    assert len(client.result("big", {"size": 9_000_000})["text"]) == 9_000_000


def test_an_error_of_the_server_passes(client: SseClient) -> None:
    key = client.call("fail", {"code": -32002, "message": "no", "data": {"k": [1]}})
    assert client.answer(key)["error"] == {"code": -32002, "message": "no", "data": {"k": [1]}}


def test_equal_ids_of_several_sessions_never_cross(proxy: Proxy) -> None:
    clients = [client_of(proxy).open() for _ in range(6)]

    def talk(number: int) -> set[tuple[Any, ...]]:
        client = clients[number]
        keys = [1, "1", 2, 0]
        for key in keys:
            client.call("sleep", {"seconds": 0.02 * (6 - number), "token": [number, key]}, key)
        answers = [client.next() for _ in keys]
        return {(number, a["id"], *a["result"]["token"]) for a in answers}

    for number, found in enumerate(run_together([partial(talk, number) for number in range(6)])):
        assert found == {(number, key, number, key) for key in (1, "1", 2, 0)}
    assert len({client.result("count")["pid"] for client in clients}) == 6
    for client in clients:
        client.close()


# --- requests of the server ----------------------------------------------------------------------


def test_sampling_is_answered_by_a_post_wherever_it_lands(client: SseClient) -> None:
    key = client.call("ask", {"method": "sampling/createMessage", "params": {"maxTokens": 1}})
    asked = client.next()
    assert asked["method"] == "sampling/createMessage"
    reply = {"jsonrpc": "2.0", "id": asked["id"], "result": {"role": "assistant"}}
    answer = client.post(reply)
    assert (answer.status, answer.body()) == (202, b"")
    assert client.answer(key)["result"]["result"] == {"role": "assistant"}
    assert client.post(reply).status == 202  # nobody waits for a second one
    assert sum(message.get("id") == asked["id"] for message in client.seen()) == 1


def test_an_answer_that_nobody_waits_for_does_not_reach_the_server(client: SseClient) -> None:
    assert client.post({"jsonrpc": "2.0", "id": "stray", "result": {}}).status == 202
    assert all(message.get("id") != "stray" for message in client.seen())


# --- cancellation and time limits ----------------------------------------------------------------


def test_a_cancellation_reaches_the_server_under_its_own_id(client: SseClient) -> None:
    client.call("silence", key="mine")
    client.notify("notifications/cancelled", {"requestId": "mine", "reason": "enough"})
    (silence,) = [m for m in client.seen() if m.get("method") == "silence"]
    (cancelled,) = [m for m in client.seen() if m.get("method") == "notifications/cancelled"]
    assert cancelled["params"] == {"requestId": silence["id"], "reason": "enough"}
    assert client.heard == []  # a cancelled call needs no answer on this wire


def test_a_call_that_was_cancelled_is_over() -> None:
    with running("wsgi", request_timeout=1) as proxy:
        client = client_of(proxy).open()
        client.call("silence", key="mine")
        client.notify("notifications/cancelled", {"requestId": "mine"})
        client.result("sleep", {"seconds": 0.9})
        client.result("sleep", {"seconds": 0.3})
        assert client.heard == []  # no error for it, long after
        assert methods(client).count("notifications/cancelled") == 1
        client.close()


def test_a_cancellation_of_nothing_stays_here(client: SseClient) -> None:
    assert client.notify("notifications/cancelled", {"requestId": 999}).status == 202
    assert "notifications/cancelled" not in methods(client)


@pytest.mark.parametrize("way", [*BOTH, "replicas"])
def test_a_call_without_an_answer_in_time_is_an_error_on_the_stream(way: str) -> None:
    limit: dict[str, Any] = {"request_timeout": 2}
    with replicas(2, kind=SSEProxy, **limit) if way == "replicas" else running(way, **limit) as up:
        client = client_of(up).open()
        client.call("silence", key="late")
        client.call("silence", key="later")
        for key in ("late", "later"):
            error = client.answer(key)["error"]
            assert error["code"] == -32000
            assert error["message"] == "The server did not answer within 2 seconds"
        assert methods(client).count("notifications/cancelled") == 2
        client.close()


# --- the end of a session ------------------------------------------------------------------------


def test_the_end_of_the_stream_is_the_end_of_everything(proxy: Proxy) -> None:
    client = client_of(proxy).open()
    server = client.result("count")["pid"]
    client.call("silence")
    client.close()
    eventually(lambda: not is_alive(server))
    for message in ({"id": "k", "method": "echo"}, {"method": "x"}, {"id": 1, "result": {}}):
        answer = client.post({"jsonrpc": "2.0", **message})
        body = answer.message()
        assert (answer.status, body["error"]["code"]) == (404, -32001)
        assert "id" not in body
    if not isinstance(proxy, GunicornProxy):
        managers = (
            [replica.app.manager for replica in proxy.each]
            if isinstance(proxy, Replicas)
            else [proxy.app.proxies["default"].manager]
        )
        assert not any(manager.exists(client.session) for manager in managers)


def test_a_stream_that_nobody_begins_to_read_leaves_nothing() -> None:
    with running("wsgi", max_streams=1, max_sessions=1) as proxy:
        front = proxy.client().front
        for _ in range(3):
            answer = front.request("GET", "/sse", {}, None)
            assert answer.status == 200
            answer.close()
        assert isinstance(proxy, WsgiProxy)
        eventually(lambda: processes(proxy) == 0)


def test_the_end_of_the_server_is_told_and_ends_the_stream(proxy: Proxy) -> None:
    client = client_of(proxy).open()
    client.call("die", {"code": 7}, key="k")
    message = "The server exited (exit code 7) before it answered"
    assert client.answer("k")["error"] == {"code": -32000, "message": message}
    assert list(client.events()) == []
    answer = client.post({"jsonrpc": "2.0", "id": 1, "method": "count"})
    assert answer.status == 404  # no new server: the client opens another stream
    client.close()
    again = client_of(proxy).open()
    assert again.result("count")["calls"] == 1
    again.close()


def test_a_server_that_dies_at_once_ends_the_stream_and_is_not_ready() -> None:
    with running("wsgi", [*SCRIPTED, "--die-on-initialize"], max_streams=1) as proxy:
        for _ in range(3):
            client = client_of(proxy)
            client.connect()
            client.call("initialize", {"protocolVersion": "2024-11-05"}, key=0)
            assert "exit code 3" in client.answer(0)["error"]["message"]
            assert list(client.events()) == []
            client.close()
        ready = proxy.client().front.request("GET", "/readyz", {}, None)
        assert (ready.status, "exit code 3" in ready.body().decode()) == (503, True)


def test_a_command_that_does_not_exist_is_a_503_and_takes_no_place() -> None:
    with running("wsgi", ["/no/such/server"], max_streams=1, max_sessions=1) as proxy:
        for _ in range(3):
            answer = client_of(proxy).connect()
            assert (answer.status, answer.error()["code"]) == (503, -32000)
            assert answer.headers["Retry-After"]
            assert answer.failure == "server-start-failed"


def test_a_stream_that_cannot_be_heard_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends between its start and the first look at it."""
    start = Owner.start

    def start_and_lose(self: Owner, has_left: Callable[[], bool]) -> Any:
        bridge = start(self, has_left)
        assert bridge.hand_over()
        return bridge

    with running("wsgi", max_streams=1, max_sessions=1) as proxy:
        with monkeypatch.context() as patch:
            patch.setattr(Owner, "start", start_and_lose)
            assert client_of(proxy).connect().status == 503
        eventually(lambda: processes(proxy) == 0)
        client = client_of(proxy).open()
        client.close()


def test_an_open_stream_keeps_its_session_alive(store: dict[str, Any]) -> None:
    with replicas(2, kind=SSEProxy, session_ttl=0.6, **QUICK, **store) as several:
        client = client_of(several).open()
        assert client.stream is not None
        for _ in range(9):  # keepalives: three times the time to live
            next(client.stream.pieces)
        assert client.result("count")["calls"] == 1
        client.close()


def test_posts_find_a_lost_owner_and_end_the_session(store: dict[str, Any]) -> None:
    with replicas(2, kind=SSEProxy, lease=1.0, **store) as several:
        client = client_of(several).open()
        several[0].line.cut()

        def status() -> int:
            return client.post({"jsonrpc": "2.0", "method": "x"}).status

        eventually(lambda: status() == 404)
        assert several[1].children == 0
        assert not several[1].app.manager.exists(client.session)
        several[0].line.mend()
        eventually(lambda: several[0].children == 0)
        assert list(client.events()) == []
        client.close()


# --- limits and the end of the replica -----------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "limit"), [*((way, "max_streams") for way in BOTH), ("wsgi", "max_sessions")]
)
def test_too_many_are_a_503_until_one_leaves(way: str, limit: str) -> None:
    settings: dict[str, Any] = {limit: 1, **QUICK}
    with running(way, **settings) as proxy:
        first = client_of(proxy).open()
        answer = client_of(proxy).connect()
        assert (answer.status, answer.error()["code"]) == (503, -32000)
        assert int(answer.headers["Retry-After"]) > 0
        assert processes(proxy) == 1
        assert first.result("count")["calls"] == 1
        first.close()
        second = client_of(proxy)
        eventually(lambda: second.connect().status == 200)
        second.close()


def test_a_replica_that_stops_opens_no_stream_and_passes_messages_on() -> None:
    with running("wsgi") as proxy:
        assert isinstance(proxy, WsgiProxy)
        client = client_of(proxy).open()
        proxy.app.edge.is_draining = True
        answer = client_of(proxy).connect()
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert client.result("count")["calls"] == 1
        proxy.app.drain(timeout=0)
        proxy.app.close()
        assert list(client.events()) == []
        client.close()
        assert processes(proxy) == 0


def test_a_running_call_is_answered_while_gunicorn_stops() -> None:
    with running("gunicorn") as proxy:
        assert isinstance(proxy, GunicornProxy)
        client = client_of(proxy).open()
        key = client.call("sleep", {"seconds": 1})
        eventually(lambda: "sleep" in methods(client))
        os.kill(proxy.process.master_pid, signal.SIGTERM)
        assert client.answer(key)["result"]["slept"] == 1
        assert list(client.events()) == []
        assert proxy.process.wait(15) == 0
        client.close()


def test_an_initialize_that_the_end_of_its_replica_cuts_off_says_so() -> None:
    with running("wsgi", [*SCRIPTED, "--slow-start", "60"]) as proxy:
        assert isinstance(proxy, WsgiProxy)
        client = client_of(proxy)
        client.connect()
        client.call("initialize", {"protocolVersion": "2024-11-05"}, key=0)
        eventually(lambda: proxy.app.proxies["default"].is_busy)
        proxy.app.close()
        assert "The proxy has stopped the server" in client.answer(0)["error"]["message"]
        assert list(client.events()) == []
        assert proxy.app.proxies["default"].server_reason() is None
        client.close()


# --- no thread ------------------------------------------------------------------------------------


def overloaded(client: SseClient) -> SseClient:
    """The same session, as if no thread were free for what it posts."""
    front = client.front
    assert isinstance(front, WsgiFront)
    client.posts = WsgiFront(front.app.overloaded)
    return client


def test_a_request_without_a_thread_is_answered_on_its_stream() -> None:
    with running("wsgi") as proxy:
        client = overloaded(client_of(proxy).open())
        answer = client.post({"jsonrpc": "2.0", "id": "a", "method": "count"})
        assert (answer.status, answer.failure, answer.body()) == (202, "overloaded", b"")
        error = client.answer("a")["error"]
        assert error == {"code": -32000, "message": "All threads of this worker are taken"}
        assert client.notify("notifications/x").status == 202
        client.posts = client.front
        assert client.result("count")["calls"] == 1
        client.close()


def test_a_request_without_a_thread_whose_stream_is_elsewhere_is_a_503() -> None:
    with replicas(2, kind=SSEProxy) as several:
        client = SseClient(WsgiFront(several[0].app)).open()
        client.posts = WsgiFront(several[1].app.overloaded)
        answer = client.post({"jsonrpc": "2.0", "id": 7, "method": "count"})
        assert (answer.status, answer.failure) == (503, "overloaded")
        assert (answer.headers["Retry-After"], answer.message()["id"]) == ("5", 7)
        assert client.notify("notifications/x").status == 202
        client.close()


# --- the store -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", BOTH)
def test_without_the_store_nothing_counts_as_gone(way: str, own_redis: Any) -> None:
    redis = own_redis()
    settings: dict[str, Any] = {"redis_url": redis.url, "connect_timeout": 1, **QUICK}
    with running(way, **settings) as proxy:
        client = client_of(proxy).open()
        redis.stop()
        # Who holds the stream needs no store for it.
        assert client.result("count")["calls"] == 1
        assert client.post({"jsonrpc": "2.0", "method": "x"}).status == 202
        refused = client_of(proxy).connect()
        assert (refused.status, refused.failure) == (503, "store-unavailable")
        assert refused.headers["Retry-After"]
        eventually(lambda: processes(proxy) == 1)  # that of the session, none of the attempt
        redis.start()
        eventually(lambda: client_of(proxy).connect().status == 200)
        assert client.result("count")["calls"] == 2
        client.close()


def test_a_stream_out_of_reach_is_a_503_for_requests_alone(own_redis: Any) -> None:
    redis = own_redis()
    with replicas(2, kind=SSEProxy, redis_url=redis.url, connect_timeout=1) as several:
        client = client_of(several).open()  # messages go to the other replica
        redis.stop()
        began = time.monotonic()
        answer = client.post({"jsonrpc": "2.0", "id": "k", "method": "echo"})
        assert time.monotonic() - began >= 1
        assert (answer.status, answer.failure) == (503, "store-unavailable")
        assert answer.message()["id"] == "k"
        assert answer.headers["Retry-After"]
        for message in ({"method": "x"}, {"id": 1, "result": {}}):
            assert client.post({"jsonrpc": "2.0", **message}).status == 202
        redis.start()
        eventually(lambda: client.post({"jsonrpc": "2.0", "id": 1, "method": "echo"}).status == 202)
        client.close()


def test_a_request_finds_a_store_that_comes_back_in_time(own_redis: Any) -> None:
    redis = own_redis()
    with replicas(2, kind=SSEProxy, redis_url=redis.url, connect_timeout=30) as several:
        client = client_of(several).open()
        redis.stop()
        back = threading.Timer(0.5, redis.start)
        back.start()
        assert client.result("count")["calls"] == 1
        back.join()
        client.close()


def test_a_request_that_the_server_does_not_read_fails_on_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mcp_proxy.backends.bridge.WRITE_TIMEOUT", 0.5)
    with running("wsgi") as proxy:
        client = client_of(proxy).open()
        client.call("stop_reading")
        large = {"jsonrpc": "2.0", "id": "k", "method": "echo", "params": {"text": "x" * 2_000_000}}
        assert client.post(large).status == 202
        assert "was ended" in client.answer("k")["error"]["message"]
        assert list(client.events()) == []
        assert client.post({"jsonrpc": "2.0", "id": 1, "method": "echo"}).status == 404
        client.close()


def test_a_stream_that_ends_without_the_store_still_ends_its_server(own_redis: Any) -> None:
    redis = own_redis()
    with running("wsgi", redis_url=redis.url, connect_timeout=1) as proxy:
        client = client_of(proxy).open()
        redis.stop()
        client.close()
        eventually(lambda: processes(proxy) == 0)


# --- what is refused -----------------------------------------------------------------------------


def modern(version: str = "2026-07-28") -> dict[str, Any]:
    return {"_meta": {"io.modelcontextprotocol/protocolVersion": version}}


@pytest.mark.parametrize("method", ["initialize", "server/discover"])
def test_a_post_to_the_stream_is_a_405_at_once(proxy: Proxy, method: str) -> None:
    client = client_of(proxy)
    message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": modern()}
    answer = client.post(message, "/sse", Accept="application/json, text/event-stream")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")
    assert answer.error()["code"] == -32600


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/sse", "GET"),
        ("HEAD", "/sse", "GET"),
        ("PUT", "/messages", "POST"),
        ("GET", "/messages", "POST"),
    ],
)
def test_other_methods_are_a_405_that_names_the_allowed(
    proxy: Proxy, method: str, path: str, allowed: str
) -> None:
    answer = client_of(proxy).posts.request(method, path, {}, None)
    assert (answer.status, answer.headers["Allow"]) == (405, allowed)
    answer.close()


@pytest.mark.parametrize("path", ["/", "/ssex", "/sse/x", "/message", "/messages/x"])
def test_other_paths_are_a_404(proxy: Proxy, path: str) -> None:
    answer = client_of(proxy).posts.request("GET", path, {}, None)
    assert answer.status == 404
    answer.close()


@pytest.mark.parametrize("key", [0, "1", 2**60])
def test_an_id_that_was_never_issued_is_a_400_with_the_request_id(proxy: Proxy, key: Any) -> None:
    message = {"jsonrpc": "2.0", "id": key, "method": "echo"}
    answer = client_of(proxy).post(message, "/messages?session_id=never-issued")
    assert answer.status == 400
    expected = {"code": -32001, "message": "Session not found"}
    assert answer.message() == {"jsonrpc": "2.0", "id": key, "error": expected}


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("?session_id=never-issued", 400, -32001),
        (f"?session_id=mcp-{'0' * 8}-{'0' * 32}", 404, -32001),
        (f"?sessionId=mcp-{'0' * 8}-{'0' * 32}", 404, -32001),
        ("", 400, -32600),
        ("?", 400, -32600),
        ("?session_id=", 400, -32600),
        ("?session=x", 400, -32600),
        ("?session_id=a%20b", 400, -32600),
        ("?session_id=%FF", 400, -32600),
        (f"?session_id={'a' * 1025}", 400, -32600),
    ],
)
def test_what_names_no_session_is_refused(proxy: Proxy, query: str, status: int, code: int) -> None:
    answer = client_of(proxy).post({"jsonrpc": "2.0", "method": "x"}, f"/messages{query}")
    body = answer.message()
    assert (answer.status, body["error"]["code"]) == (status, code)
    assert "id" not in body


def test_the_unknown_status_can_be_404() -> None:
    with running("wsgi", unknown_session_status=404) as proxy:
        message = {"jsonrpc": "2.0", "method": "x"}
        assert client_of(proxy).post(message, "/messages?session_id=x").status == 404


def test_rubbish_and_batches_are_a_400_that_says_what_is_wrong(client: SseClient) -> None:
    rubbish = {
        b"": -32700,
        b"{": -32700,
        b'{"jsonrpc":"2.0","id":1,"method":"\xff"}': -32700,
        b"null": -32600,
        b'{"jsonrpc":"2.0","id":null,"method":"x"}': -32600,
        b'{"jsonrpc":"2.0","id":1}': -32600,
        b"[]": -32600,
        b'[{"jsonrpc":"2.0","id":1,"method":"echo"}]': -32600,
    }
    for body, code in rubbish.items():
        answer = client.post(body)
        assert (answer.status, answer.error()["code"]) == (400, code), body
    assert client.result("count")["calls"] == 1


def test_an_encoded_body_is_a_415(client: SseClient) -> None:
    message = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
    assert client.post(message, Content_Encoding="gzip").status == 415
    assert client.post(message, Content_Encoding="identity").status == 202


def test_another_content_type_is_a_415_and_none_is_json(client: SseClient) -> None:
    message = b'{"jsonrpc":"2.0","method":"notifications/x"}'
    assert client.post(message, Content_Type="text/plain").status == 415
    assert client.post(message, Content_Type="application/json; charset=utf-8").status == 202
    assert client.post(message, Content_Type="").status == 202


def test_a_body_over_the_limit_is_a_413() -> None:
    with running("wsgi", max_body_bytes=1000) as proxy:
        client = client_of(proxy).open()
        message = {"jsonrpc": "2.0", "id": 1, "method": "echo", "params": {"text": "x" * 2000}}
        answer = client.post(message)
        assert (answer.status, answer.error()["code"]) == (413, -32600)
        client.close()


def test_foreign_origins_and_hosts_are_a_403(client: SseClient) -> None:
    message = {"jsonrpc": "2.0", "method": "notifications/x"}
    for headers in ({"Origin": "http://evil.example.com"}, {"Host": "evil.example.com"}):
        assert client.post(message, **headers).status == 403
        assert client.connect(**headers).status == 403
    assert "notifications/x" not in methods(client)


def test_a_page_of_this_machine_may_read_the_stream(proxy: Proxy) -> None:
    client = client_of(proxy)
    answer = client.connect(Origin="http://localhost:6274")
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:6274"
    client.close()


# --- beside the other transport, and alone -------------------------------------------------------


def test_the_transports_share_a_server_but_no_session() -> None:
    with running("wsgi") as proxy:
        old, new = client_of(proxy).open(), proxy.client().open()
        assert old.result("count")["pid"] != new.result("count")["pid"]
        stray = old.post({"jsonrpc": "2.0", "method": "x"}, f"/messages?session_id={new.session}")
        assert (stray.status, stray.error()["code"]) == (400, -32600)
        new.session = old.session
        answer = new.call("echo")
        assert (answer.status, answer.error()["code"]) == (400, -32600)
        old.close()


@pytest.mark.parametrize(
    ("transports", "served", "missing"),
    [
        (("sse",), "/sse", "/mcp"),
        (("streamable",), "/mcp", "/sse"),
    ],
)
def test_either_transport_can_be_switched_off(
    transports: tuple[str, ...], served: str, missing: str
) -> None:
    app = create_app(configured(stdio_transports=transports))
    front = WsgiFront(app)
    try:
        assert front.request("PUT", served, {}, b"").status == 405
        assert front.request("PUT", missing, {}, b"").status == 404
        assert front.request("GET", "/readyz", {}, None).status == 200
        if "sse" in transports:
            client = SseClient(front).open()
            assert client.result("count")["calls"] == 1
            client.close()
    finally:
        app.close()


def test_several_servers_have_uris_of_their_own(tmp_path: Any) -> None:
    entry = {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"one": entry, "two": entry}}))
    with running("wsgi", (), config=str(file)) as proxy:
        front = proxy.client().front
        one = SseClient(front, path="/servers/one/sse").open()
        assert one.uri.startswith("/servers/one/messages?session_id=")
        assert one.result("count")["calls"] == 1
        other = one.uri.replace("/one/", "/two/")
        assert one.post({"jsonrpc": "2.0", "method": "x"}, other).status == 404
        assert SseClient(front).connect().status == 404
        one.close()


@pytest.mark.parametrize("storage", ["none", "local"])
def test_alone_it_is_a_wsgi_application(storage: str) -> None:
    alone = SSEProxy(SCRIPTED, LocalStorage() if storage == "local" else None)
    assert "SSEProxy" in repr(alone)
    client = SseClient(WsgiFront(alone)).open()
    assert client.result("count")["calls"] == 1
    assert not alone.is_shared
    alone.close()
    assert list(client.events()) == []
    client.close()
    assert alone.owner.supervisor.children == 0


def test_alone_with_redis_it_is_one_of_many(redis_url: str, redis_prefix: str) -> None:
    stores = [RedisStorage(redis_url, prefix=redis_prefix) for _ in range(3)]
    one, other = (SSEProxy(SCRIPTED, session_storage=store) for store in stores[:2])
    beside = StreamableProxy(SCRIPTED, session_storage=stores[2])
    try:
        assert one.is_shared
        client = SseClient(WsgiFront(one), WsgiFront(other)).open()
        assert client.result("count")["calls"] == 1
        new = McpClient(WsgiFront(beside))
        new.session = client.session
        assert new.call("echo").status == 400
        client.close()
        assert client.post({"jsonrpc": "2.0", "method": "x"}).status == 404
    finally:
        for app in (one, other, beside):
            app.close()
        for store in stores:
            store.close()


def test_many_clients_come_and_go(proxy: Proxy) -> None:
    def visit(number: int) -> Any:
        client = client_of(proxy).open()
        echoed = client.result("echo", {"number": number})["number"]
        client.close()
        return echoed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(visit, range(16))) == list(range(16))
    eventually(lambda: processes(proxy) == 0)
