"""HTTP+SSE servers behind the transparent proxy: on any replica, and gone when they are gone."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import EnvironBuilder

from mcp_proxy import LocalStorage, ProxyOptions, RedisStorage, TransparentProxy, create_app
from mcp_proxy.config import from_values
from mcp_proxy.errors import BackendLost, StorageError, StorageUnavailable
from mcp_proxy.storage.session import Session, new_session
from mcp_proxy.transports.base import drain
from mcp_proxy.wire.endpoint_event import OUR_PARAMETER, named_session
from tests.servers.http_backend import Feed, HttpBackend, reply, reset, silent, stream
from tests.servers.old_server import OldServer
from tests.support.front import Answer, Json, McpClient, WsgiFront
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.transparent import BOTH, LocalFront, Transparent, transparent
from tests.support.waiting import eventually

BROKEN = (BackendLost, http.client.HTTPException, OSError)
EVENTS = {"Accept": "text/event-stream"}


class Replicated(NamedTuple):
    """A replica and its way in."""

    app: TransparentProxy
    front: LocalFront

    def client(self, posts: Replicated | None = None, path: str = "/sse") -> SseClient:
        """A client whose stream is here, and whose messages go to `posts`."""
        return SseClient(self.front, (posts or self).front, path)

    def session(self, client: SseClient) -> Session | None:
        """The record of a client's session."""
        named = named_session(client.uri.partition("?")[2])
        assert named is not None
        return self.app.manager.peek(named.id)

    def get(self, path: str = "/sse", **headers: str) -> Answer:
        """An event stream."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.front.request("GET", path, {**EVENTS, **given}, None)


@pytest.fixture
def servers() -> Iterator[list[OldServer]]:
    with OldServer("A") as first, OldServer("B") as second:
        yield [first, second]


@pytest.fixture
def server(servers: list[OldServer]) -> OldServer:
    return servers[0]


@contextlib.contextmanager
def replica(*targets: str, storage: Any = None, **options: Any) -> Iterator[Replicated]:
    """A proxy in this process."""
    settings = ProxyOptions(**options.pop("settings", {}))
    app = TransparentProxy(targets, storage, options=settings, **options)
    front = LocalFront(app)
    try:
        yield Replicated(app, front)
    finally:
        front.close()
        app.close()


@pytest.fixture
def one(server: OldServer) -> Iterator[Replicated]:
    """One proxy in front of one server."""
    with replica(server.url) as only:
        yield only


@pytest.fixture(params=["local", "redis"])
def two(
    request: pytest.FixtureRequest,
    servers: list[OldServer],
    redis_server: RedisServer,
    redis_prefix: str,
) -> Iterator[list[Replicated]]:
    """Two proxies over one store, in front of two servers."""
    urls = [server.url for server in servers]
    local = LocalStorage()
    with contextlib.ExitStack() as stack:
        storages: list[Any] = [local, local]
        if request.param == "redis":
            storages = [RedisStorage(redis_server.url, prefix=redis_prefix) for _ in range(2)]
        yield [stack.enter_context(replica(*urls, storage=storage)) for storage in storages]
        stack.close()
        for storage in storages:
            storage.close()


def echo(client: SseClient, **params: Any) -> Json:
    """What the server says to a call."""
    result: Json = client.result("echo", params)
    return result


def is_404(client: SseClient) -> bool:
    """Whether a call is told that its session is over."""
    answer = client.post({"jsonrpc": "2.0", "id": 2**60, "method": "echo"})
    message = answer.message()
    assert answer.status == 404, message
    error = {"code": -32001, "message": "Session not found"}
    return bool(message == {"jsonrpc": "2.0", "error": error})


# --- the endpoint --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "seen"),
    [
        ("/messages?session_id={id}", "/messages?session_id={id}"),
        ("/messages/?sessionId={id}", "/messages/?sessionId={id}"),
        ("messages?session_id={id}", "/messages?session_id={id}"),
        ("?session_id={id}", "/sse?session_id={id}"),
        ("/v1/m%2Fn?a=%20b&&session_id={id}&c", "/v1/m%2Fn?a=%20b&&session_id={id}&c"),
        ("{base}/messages?sessionId={id}", "/messages?sessionId={id}"),
        ("http://localhost:{port}/messages?sessionId={id}", "/messages?sessionId={id}"),
        ("http://localhost/messages?session_id={id}", "/messages?session_id={id}"),
        ("https://localhost:443/m?session_id={id}", "/m?session_id={id}"),
        ("/mcp?session_id={id}", "/mcp?session_id={id}"),
        ("/messages?sessionId=x&session_id={id}", "/messages?sessionId=x&session_id={id}"),
    ],
)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_the_endpoint_leads_to_the_proxy(
    one: Replicated, server: OldServer, uri: str, seen: str, line_end: bytes
) -> None:
    server.uri, server.line_end = uri, line_end
    client = one.client()
    assert client.connect().status == 200
    assert client.uri == seen.format(id=server.only.id)
    assert echo(client, a=1) == {"server": "A", "id": server.only.id, "params": {"a": 1}}
    session = one.session(client)
    assert session is not None
    assert (session.id, session.type) == (server.only.id, "sse")
    assert session.metadata == {"backend_url": server.url}


@pytest.mark.parametrize("uri", ["/messages/{id}", "/m?q=1&", "/m?q", "messages", "/m?id={id}"])
def test_a_uri_without_a_session_gets_one_of_ours(
    two: list[Replicated], servers: list[OldServer], uri: str
) -> None:
    for each in servers:
        each.uri = uri
    clients = [two[0].client(two[1]) for _ in range(2)]
    for client in clients:
        client.connect()
        assert f"{OUR_PARAMETER}=mcp-" in client.uri
    homes = [echo(client)["server"] for client in clients]
    assert sorted(homes) == ["A", "B"]  # each POST had the very target that its server had named
    assert [echo(client)["server"] for client in clients] == homes


@pytest.mark.parametrize(
    "ids",
    ["", "a%20b", "%FF", "%C3%A4", "x%0Ay", "y" * 1025, "%01" * 500, "a+b", "1"],
    ids=["none", "space", "no UTF-8", "umlaut", "line end", "long", "escapes", "plus", "taken"],
)
def test_ids_that_cannot_be_ids_here_have_an_alias(
    two: list[Replicated], servers: list[OldServer], ids: str
) -> None:
    for each in servers:
        each.ids, each.uri = ids, "/m?a&session_id={id}&b=%2F"
    two[0].app.manager.create(new_session("1", "mcp"))
    clients = [two[0].client(two[1]) for _ in range(2)]  # one at each server
    for client in clients:
        client.connect()
        named = named_session(client.uri.partition("?")[2])
        assert named is not None
        assert named.parameter == "session_id"
        assert named.value.startswith("mcp-")
    assert len({client.uri for client in clients}) == 2
    homes = [echo(client)["server"] for client in clients]
    assert [echo(client)["id"] for client in clients] == [ids, ids]
    assert homes == [echo(client)["server"] for client in clients]


def test_two_servers_that_give_out_the_same_id(
    two: list[Replicated], servers: list[OldServer]
) -> None:
    for each in servers:
        each.ids = "{number}"
    clients = [two[n % 2].client(two[n // 2]) for n in range(4)]
    for client in clients:
        client.connect()
    answers = [echo(client, mine=number) for number, client in enumerate(clients)]
    places = [(answer["server"], answer["id"]) for answer in answers]
    assert sorted(places) == [("A", "1"), ("A", "2"), ("B", "1"), ("B", "2")]
    assert [answer["params"]["mine"] for answer in answers] == [0, 1, 2, 3]
    for client in clients:
        client.close()
    assert not any(two[0].session(client) for client in clients)


def test_the_same_id_may_come_again(one: Replicated, server: OldServer) -> None:
    server.ids = "same"
    for _ in range(2):
        client = one.client()
        client.connect()
        assert client.session == "same"
        assert echo(client)["id"] == "same"
        client.close()
        eventually(lambda: not server.live)


def test_a_path_of_two_slashes_is_no_host(one: Replicated, server: OldServer) -> None:
    server.uri = "{base}//messages?session_id={id}"
    event = next(one.get().events())
    assert event.data == b"/.//messages?session_id=A-1"
    for base in ("http://proxy", "https://proxy:1/a/sse"):
        assert urlsplit(urljoin(base, event.data.decode())).path == "//messages"


@pytest.mark.parametrize("uri", ["http://elsewhere.invalid/m?session_id=1", "//elsewhere/m", "a:b"])
def test_an_endpoint_elsewhere_passes_as_it_is(
    one: Replicated, server: OldServer, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.uri = uri
    client = one.client()
    client.connect()
    assert client.uri == uri
    assert "names another server" in caplog.text
    assert not one.app.manager.exists("1")


def test_what_precedes_and_follows_keeps_its_bytes(one: Replicated, server: OldServer) -> None:
    server.head = b"\xef\xbb\xbf: hello\r\n\r\nretry: 5\n\n"
    server.uri = "messages?session_id={id}"
    answer = one.get()
    eventually(lambda: server.live)
    rest = b"event: endpoint\ndata: /no\n\ndata: \xff\r\r\n: x"
    server.only.feed.put(rest)
    server.only.feed.put(None)
    event = b"event: endpoint\ndata: /messages?session_id=A-1\n\n"
    assert answer.body() == server.head + event + rest


def test_an_event_in_pieces_is_put_together(one: Replicated, server: OldServer) -> None:
    feed = Feed()
    server.on("GET", "/sse", stream(b"event: endp", feed))
    client = one.client()
    for piece in (b"oint\r\ndata: ", b"/m?session_id=1", b"\r\n", b"\r"):
        feed.put(piece)
    client.connect()
    assert client.uri == "/m?session_id=1"
    assert one.app.manager.exists("1")
    feed.put(None)
    assert list(client.events()) == []


def test_half_an_event_passes_at_the_end(one: Replicated, server: OldServer) -> None:
    half = b": hi\n\nevent: endpoint\ndata: /m?session_id=1\n"
    server.on("GET", "/sse", stream(half[:20], half[20:]))
    assert one.get().body() == half
    assert not one.app.manager.exists("1")


# --- on any replica ------------------------------------------------------------------------------


def test_messages_reach_the_server_that_holds_the_stream(
    two: list[Replicated], servers: list[OldServer]
) -> None:
    clients = [two[n % 2].client(two[n // 2 % 2]).open() for n in range(8)]
    assert [len(each.live) for each in servers] == [4, 4]
    for client in clients:
        home = echo(client)["server"]
        client.posts = two[0].front
        assert echo(client, n=1)["server"] == home
        client.posts = two[1].front
        assert echo(client, n=2)["server"] == home
    for each in servers:
        for session in each.live.values():
            names = [message["method"] for message in session.posted]
            assert names == ["initialize", "notifications/initialized", *["echo"] * 3]


def test_what_the_server_asks_is_answered_by_any_replica(
    two: list[Replicated], servers: list[OldServer]
) -> None:
    client = two[0].client(two[1])
    client.connect()
    (session,) = (session for each in servers for session in each.live.values())
    question = {"jsonrpc": "2.0", "id": "q", "method": "sampling/createMessage"}
    session.feed.put(b"event: message\ndata: " + json.dumps(question).encode() + b"\n\n")
    assert client.next() == question
    response = {"jsonrpc": "2.0", "id": "q", "result": {}}
    assert client.post(response).status == 202
    assert session.posted == [response]


def test_an_acknowledgement_passes_as_it_is(one: Replicated, server: OldServer) -> None:
    client = one.client()
    client.connect()
    body, fields = b"Accepted", ("Content-Type: text/plain", "X-A: 1")
    server.on("POST", "/messages", reply(202, body, *fields))
    answer = client.post(b'{"jsonrpc":"2.0","id":1,"method":"x"}', Authorization="Bearer t")
    assert (answer.status, answer.headers["X-A"], answer.body()) == (202, "1", b"Accepted")
    assert server.last.header("Authorization") == "Bearer t"
    assert server.last.body == b'{"jsonrpc":"2.0","id":1,"method":"x"}'
    server.on("POST", "/messages", reply(400, b"Could not parse"))
    answer = client.post(b"\xff nonsense")
    assert (answer.status, answer.body(), server.last.body) == (
        400,
        b"Could not parse",
        b"\xff nonsense",
    )


def test_a_message_without_a_session_of_ours_passes(one: Replicated, server: OldServer) -> None:
    one.app.manager.create(new_session("of-another-kind", "mcp", backend_url=server.url))
    one.app.manager.create(new_session("of-stdio", "sse", backend_url="worker://replica/child"))
    body = b'{"jsonrpc":"2.0","id":1,"method":"x"}'
    for query in (
        "",
        "?session_id=unknown",
        "?session_id=of-another-kind",
        "?session_id=%20",
        "?a",
    ):
        for method in ("POST", "PUT"):
            answer = one.front.request(method, f"/messages{query}", {}, body)
            assert (answer.status, answer.body()) == (404, b"not here")
            assert server.last.target == f"/messages{query}"


def test_a_modern_message_is_not_looked_up(one: Replicated, server: OldServer) -> None:
    meta = {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}
    client = one.client()
    client.connect()
    answer = client.post({"jsonrpc": "2.0", "id": 1, "method": "x", "params": {"_meta": meta}})
    assert answer.status == 202  # nothing was looked up: the server knows its own URI


# --- the end -------------------------------------------------------------------------------------


def test_when_the_stream_ends_the_session_does(
    two: list[Replicated], servers: list[OldServer]
) -> None:
    client = two[0].client(two[1])
    client.connect()
    (session,) = (session for each in servers for session in each.live.values())
    session.feed.put(None)
    assert list(client.events()) == []
    client.close()
    assert two[1].session(client) is None
    posts = [seen for each in servers for seen in each.seen if seen.method == "POST"]
    assert is_404(client)
    assert posts == []


def test_a_server_that_breaks_off_breaks_the_stream_off(
    two: list[Replicated], servers: list[OldServer]
) -> None:
    client = two[0].client(two[1])
    client.connect()
    for each in servers:
        each.drop_connections()
    with pytest.raises(BROKEN):
        list(client.events())
    client.close()
    assert two[0].session(client) is None
    assert is_404(client)


REQUEST = {"jsonrpc": "2.0", "id": 1, "method": "echo"}


def away(*_: Any) -> Any:
    """A store that cannot be reached."""
    raise StorageUnavailable


@pytest.mark.parametrize("holder", [0, 1])
def test_a_server_that_refuses_a_connection_has_not_lost_the_session(
    server: OldServer, holder: int
) -> None:
    storage, settings = LocalStorage(), {"connect_timeout": 0.5}
    options: dict[str, Any] = {"storage": storage, "settings": settings, "name": "same"}
    with replica(server.url, **options) as first, replica(server.url, **options) as second:
        client = first.client([first, second][holder])
        client.connect()
        assert echo(client)["server"] == "A"
        server.refuse_connections()
        first.app._client.close()  # connections that are kept
        second.app._client.close()
        answer = client.post(REQUEST)
        assert (answer.status, answer.failure) == (503, "server-unreachable")
        for message in (
            {"jsonrpc": "2.0", "method": "n"},
            {"jsonrpc": "2.0", "id": 1, "result": 1},
        ):
            told = client.post(message)
            assert (told.status, told.failure) == (202, "server-unreachable")
        assert first.session(client) is not None
        server.start()
        assert echo(client)["server"] == "A"


def test_a_request_waits_for_a_server_that_comes_back(server: OldServer) -> None:
    with replica(server.url, settings={"connect_timeout": 30}) as proxy:
        client = proxy.client()
        client.connect()
        server.refuse_connections()
        proxy.app._client.close()
        timer = threading.Timer(0.5, server.start)
        timer.start()
        assert echo(client)["server"] == "A"
        timer.join()


@pytest.mark.parametrize("message", [REQUEST, [REQUEST]], ids=["request", "batch"])
def test_a_request_waits_for_a_store_that_comes_back(
    server: OldServer, monkeypatch: pytest.MonkeyPatch, message: Any
) -> None:
    with replica(server.url, settings={"connect_timeout": 30}) as proxy:
        client = proxy.client()
        client.connect()
        loads, load = itertools.count(1), proxy.app.manager.storage.load

        def back_at_the_third(session_id: str) -> Session:
            if next(loads) < 3:
                raise StorageUnavailable
            return load(session_id)

        monkeypatch.setattr(proxy.app.manager.storage, "load", back_at_the_third)
        assert client.post(message).status == 202
        assert server.only.posted == [message]


def test_a_request_is_tried_while_store_and_server_are_away_in_turn(
    server: OldServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One time limit for both, and the session is looked up anew each time."""
    with replica(server.url, settings={"connect_timeout": 1}) as proxy:
        client = proxy.client()
        client.connect()
        server.refuse_connections()
        proxy.app._client.close()
        loads, load = itertools.count(1), proxy.app.manager.storage.load

        def now_and_then(session_id: str) -> Session:
            if next(loads) % 2 == 0:
                raise StorageUnavailable
            return load(session_id)

        monkeypatch.setattr(proxy.app.manager.storage, "load", now_and_then)
        begun = time.monotonic()
        answer = client.post(REQUEST)
        assert answer.status == 503
        assert answer.headers["Retry-After"]
        assert 1 <= time.monotonic() - begun < 4
        assert next(loads) > 3


def test_a_request_whose_client_has_left_is_not_tried_any_longer(
    server: OldServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replica(server.url, settings={"connect_timeout": 60}) as proxy:
        client = proxy.client()
        client.connect()
        monkeypatch.setattr(proxy.app.manager.storage, "load", away)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            there = socket.create_connection(listener.getsockname())
            here, _ = listener.accept()
        there.close()
        path, _, query = client.uri.partition("?")
        builder = EnvironBuilder(path, query_string=query, method="POST", json=REQUEST)
        environ = builder.get_environ() | {"gunicorn.socket": here}
        seen: list[str] = []
        begun = time.monotonic()
        body: Any = proxy.app(environ, lambda status, *_: seen.append(status) or len)
        assert time.monotonic() - begun < 20
        assert [status[:4] for status in seen] == ["503 "]
        list(body)
        here.close()


def test_the_access_line_of_a_message_that_fails_names_its_session(
    server: OldServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def sessions() -> list[str]:
        found = [line.fields for line in caplog.records if hasattr(line, "fields")]
        return [fields["session"] for fields in found if fields["method"] == "POST"]

    with replica(server.url, settings={"connect_timeout": 0.1}) as proxy:
        client = proxy.client()
        client.connect()
        with monkeypatch.context() as patch:
            patch.setattr(proxy.app.manager.storage, "load", away)
            assert client.post(REQUEST).status == 503
            assert client.post({"jsonrpc": "2.0", "method": "n"}).status == 202
        client.posts = WsgiFront(proxy.app.overloaded)
        assert client.post(REQUEST).status == 503
        assert client.post({"jsonrpc": "2.0", "method": "n"}).status == 202
        client.posts = proxy.front
        client.close()
        assert is_404(client)
        assert sessions() == [client.session] * 5
        client.uri = "/messages?session_id=something-else"
        assert client.post(REQUEST).status == 404
        assert sessions()[5:] == [""]


def test_a_request_that_waits_learns_that_the_stream_is_gone(server: OldServer) -> None:
    with replica(server.url, settings={"connect_timeout": 30}) as proxy:
        client = proxy.client()
        client.connect()
        server.stop()
        proxy.app._client.close()
        timer = threading.Timer(0.5, client.close)
        timer.start()
        begun = time.monotonic()
        assert is_404(client)
        assert time.monotonic() - begun < 20
        timer.join()
        assert proxy.session(client) is None
        assert is_404(client)


def test_a_server_that_loses_a_message_has_not_lost_the_session(
    one: Replicated, server: OldServer
) -> None:
    client = one.client()
    client.connect()
    server.on("POST", "/messages", reset)
    answer = client.post({"jsonrpc": "2.0", "id": 1, "method": "x"})
    assert (answer.status, answer.error()["code"]) == (502, -32000)
    server.acts.clear()
    assert echo(client)["server"] == "A"


def test_a_server_that_takes_a_message_too_slowly_is_504(server: OldServer) -> None:
    with replica(server.url, settings={"request_timeout": 0.5}) as proxy:
        client = proxy.client()
        client.connect()
        server.on("POST", "/messages", silent)
        answer = client.post(REQUEST)
        assert (answer.status, answer.failure) == (504, "server-timeout")


BATCH = [{"jsonrpc": "2.0", "id": key, "method": "x"} for key in (1, 2)]


def test_a_batch_that_fails_has_a_status_that_says_so(one: Replicated, server: OldServer) -> None:
    """Nobody reads the answer to a POST, but its status."""
    client = one.client()
    client.connect()
    server.on("POST", "/messages", reset)
    answer = client.post(BATCH)
    assert (answer.status, answer.failure) == (502, "server-unreachable")


def test_a_message_for_which_there_is_no_thread_has_a_status_that_says_so(
    one: Replicated,
) -> None:
    client = one.client()
    client.connect()
    client.posts = WsgiFront(one.app.overloaded)
    answer = client.post(REQUEST)
    assert (answer.status, answer.failure) == (503, "overloaded")
    assert answer.headers["Retry-After"]
    assert answer.message()["id"] == REQUEST["id"]
    assert client.post(BATCH).status == 503
    notified = client.post({"jsonrpc": "2.0", "method": "n"})
    assert (notified.status, notified.failure) == (202, "overloaded")
    # On the wire of later revisions the answer is read.
    for path in ("/mcp", "/mcp?a=b"):
        answer = McpClient(client.posts, path).call("tools/call")
        assert (answer.status, answer.failure) == (200, "overloaded")


def test_an_open_stream_keeps_its_session_alive(server: OldServer) -> None:
    with replica(server.url, settings={"session_ttl": 1}) as proxy:
        client = proxy.client()
        client.connect()
        begun = time.monotonic()
        eventually(lambda: time.monotonic() > begun + 2)
        assert echo(client)["server"] == "A"
        client.close()
        assert proxy.session(client) is None


@pytest.mark.parametrize("failure", [StorageUnavailable, StorageError])
def test_a_stream_whose_session_cannot_be_recorded_does_not_begin(
    one: Replicated,
    server: OldServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: type[StorageError],
) -> None:
    def fail(*_: Any) -> Any:
        raise failure("no store")

    caplog.set_level("INFO")
    server.head = b": hi\n\n"
    with monkeypatch.context() as patch:
        patch.setattr(one.app.manager.storage, "create", fail)
        answer = one.get()
        assert (answer.status, answer.failure) == (503, "store-unavailable")
        assert answer.headers["Retry-After"]
        assert answer.error()["message"] == "no store"
        assert "-> 503 in" in caplog.records[-1].getMessage()
        assert 'reason="store-unavailable: no store"' in caplog.records[-1].getMessage()
    eventually(lambda: not server.live)
    assert repr(one.app).startswith("<TransparentProxy calls=0 ")
    assert echo(one.client().open())["server"] == "A"


def test_a_stream_that_breaks_off_before_its_first_event_is_a_failure(
    one: Replicated, server: OldServer
) -> None:
    feed = Feed()
    feed.put(Feed.BREAK)
    server.on("GET", "/sse", stream(b": hi\n\n", feed))
    answer = one.get()
    assert (answer.status, answer.failure) == (502, "bad-answer")


def test_a_record_that_fails_late_ends_the_stream_and_is_in_the_access_line(
    one: Replicated,
    server: OldServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server has a second for its first event; then the answer begins without it."""
    caplog.set_level("INFO")
    feed = Feed()
    server.on("GET", "/sse", stream(b": hi\n\n", feed))
    begun = time.monotonic()
    answer = one.get()
    assert answer.status == 200
    assert 1 <= time.monotonic() - begun < 5
    monkeypatch.setattr(one.app.manager.storage, "create", away)
    feed.put(b"event: endpoint\ndata: /messages?session_id=1\n\n")
    with pytest.raises(StorageUnavailable):
        answer.body()
    one.front.close()
    line = caplog.records[-1].getMessage()
    assert " -> 200 in " in line
    assert 'reason="store-unavailable: The session store cannot be reached' in line


def test_a_store_that_is_away_loses_no_session(
    server: OldServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replica(server.url, settings={"connect_timeout": 0.5}) as proxy:
        client = proxy.client()
        client.connect()
        with monkeypatch.context() as patch:
            patch.setattr(proxy.app.manager.storage, "load", away)
            told = client.post({"jsonrpc": "2.0", "method": "n"})
            assert (told.status, told.failure) == (202, "store-unavailable")
            asked = client.post(REQUEST)  # nobody reads this answer
            assert (asked.status, asked.failure) == (503, "store-unavailable")
        assert echo(client)["server"] == "A"


def test_a_store_that_is_away_keeps_no_stream_open(
    one: Replicated,
    server: OldServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = one.client()
    client.connect()
    monkeypatch.setattr(one.app.manager.storage, "delete", away)
    client.close()
    eventually(lambda: not server.live)
    assert "the record of an ended session was not deleted" in caplog.text


def test_an_end_that_fails_leaves_nothing_else_behind(
    one: Replicated,
    server: OldServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError

    client = one.client()
    client.connect()
    monkeypatch.setattr(one.app.manager.storage, "delete", broken)
    for _ in range(2):
        client.close()
    eventually(lambda: not server.live)
    assert caplog.text.count("the cleanup after a response failed") == 1
    assert repr(one.app).startswith("<TransparentProxy calls=0 ")


def test_a_replica_that_stops_ends_its_streams_in_order(
    two: list[Replicated], servers: list[OldServer]
) -> None:
    client, other = two[0].client(two[1]), two[1].client(two[0])
    client.connect()
    other.connect()
    drain(lambda: [two[0].app], timeout=0)
    assert list(client.events()) == []  # an end, not a break
    client.close()
    assert two[1].session(client) is None
    assert is_404(client)
    assert two[0].client().connect().status == 503
    assert echo(other)["server"] in "AB"  # sessions of other replicas are served to the last


# --- what is looked at, and what is not ----------------------------------------------------------


def test_the_server_is_not_asked_to_compress_the_endpoint(
    one: Replicated, server: OldServer
) -> None:
    client = one.client()
    client.connect(Accept_Encoding="gzip")
    assert "accept-encoding" not in server.last.names
    assert echo(client)["server"] == "A"
    one.front.request("GET", "/sse", {"Accept-Encoding": "gzip", "Accept": "*/*"}, None)
    assert eventually(lambda: server.last.header("Accept-Encoding")) == "gzip"


@pytest.mark.parametrize("field", ["Content-Encoding: gzip", "Content-Length: 48"])
def test_a_stream_that_cannot_be_changed_passes_as_it_is(
    one: Replicated, server: OldServer, field: str
) -> None:
    event = b"event: endpoint\ndata: /messages?session_id=123\n\n"
    data = gzip.compress(event) if "gzip" in field else event
    framing = "length" if "Length" in field else "chunked"
    headers = () if "Length" in field else (field,)
    server.on("GET", "/sse", stream(data, framing=framing, length=len(data), headers=headers))
    answer = one.get()
    assert answer.body() == data
    assert not one.app.manager.storage.issued("123")


@pytest.mark.parametrize("era", ["2025-11-25", "2026-07-28"])
def test_streams_of_later_revisions_are_not_touched(era: str) -> None:
    events = b"event: endpoint\rdata: /messages?session_id=123\r\n\rid: 1\ndata:\n\n"
    with HttpBackend() as backend, replica(backend.url) as proxy:
        proxy.app.manager.create(new_session("s", "mcp", backend_url=backend.url))
        backend.on("GET", "/mcp", stream(events))
        given = {"Mcp_Session_Id": "s", "Mcp_Protocol_Version": era, "Accept_Encoding": "gzip"}
        answer = proxy.get("/mcp", **given)
        assert answer.body() == events
        assert backend.last.header("Accept-Encoding") == "gzip"
        assert not proxy.app.manager.storage.issued("123")


def test_a_stream_without_a_session_that_is_not_old_passes(one: Replicated) -> None:
    with HttpBackend() as backend, replica(backend.url) as proxy:
        feed = Feed()
        backend.on("GET", "/mcp", stream(b": hi\n", feed))
        answer = proxy.get("/mcp")
        pieces = (piece for piece in answer.pieces if piece)
        assert next(pieces) == b": hi\n"
        feed.put(b"data: 1\n\n")
        assert next(pieces) == b"data: 1\n\n"
        feed.put(b"event: end")
        assert next(pieces) == b"event: end"


@pytest.mark.parametrize("said", [(), ("x-accel-buffering: yes",)])
def test_the_stream_is_not_to_be_held_back_by_nginx(
    one: Replicated, server: OldServer, said: tuple[str, ...]
) -> None:
    server.on("GET", "/sse", stream(b": hi\n\n", headers=said))
    assert one.get().headers["X-Accel-Buffering"] == ("yes" if said else "no")


def test_a_client_that_vanishes_without_a_word_is_given_up(
    one: Replicated, server: OldServer
) -> None:
    """The kernel breaks the connection when nothing is acknowledged for two keepalives."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        here, _ = listener.accept()
    environ = EnvironBuilder("/sse", headers=list(EVENTS.items())).get_environ()
    body: Any = one.app(environ | {"gunicorn.socket": here}, lambda *_: lambda data: None)
    begun = iter(body)
    assert next(begun) == b""
    assert next(begun).startswith(b"event: endpoint")
    option = here.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert option == 2000 * one.app.options.keepalive_interval
    there.close()
    with pytest.raises(ConnectionResetError):
        list(begun)
    body.close()
    here.close()
    assert not one.app.manager.exists("A-1")
    eventually(lambda: not server.live)


# --- where the proxy is --------------------------------------------------------------------------


def mounted(proxy: Replicated, prefix: str) -> LocalFront:
    def nothing(environ: Any, start_response: Any) -> Any:
        raise AssertionError(environ["PATH_INFO"])

    return LocalFront(DispatcherMiddleware(nothing, {prefix: proxy.app}))


def test_the_endpoint_has_the_mount_of_the_proxy(one: Replicated, server: OldServer) -> None:
    front = mounted(one, "/a b/mount")
    client = SseClient(front, path="/a%20b/mount/sse")
    client.connect()
    assert client.uri == "/a%20b/mount/messages?session_id=A-1"
    assert echo(client)["server"] == "A"
    front.close()


@pytest.mark.parametrize("prefix", ["/p", "/p/q/", "//evil", "http://evil", ""])
@pytest.mark.parametrize("trusted", [(), ("*",)])
def test_the_endpoint_has_the_prefix_of_a_trusted_proxy(
    server: OldServer, prefix: str, trusted: tuple[str, ...]
) -> None:
    is_believed = bool(trusted) and prefix in ("/p", "/p/q/")
    with replica(server.url, settings={"trusted_proxies": trusted}) as proxy:
        front = mounted(proxy, "/m")
        client = SseClient(front, path="/m/sse")
        client.connect(X_Forwarded_Prefix=prefix)
        shown = prefix.rstrip("/") if is_believed else ""
        assert client.uri == f"{shown}/m/messages?session_id=A-1"
        assert "x-forwarded-prefix" not in server.last.names
        client.uri = client.uri.removeprefix(shown)  # as that proxy does
        assert echo(client)["server"] == "A"
        front.close()


@pytest.mark.parametrize("trusted", [(), ("*",)])
def test_a_server_may_believe_the_host_that_it_was_told(
    server: OldServer, trusted: tuple[str, ...]
) -> None:
    server.uri = "https://outer.example/messages?session_id={id}"
    with replica(server.url, settings={"trusted_proxies": trusted}) as proxy:
        client = proxy.client()
        client.connect(X_Forwarded_Host="outer.example, between")
        assert client.uri.startswith("/messages?" if trusted else "https://outer.example/")


@pytest.mark.parametrize("suffix", ["", "/sse"])
def test_a_newer_client_is_led_to_the_older_wire(server: OldServer, suffix: str) -> None:
    """It tries to initialize by POST, is refused, and comes back with a GET."""
    path = "/mcp" if suffix else "/sse"
    with replica(server.url + suffix) as proxy:
        message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}}
        body = json.dumps(message).encode()
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
        }
        answer = proxy.front.request("POST", path, headers, body)
        assert (answer.status, answer.body()) == (405, b"not here")
        assert (answer.headers["Allow"], server.last.target) == ("GET", "/sse")
        client = proxy.client(path=path).open()
        assert echo(client)["server"] == "A"


# --- which servers may be used -------------------------------------------------------------------


def test_an_address_of_the_target_is_kept_with_its_name(server: OldServer) -> None:
    storage = LocalStorage()
    hosts = itertools.cycle([["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]])
    options: dict[str, Any] = {
        "storage": storage,
        "resolver": lambda host, port: next(hosts),
        "allowed_backends": (),
    }
    target = f"http://server.example:{server.port}"
    with replica(target, **options) as first, replica(target, **options) as second:
        server.uri = f"http://server.example:{server.port}/messages?session_id={{id}}"
        for _ in range(4):
            client = first.client(second).open()
            assert client.uri.startswith("/messages?")
            assert echo(client)["server"] == "A"
            assert server.last.header("Host") == f"server.example:{server.port}"
            session = second.session(client)
            assert session is not None
            assert session.metadata["backend_url"] == server.url


def test_a_record_that_names_another_server_is_not_followed(servers: list[OldServer]) -> None:
    app = create_app(from_values({"target_url": [servers[0].url]}))
    manager = app.proxies["default"].manager
    manager.create(new_session("stray", "sse", backend_url=servers[1].url))
    front = LocalFront(app)
    body = b'{"jsonrpc":"2.0","method":"n"}'
    headers = {"Content-Type": "application/json"}
    assert front.request("POST", "/messages?session_id=stray", headers, body).status == 404
    assert (len(servers[0].seen), servers[1].seen) == (1, [])
    front.close()
    app.close()


# --- through both ways in ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BOTH)
def running(
    request: pytest.FixtureRequest, redis_server: RedisServer
) -> Iterator[tuple[Transparent, OldServer]]:
    with (
        OldServer("A") as server,
        transparent(request.param, server.url, redis_server.url, max_streams=2) as proxy,
    ):
        yield proxy, server


@pytest.fixture
def way(running: tuple[Transparent, OldServer]) -> Iterator[tuple[Transparent, OldServer]]:
    proxy, server = running
    server.reset()
    yield running
    proxy.leave()
    eventually(lambda: not server.live)


def is_gone(proxy: Transparent, session: str) -> bool:
    """Whether the store knows it no more."""
    return not proxy.manager.exists(session)


def test_a_client_that_leaves_takes_everything_along(
    way: tuple[Transparent, OldServer],
) -> None:
    proxy, server = way
    for _ in range(3):
        clients = [SseClient(proxy.front).open() for _ in range(2)]
        sessions = [client.session for client in clients]
        assert sorted(session.id for session in server.live.values()) == sorted(sessions)
        assert [echo(client)["id"] for client in clients] == sessions
        assert SseClient(proxy.front).connect().status == 503  # no more streams than that
        for client in clients:
            client.close()
        eventually(lambda: not server.live)
        for session in sessions:
            eventually(partial(is_gone, proxy, session))
        assert all(is_404(client) for client in clients)
    if proxy.process is not None:
        assert "Traceback" not in proxy.process.log()


@pytest.mark.parametrize("end", [None, Feed.BREAK], ids=["ends", "breaks"])
def test_a_stream_that_is_over_is_over_for_the_client(
    way: tuple[Transparent, OldServer], end: bytes | None
) -> None:
    proxy, server = way
    client = SseClient(proxy.front).open()
    server.only.feed.put(end)
    with pytest.raises(BROKEN) if end else contextlib.nullcontext():
        assert list(client.events()) == []
    client.close()
    eventually(partial(is_gone, proxy, client.session))
    assert is_404(client)


def test_a_gunicorn_that_stops_ends_the_streams(
    server: OldServer, redis_server: RedisServer
) -> None:
    with transparent("gunicorn", server.url, redis_server.url) as proxy:
        client = SseClient(proxy.front).open()
        assert proxy.process is not None
        proxy.process.stop()
        assert list(client.events()) == []
        assert not proxy.manager.exists(client.session)
    eventually(lambda: not server.live)
