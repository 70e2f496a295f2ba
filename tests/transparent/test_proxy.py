"""The transparent proxy's routing, through the test client and real gunicorn."""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

import mcp_proxy
from mcp_proxy import LocalStorage, ProxyOptions, SessionManager, TransparentProxy, create_app
from mcp_proxy.config import from_values
from mcp_proxy.errors import ConfigError, StorageUnavailable
from tests.servers.http_backend import Feed, HttpBackend, reply, reset, silent, stream
from tests.support.front import Json, McpClient
from tests.support.monitor import recorded_commands
from tests.support.redis_server import RedisServer
from tests.support.transparent import BOTH, LocalFront, Transparent, transparent
from tests.support.waiting import eventually

JSON = "application/json"
MODERN = "2026-07-28"


@pytest.fixture(scope="module")
def other() -> Iterator[HttpBackend]:
    with HttpBackend(name="other") as backend:
        yield backend


@pytest.fixture(scope="module")
def settings(settings: Json, other: HttpBackend) -> Json:
    return {**settings, "allowed_backends": [other.url]}


@pytest.fixture
def proxy(proxy: Transparent, other: HttpBackend) -> Transparent:
    other.reset()
    return proxy


def known(backend: HttpBackend, client: McpClient) -> McpClient:
    """The client's session is one that the backend has, too."""
    assert client.session is not None
    backend.sessions.add(client.session)
    return client


# --- the words of the issue ----------------------------------------------------------------------


def test_backend_url_in_the_metadata_overrides_the_target(
    proxy: Transparent, target: HttpBackend, other: HttpBackend
) -> None:
    client = known(other, proxy.in_record(backend_url=other.url))
    assert client.result("tools/call")["backend"] == "other"
    assert client.listen().status == 200
    assert client.delete().status == 200
    assert [seen.method for seen in other.seen] == ["POST", "GET", "DELETE"]
    assert target.seen == []


@pytest.mark.parametrize(
    "url", [None, "", "nonsense", "/mcp", "//h:1", "ftp://h:1", "http://", "http://h:x", "http://["]
)
def test_without_a_usable_backend_url_the_static_target_serves(
    proxy: Transparent, target: HttpBackend, url: str | None
) -> None:
    client = known(target, proxy.in_record(**({} if url is None else {"backend_url": url})))
    assert client.result("tools/call")["backend"] == "target"


UNSENDABLE = ["a\r\nX-Evil: 1", "a\0", "\u2603"]


@pytest.mark.parametrize("name", [*UNSENDABLE, "", "a b", ".a", "a..b", "b\xfccher", "[", "x@y"])
def test_without_a_usable_backend_host_the_static_target_serves(
    proxy: Transparent, target: HttpBackend, other: HttpBackend, name: str
) -> None:
    client = known(target, proxy.in_record(backend_url=other.url, backend_host=name))
    assert client.result("tools/call")["backend"] == "target"
    assert "x-evil" not in target.last.names


@pytest.mark.parametrize("sid", UNSENDABLE)
def test_a_session_whose_backend_cannot_be_asked_for_it_is_initialized_again(
    proxy: Transparent, target: HttpBackend, sid: str
) -> None:
    init_body = json.dumps(
        {
            "jsonrpc": "2.0",
            "id": 0,
            "method": "initialize",
            "params": {"protocolVersion": "2025-06-18"},
        }
    )
    client = proxy.in_record(backend_url=target.url, backend_sid=sid, init_body=init_body)
    assert client.result("tools/call")["backend"] == "target"
    assert len(target.calls("initialize")) == 1


@pytest.mark.parametrize("sid", UNSENDABLE)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_without_a_handshake_such_a_session_is_over(
    proxy: Transparent, target: HttpBackend, sid: str, method: str
) -> None:
    client = proxy.in_record(backend_url=target.url, backend_sid=sid)
    body = b'{"jsonrpc":"2.0","id":1,"method":"x"}' if method == "POST" else None
    answer = client.request(method, body, Content_Type=JSON)
    assert answer.status == 404
    assert client.call("x").status == 404
    assert target.seen == []


def test_a_session_id_that_cannot_be_sent_is_none(proxy: Transparent, target: HttpBackend) -> None:
    target.rpc["initialize"] = lambda turn: turn.result(
        {"protocolVersion": "2025-06-18"}, "Mcp-Session-Id: a\x01b"
    )
    client = proxy.client()
    assert client.initialize().message()["result"]["protocolVersion"] == "2025-06-18"
    assert client.session is None


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_an_unknown_session_id_is_400(proxy: Transparent, target: HttpBackend, method: str) -> None:
    body = b'{"jsonrpc":"2.0","id":1152921504606846976,"method":"tools/call"}'
    answer = proxy.request(
        method,
        "/mcp",
        body if method == "POST" else None,
        Mcp_Session_Id="never-issued",
        Content_Type=JSON,
    )
    assert answer.status == 400
    message = answer.message()
    assert message["error"] == {"code": -32001, "message": "Session not found"}
    assert message.get("id") == (2**60 if method == "POST" else None)
    assert "id" in message or method != "POST"
    assert target.seen == []


@pytest.mark.parametrize("key", [0, "1", 2**60])
def test_the_id_is_echoed_as_it_came(proxy: Transparent, key: Any) -> None:
    client = proxy.client()
    client.session = "never-issued"
    message = client.call("tools/call", key=key).message()
    assert (message["id"], type(message["id"])) == (key, type(key))


def test_an_unknown_session_id_on_initialize_is_no_obstacle(
    proxy: Transparent, target: HttpBackend
) -> None:
    client = proxy.client()
    client.session = "never-issued"
    assert client.initialize().status == 200
    assert "mcp-session-id" not in target.last.names
    assert client.result("tools/call")["backend"] == "target"


def test_one_replica_without_storage_works_as_ever(target: HttpBackend) -> None:
    target.reset()
    app = TransparentProxy(target.url)
    try:
        front = LocalFront(app)
        client = McpClient(front).open()
        assert client.result("tools/call")["backend"] == "target"
        client.session = "unknown"
        assert client.call("tools/call").status == 400
        front.close()
    finally:
        app.close()


def test_one_gunicorn_without_storage_works_as_ever(target: HttpBackend) -> None:
    from tests.support.proxy_process import ProxyProcess
    from tests.support.transparent import PlainFront

    target.reset()
    with ProxyProcess(options=["--target-url", target.url]) as process:
        front = PlainFront(process.base)
        client = McpClient(front).open()
        assert client.result("tools/call")["backend"] == "target"
        assert client.delete().status == 200
        assert client.call("tools/call").status == 404
        client.session = "unknown"
        assert client.call("tools/call").status == 400
        front.close()


def test_every_transport_takes_a_storage_and_has_a_local_one() -> None:
    names = [name for name in mcp_proxy.__all__ if name.endswith("Proxy")]
    assert len(names) == 3
    for name in names:
        parameters = inspect.signature(getattr(mcp_proxy, name)).parameters
        assert parameters["session_storage"].default is None
    for made, first in ((TransparentProxy, "http://h:1"), (mcp_proxy.StreamableProxy, ["x"])):
        storage = LocalStorage()
        with (
            made(first) as plain,
            made(first, session_storage=storage) as given,
            made(first, storage) as same,
            made(first, storage, name="n") as named,
        ):
            assert isinstance(plain.manager.storage, LocalStorage)
            assert given.manager.storage is same.manager.storage
            assert given.manager.storage not in (plain.manager.storage, named.manager.storage)
            assert named.manager.storage is storage.scoped("n")


def test_create_app_gives_one_manager_to_all() -> None:
    app = create_app(from_values({"target_url": ["http://127.0.0.1:9"]}))
    assert len({id(proxy.manager) for proxy in app.proxies.values()}) == 1
    assert isinstance(app.proxies["default"].manager, SessionManager)
    app.close()


# --- where requests go ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "path", "expected"),
    [
        ("", "/mcp", "/mcp"),
        ("/", "/x", "/x"),
        ("/mcp", "/mcp", "/mcp"),
        ("/mcp", "/.well-known/y", "/.well-known/y"),
        ("/v2/mcp?t=a,b", "/mcp?c=1", "/v2/mcp?t=a,b&c=1"),
        ("/v2/mcp", "/", "/v2/mcp"),
        ("/v2/mcp", "/mcp/", "/v2/mcp"),
        ("", "/mcp/", "/mcp/"),
        ("", "/a%2Fb%20c?d=%26", "/a%2Fb%20c?d=%26"),
        ("/v2/mcp", "/mcp/deeper", "/mcp/deeper"),
    ],
)
def test_the_table_of_paths(target: HttpBackend, suffix: str, path: str, expected: str) -> None:
    target.reset()
    app = create_app(from_values({"target_url": [target.url + suffix]}))
    target.on("PUT", expected.partition("?")[0], reply(200))
    path, _, query = path.partition("?")
    environ = {"QUERY_STRING": query, "REQUEST_URI": path + (f"?{query}" if query else "")}
    from werkzeug.test import Client

    answer = Client(app).open(path, method="PUT", environ_overrides=environ)
    answer.close()
    app.close()
    assert answer.status_code == 200
    assert target.last.target == expected


@pytest.mark.parametrize(("suffix", "expected"), [("", "/mcp?c=1"), ("/z", "/z?c=1")])
def test_the_table_of_paths_in_a_session(
    proxy: Transparent, other: HttpBackend, suffix: str, expected: str
) -> None:
    client = known(other, proxy.in_record(backend_url=other.url + suffix))
    client.path = "/mcp?c=1"
    client.result("tools/call")
    assert other.last.target == expected


def test_a_url_that_is_not_allowed_is_not_used(proxy: Transparent, target: HttpBackend) -> None:
    with HttpBackend() as foreign:
        client = known(target, proxy.in_record(backend_url=foreign.url))
        assert client.result("tools/call")["backend"] == "target"
        assert foreign.seen == []


@pytest.mark.parametrize("way", BOTH)
def test_a_star_allows_every_url(
    way: str, target: HttpBackend, other: HttpBackend, redis_url: str
) -> None:
    with transparent(way, target.url, redis_url, allowed_backends=["*"]) as proxy:
        client = known(other, proxy.in_record(backend_url=other.url))
        assert client.result("tools/call")["backend"] == "other"


def test_an_address_that_the_target_resolves_to_is_allowed(target: HttpBackend) -> None:
    app = create_app(from_values({"target_url": [f"http://localhost:{target.port}"]}))
    manager = app.proxies["default"].manager
    proxy = Transparent("wsgi", LocalFront(app), manager)
    client = known(target, proxy.in_record(backend_url=target.url))
    assert client.result("tools/call")["backend"] == "target"
    assert target.last.header("Host") == f"127.0.0.1:{target.port}"
    client = known(target, proxy.in_record(backend_url=target.url, backend_host="localhost"))
    assert client.result("tools/call")["backend"] == "target"
    assert target.last.header("Host") == f"localhost:{target.port}"
    proxy.leave()
    app.close()


@pytest.mark.parametrize("urls", [[], ["nonsense"], ["http://h:1", "/mcp"]])
def test_target_urls_that_cannot_be_used_are_refused(urls: list[str]) -> None:
    with pytest.raises(ConfigError):
        TransparentProxy(urls)


# --- sessions ------------------------------------------------------------------------------------


def test_an_initialize_is_recorded(proxy: Transparent, target: HttpBackend) -> None:
    client = proxy.client()
    client.initialize("2025-03-26").body()
    assert client.session is not None
    session = proxy.manager.load(client.session)
    assert session.type == "mcp"
    assert session.metadata["backend_url"] == target.url
    assert session.metadata["protocol_version"] == "2025-03-26"
    assert json.loads(session.metadata["init_body"]) == target.last.json
    assert client.result("tools/call")["backend"] == "target"
    assert target.last.header("Mcp-Session-Id") == client.session


def test_a_rejected_initialize_leaves_no_record(proxy: Transparent, target: HttpBackend) -> None:
    def refuse(turn: Any) -> None:
        error = b'{"jsonrpc":"2.0","id":0,"error":{"code":-32602,"message":"no"}}'
        turn.reply(200, error, "Content-Type: application/json", "Mcp-Session-Id: refused")

    target.rpc["initialize"] = refuse
    answer = proxy.client().initialize()
    assert answer.error()["code"] == -32602
    assert not proxy.manager.exists("refused")


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_status_that_rejects_leaves_no_record(
    proxy: Transparent, target: HttpBackend, status: int
) -> None:
    target.rpc["initialize"] = reply(status, b"no", "Mcp-Session-Id: rejected")
    assert proxy.client().initialize().status == status
    assert not proxy.manager.exists("rejected")


def test_a_compressed_initialize_is_recorded(proxy: Transparent, target: HttpBackend) -> None:
    import gzip

    def compressed(turn: Any) -> None:
        answer = {"jsonrpc": "2.0", "id": 0, "result": {"protocolVersion": "2025-06-18"}}
        body = gzip.compress(json.dumps(answer).encode())
        headers = ["Content-Type: application/json", "Content-Encoding: gzip"]
        turn.reply(200, body, *headers, *target.new_session())

    target.rpc["initialize"] = compressed
    client = proxy.client()
    answer = client.initialize()
    assert b"2025-06-18" in gzip.decompress(answer.body())
    assert client.result("tools/call")["backend"] == "target"


def test_an_initialize_answered_by_a_stream_is_recorded(
    proxy: Transparent, target: HttpBackend
) -> None:
    event = b'event: message\ndata: {"jsonrpc":"2.0","id":0,"result":{"protocolVersion":"x"}}\n\n'

    def act(turn: Any) -> None:
        stream(event, headers=tuple(target.new_session()))(turn)

    target.rpc["initialize"] = act
    client = proxy.client()
    assert client.initialize().message()["result"] == {"protocolVersion": "x"}
    assert client.session is not None
    assert proxy.manager.load(client.session).metadata["protocol_version"] == "x"


def test_an_id_that_is_taken_is_given_under_an_alias(
    proxy: Transparent, target: HttpBackend
) -> None:
    taken = proxy.record(backend_url="http://elsewhere").id

    def take(turn: Any) -> None:
        result = {"protocolVersion": "2025-06-18"}
        target.sessions.add(taken)
        turn.result(result, f"Mcp-Session-Id: {taken}")

    target.rpc["initialize"] = take
    client = proxy.client()
    client.initialize().body()
    assert client.session not in (None, taken)
    target.rpc["tools/list"] = lambda turn: turn.result({}, f"mcp-session-id: {taken}")
    answer = client.call("tools/list")
    assert target.last.header("Mcp-Session-Id") == taken
    assert answer.headers["Mcp-Session-Id"] == client.session
    target.sessions.discard(taken)


@pytest.mark.parametrize("theirs", ["a b", "x" * 1025])
def test_an_id_that_cannot_be_one_is_given_under_an_alias(
    proxy: Transparent, target: HttpBackend, theirs: str
) -> None:
    target.sessions.add(theirs)
    target.rpc["initialize"] = lambda turn: turn.result(
        {"protocolVersion": "2025-06-18"}, f"Mcp-Session-Id: {theirs}"
    )
    client = proxy.client().open()
    assert client.session is not None
    assert client.session.startswith("mcp-")
    answer = client.call("tools/call")
    assert answer.message()["result"]["backend"] == "target"
    assert target.last.header("Mcp-Session-Id") == theirs
    target.sessions.discard(theirs)


def test_a_session_that_was_deleted_is_404(proxy: Transparent, target: HttpBackend) -> None:
    client = proxy.client().open()
    assert client.delete().status == 200
    assert client.session in target.ended
    for method in ("POST", "GET", "DELETE"):
        answer = client.request(method, b"{}" if method == "POST" else None)
        assert answer.status == 404
        assert answer.error()["code"] == -32001


@pytest.mark.parametrize(("status", "is_over"), [(200, True), (204, True), (404, True)])
def test_a_delete_that_the_backend_accepts_ends_the_session(
    proxy: Transparent, target: HttpBackend, status: int, is_over: bool
) -> None:
    client = proxy.client().open()
    target.on("DELETE", "/mcp", reply(status))
    assert client.delete().status == status
    assert client.session is not None
    assert proxy.manager.exists(client.session) is not is_over


@pytest.mark.parametrize("status", [405, 400, 500])
def test_a_delete_that_the_backend_refuses_keeps_the_session(
    proxy: Transparent, target: HttpBackend, status: int
) -> None:
    client = proxy.client().open()
    target.on("DELETE", "/mcp", reply(status))
    assert client.delete().status == status
    assert client.result("tools/call")["backend"] == "target"


def test_a_delete_ends_a_session_whose_backend_is_gone(
    proxy: Transparent, target: HttpBackend
) -> None:
    client = proxy.client().open()
    target.on("DELETE", "/mcp", reset)
    assert client.delete().status == 204
    assert client.call("tools/call").status == 404


@pytest.mark.parametrize("way", BOTH)
def test_backends_without_session_ids_work(way: str, redis_url: str) -> None:
    with (
        HttpBackend(issues_sessions=False) as backend,
        transparent(way, backend.url, redis_url) as proxy,
    ):
        client = proxy.client()
        answer = client.initialize()
        assert answer.status == 200
        assert client.session is None
        assert client.result("tools/call")["backend"] == "backend"


@pytest.mark.parametrize("way", BOTH)
def test_a_store_that_is_away_is_503(
    way: str, target: HttpBackend, own_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.reset()
    server: RedisServer = own_redis()
    with transparent(way, target.url, server.url, connect_timeout=1) as proxy:
        client = proxy.client().open()
        if way == "gunicorn":
            server.stop()
        else:

            def away(session_id: str) -> Any:
                raise StorageUnavailable

            monkeypatch.setattr(proxy.manager.storage, "load", away)
        answer = client.call("tools/call")
        assert (answer.status, answer.failure) == (200, "store-unavailable")
        assert answer.headers["Retry-After"]
        assert answer.error()["code"] == -32000
        if way == "gunicorn":
            assert (
                client.initialize().failure == "store-unavailable"
            )  # the backend's session is given up
            assert proxy.request("GET", "/healthz").status == 200
            eventually(lambda: proxy.request("GET", "/readyz").status == 503)
            server.start()
            client.session = target.calls("tools/call")[-1:] and client.session
        monkeypatch.undo()
        assert proxy.client().open().result("tools/call")["backend"] == "target"


def test_a_store_that_is_away_leaves_no_call_behind(
    target: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> Any:
        raise StorageUnavailable

    target.reset()
    with TransparentProxy(target.url) as proxy:
        front = LocalFront(proxy)
        asks = {"create": McpClient(front).initialize, "delete": McpClient(front).open().delete}
        for name, ask in asks.items():
            front.close()
            monkeypatch.setattr(proxy.manager.storage, name, away)
            answer = ask()
            assert answer.status == (503 if name == "delete" else 200)
            assert answer.failure == "store-unavailable"
            assert not proxy.is_busy
            monkeypatch.undo()


@pytest.mark.parametrize("way", BOTH)
def test_a_session_that_cannot_be_recorded_is_ended_at_its_backend(
    way: str, own_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> Any:
        raise StorageUnavailable

    server: RedisServer = own_redis()
    with (
        HttpBackend() as backend,
        transparent(way, backend.url, server.url, connect_timeout=1) as proxy,
    ):
        if way == "gunicorn":
            server.stop()
        else:
            monkeypatch.setattr(proxy.manager.storage, "create", away)
        sticky = "Set-Cookie: route=r1"
        backend.rpc["initialize"] = lambda turn: backend.initialize(turn, sticky)
        answer = proxy.client().initialize(Authorization="Bearer mine")
        assert (answer.status, answer.failure) == (200, "store-unavailable")
        assert len(backend.ended) == 1
        assert backend.sessions == set()
        assert backend.last.header("Cookie") == "route=r1"
        assert (backend.last.method, backend.last.header("Authorization")) == (
            "DELETE",
            "Bearer mine",
        )


def test_a_handshake_of_which_the_end_cannot_be_recorded_is_answered(
    target: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> Any:
        raise StorageUnavailable

    with TransparentProxy(target.url) as proxy, contextlib.closing(LocalFront(proxy)) as front:
        client = McpClient(front)
        with monkeypatch.context() as patch:
            patch.setattr(proxy.manager.storage, "swap", away)
            assert client.initialize().message()["result"]
        assert client.result("tools/call")["backend"] == "target"


@pytest.mark.parametrize("content_type", [JSON, "text/event-stream"])
@pytest.mark.parametrize("accept", [JSON, "text/event-stream"])
def test_what_counts_as_a_standing_stream_is_the_answer(
    target: HttpBackend, accept: str, content_type: str
) -> None:
    """The end of the streams ends those alone; a file may be read to its end."""
    target.reset()
    feed = Feed()
    target.on("GET", "/x", stream(b"one", feed, content_type=content_type))
    with TransparentProxy(target.url) as proxy:
        front = LocalFront(proxy)
        answer = front.request("GET", "/x", {"Accept": accept}, None)
        assert proxy.is_busy is (content_type == JSON)
        proxy.end_streams()
        feed.put(b"two")
        feed.put(None)
        assert answer.body() in ([b"onetwo"] if content_type == JSON else [b"", b"one"])
        front.close()
        assert repr(proxy).startswith("<TransparentProxy calls=0 ")


# --- modern requests -----------------------------------------------------------------------------


def modern(method: str = "tools/call", **more: Any) -> Json:
    meta = {"io.modelcontextprotocol/protocolVersion": MODERN}
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"_meta": meta, **more}}


def test_modern_requests_pass_without_a_look_up(proxy: Transparent, target: HttpBackend) -> None:
    client = proxy.client()
    client.session = "a-stray-one"
    answer = client.post(modern(), Mcp_Protocol_Version=MODERN, Mcp_Method="tools/call")
    assert answer.status == 200
    assert answer.message()["result"]["backend"] == "target"
    assert "mcp-session-id" not in target.last.names
    assert target.last.header("Mcp-Method") == "tools/call"
    assert target.last.json == modern()


@pytest.mark.parametrize(
    ("method", "status", "code"), [("server/discover", 502, -32603), ("tools/call", 200, -32000)]
)
def test_a_failed_discover_makes_no_client_a_legacy_one(
    method: str, status: int, code: int
) -> None:
    gone = HttpBackend()
    gone.stop()
    with TransparentProxy(gone.url) as proxy:
        client = McpClient(LocalFront(proxy))
        answer = client.post(modern(method), Mcp_Protocol_Version=MODERN)
        assert (answer.status, answer.failure) == (status, "server-unreachable")
        message = answer.message()
        assert (message["id"], message["error"]["code"]) == (modern()["id"], code)


def test_what_cannot_be_delivered_counts_as_accepted() -> None:
    target = HttpBackend()
    with TransparentProxy(target.url) as proxy:
        client = McpClient(LocalFront(proxy))
        target.stop()
        told = client.notify("notifications/x")
        assert (told.status, told.failure, told.body()) == (202, "server-unreachable", b"")
        client.session = "never-issued"
        assert client.notify("notifications/x").status == 400


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_modern_methods_without_a_body_pass(
    proxy: Transparent, target: HttpBackend, method: str
) -> None:
    target.on(method, "/mcp", reply(405, b"", "Allow: POST"))
    answer = proxy.request(method, "/mcp", Mcp_Session_Id="stray", Mcp_Protocol_Version=MODERN)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert "mcp-session-id" not in target.last.names


def test_modern_requests_send_redis_nothing(target: HttpBackend, redis_server: RedisServer) -> None:
    with transparent("gunicorn", target.url, redis_server.url) as proxy:
        client = proxy.client()
        client.session = "stray"
        client.post(modern(), Mcp_Protocol_Version=MODERN).body()
        with recorded_commands(redis_server) as commands:
            for _ in range(20):
                assert client.post(modern(), Mcp_Protocol_Version=MODERN).status == 200
        assert commands == []


def test_a_call_in_a_session_is_one_getex(target: HttpBackend, redis_server: RedisServer) -> None:
    def counts() -> dict[str, int]:
        with redis_server.client() as redis:
            found: Any = redis.info("commandstats")
        counted = {name: entry["calls"] for name, entry in found.items()}
        return {n: c for n, c in counted.items() if n not in ("cmdstat_info", "cmdstat_hello")}

    with transparent("gunicorn", target.url, redis_server.url) as proxy:
        client = proxy.client().open()
        client.result("tools/call")
        before = counts()
        for _ in range(200):
            client.result("tools/call")
        after = counts()
    used = {name: c - before.get(name, 0) for name, c in after.items() if c != before.get(name)}
    ours = {n: c for n, c in used.items() if not n.startswith("cmdstat_client")}
    assert ours == {"cmdstat_getex": 200}


# --- several targets -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", BOTH)
def test_sessions_are_spread_and_stay(
    way: str, target: HttpBackend, other: HttpBackend, redis_url: str
) -> None:
    target.reset()
    with transparent(way, [target.url, other.url], redis_url) as proxy:
        clients = [proxy.client().open() for _ in range(6)]
        homes = [client.result("tools/call")["backend"] for client in clients]
        assert sorted(homes) == ["other"] * 3 + ["target"] * 3
        for client, home in zip(clients, homes, strict=True):
            for _ in range(3):
                assert client.result("tools/call")["backend"] == home


@pytest.mark.parametrize("way", BOTH)
def test_a_target_that_refuses_is_passed_over(
    way: str, target: HttpBackend, redis_url: str
) -> None:
    target.reset()
    gone = HttpBackend()
    gone.stop()
    with transparent(way, [gone.url, target.url], redis_url) as proxy:
        for _ in range(3):
            assert proxy.client().open().result("tools/call")["backend"] == "target"
        assert proxy.request("GET", "/readyz").status == 200


@pytest.mark.parametrize("way", BOTH)
def test_no_target_is_an_error_and_not_ready(way: str, redis_url: str) -> None:
    gone = HttpBackend()
    gone.stop()
    with transparent(way, gone.url, redis_url) as proxy:
        answer = proxy.client().initialize()
        assert (answer.status, answer.failure) == (200, "server-unreachable")
        assert answer.message() == {
            "jsonrpc": "2.0",
            "id": 0,
            "error": {
                "code": -32000,
                "message": "The server cannot be reached: the connection was refused",
            },
        }
        assert proxy.request("GET", "/readyz").status == 503
        gone.start()
        assert proxy.client().initialize().has_succeeded
        eventually(lambda: proxy.request("GET", "/readyz").status == 200)
        gone.stop()


# --- time limits ---------------------------------------------------------------------------------


def test_a_silent_backend_is_an_error_and_told(proxy: Transparent, target: HttpBackend) -> None:
    client = proxy.client().open()
    target.rpc["hang"] = silent
    begun = time.monotonic()
    answer = client.call("hang", key="k")
    assert (answer.status, answer.failure) == (200, "server-timeout")
    message = answer.message()
    assert message["id"] == "k"
    assert message["error"]["code"] == -32000
    cancelled = eventually(lambda: target.calls("notifications/cancelled"))
    assert cancelled[0].json["params"]["requestId"] == "k"
    assert cancelled[0].header("Mcp-Session-Id") == client.session
    assert time.monotonic() - begun < 5
    assert client.result("tools/call")["backend"] == "target"


def test_a_backend_that_is_silent_altogether_costs_one_limit(target: HttpBackend) -> None:
    target.reset()
    with (
        TransparentProxy(target.url, options=ProxyOptions(request_timeout=4)) as proxy,
        contextlib.closing(LocalFront(proxy)) as front,
    ):
        client = McpClient(front).open()
        target.rpc["hang"] = silent
        target.rpc["notifications/cancelled"] = silent
        begun = time.monotonic()
        assert client.call("hang").failure == "server-timeout"
        assert 4 <= time.monotonic() - begun < 7.5


def test_a_silent_initialize_is_an_error(proxy: Transparent, target: HttpBackend) -> None:
    target.rpc["initialize"] = silent
    answer = proxy.client().initialize()
    assert (answer.failure, answer.error()["code"]) == ("server-timeout", -32000)
