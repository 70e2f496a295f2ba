"""Transports as somebody else's program makes them: over one store, with and without a name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import redis.asyncio

from mcp_proxy import (
    Application,
    ConfigError,
    EventLog,
    HttpServer,
    LocalStorage,
    ProxyConfig,
    ProxyOptions,
    RedisStorage,
    Session,
    SessionManager,
    SSEProxy,
    StdioServer,
    Storage,
    StreamableProxy,
    TransparentProxy,
    create_app,
    demo_server,
)
from mcp_proxy.transports.stdio import StdioTransport
from tests.servers.http_backend import HttpBackend
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.proxy_process import children_of
from tests.support.sse_client import SseClient
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually

#: The same server by another command.
OTHER = (*SCRIPTED, "--log-first", "0")

#: Nobody is there.
AWAY = "http://127.0.0.1:9"

Make = Callable[..., StreamableProxy]


@pytest.fixture
def shared(redis_url: str, redis_prefix: str) -> Iterator[RedisStorage]:
    """One store in Redis."""
    with closing(RedisStorage(redis_url, prefix=redis_prefix, timeout=1)) as storage:
        yield storage


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes proxies that are closed in the end, the last one first."""
    with ExitStack() as stack:

        def making(*arguments: Any, **options: Any) -> StreamableProxy:
            return stack.enter_context(StreamableProxy(*arguments, **options))

        yield making


def client_of(proxy: StdioTransport) -> McpClient:
    return McpClient(WsgiFront(proxy), "/")


def at(proxy: StdioTransport, client: McpClient) -> McpClient:
    """The session of a client, as another proxy sees it."""
    return client.at(WsgiFront(proxy))


# --- two over one store --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"command": SCRIPTED}, {"command": OTHER}),
        ({"command": SCRIPTED}, {"command": StdioServer("default", SCRIPTED, cwd="/")}),
        ({"command": SCRIPTED, "name": "a"}, {"command": SCRIPTED, "name": "b"}),
        ({"command": SCRIPTED, "name": "a"}, {"command": SCRIPTED}),
    ],
    ids=["commands", "directories", "names", "a-name-and-none"],
)
@pytest.mark.parametrize("kind", ["redis", "local"])
def test_what_differs_never_serves_each_others_sessions(
    shared: RedisStorage, make: Make, kind: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    storage = shared if kind == "redis" else LocalStorage()
    one, two = (make(session_storage=storage, **settings) for settings in (first, second))
    ours, theirs = client_of(one).open(), client_of(two).open()
    for stranger in (at(two, ours), at(one, theirs)):
        assert stranger.call("count").status in (400, 404)
        assert stranger.notify("notifications/initialized").status in (400, 404)
        assert stranger.listen().status in (400, 404)
        assert stranger.delete().status in (400, 404)
    for client in (ours, theirs):
        assert client.result("count")["calls"] == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"command": SCRIPTED, "name": "a"}, {"command": SCRIPTED, "name": "a"}),
        ({"command": SCRIPTED, "name": "a"}, {"command": OTHER, "name": "a"}),
        ({"command": SCRIPTED}, {"command": SCRIPTED}),
    ],
    ids=["a-name", "a-name-for-another-command", "a-command"],
)
def test_what_is_the_same_serves_each_others_sessions(
    shared: RedisStorage, make: Make, first: dict[str, Any], second: dict[str, Any]
) -> None:
    one, two = (make(session_storage=shared, **settings) for settings in (first, second))
    ours, theirs = client_of(one).open(), client_of(two).open()
    for client, other in ((ours, at(two, ours)), (theirs, at(one, theirs))):
        counted = [caller.result("count") for caller in (client, other, client, other)]
        assert [count["calls"] for count in counted] == [1, 2, 3, 4]
        assert len({count["pid"] for count in counted}) == 1
    assert at(two, ours).delete().status in (200, 204)
    assert ours.call("count").status == 404


def test_what_one_hands_over_the_other_brings_back(shared: RedisStorage, make: Make) -> None:
    one, two = (make(SCRIPTED, shared, name="a") for _ in range(2))
    client = client_of(one).open()
    before = client.result("count")
    one.close(timeout=5)
    after = at(two, client).result("count")
    assert after["calls"] == 1
    assert after["pid"] != before["pid"]


def test_a_manager_of_the_same_name_sees_the_records(
    shared: RedisStorage, make: Make, redis_url: str, redis_prefix: str
) -> None:
    proxy = make(SCRIPTED, shared, name="a")
    client = client_of(proxy).open()
    assert client.session is not None
    managers = {
        name: SessionManager.with_redis(redis_url, prefix=redis_prefix, name=name)
        for name in ("a", "b", "default")
    }
    try:
        session = managers["a"].load(client.session)
        assert session.type == "streamable"
        assert session.metadata["protocol_version"] == "2025-06-18"
        assert not managers["b"].exists(client.session)
        assert not managers["default"].exists(client.session)
        managers["a"].end(client.session)
        eventually(lambda: client.call("count").status == 404)  # within a second
    finally:
        for manager in managers.values():
            manager.storage.close()


# --- whether it is ready -------------------------------------------------------------------------


def test_a_closed_proxy_is_not_ready() -> None:
    proxy = StreamableProxy(SCRIPTED)
    assert proxy.not_ready_reason() is None
    proxy.close()
    assert proxy.not_ready_reason() == "shutting down"


@pytest.mark.parametrize(
    "make_proxy",
    [lambda store: StreamableProxy(SCRIPTED, store), lambda store: TransparentProxy(AWAY, store)],
    ids=["stdio", "http"],
)
def test_a_proxy_whose_store_is_away_is_not_ready(make_proxy: Any) -> None:
    with (
        closing(RedisStorage("redis://127.0.0.1:1", timeout=1)) as storage,
        make_proxy(storage) as it,
    ):
        assert "127.0.0.1:1" in it.not_ready_reason()


def test_a_proxy_whose_sessions_are_all_taken_is_not_ready() -> None:
    with StreamableProxy(SCRIPTED, options=ProxyOptions(max_sessions=1)) as proxy:
        client = client_of(proxy).open()
        assert proxy.not_ready_reason() == "all 1 sessions of this worker are taken"
        client.delete()
        assert proxy.not_ready_reason() is None
    with StreamableProxy(SCRIPTED, options=ProxyOptions(max_sessions=1, evict_after=0.01)) as proxy:
        client_of(proxy).open()
        eventually(lambda: proxy.not_ready_reason() is None)


def test_an_application_can_be_asked_and_ended_as_a_proxy_can() -> None:
    config = ProxyConfig(command=SCRIPTED, max_sessions=1)
    with create_app(config) as app:
        assert app.not_ready_reason() is None
        client = McpClient(WsgiFront(app)).open()
        assert app.not_ready_reason() is None, "its session is served"
        call = client.call("sleep", {"seconds": 0.5, "token": "slow"})
        app.close(timeout=20)
        assert call.message()["result"]["token"] == "slow"
        assert app.not_ready_reason() == "shutting down"
    with create_app(ProxyConfig(command=("/nowhere/server",))) as app:
        assert app.not_ready_reason() == "server default: /nowhere/server is not an executable file"


def test_a_manager_finds_the_sessions_of_an_application(redis_url: str, redis_prefix: str) -> None:
    config = ProxyConfig(command=SCRIPTED, redis_url=redis_url, redis_prefix=redis_prefix)
    manager = SessionManager.with_redis(redis_url, prefix=redis_prefix)
    with create_app(config) as app, closing(manager.storage):
        client = McpClient(WsgiFront(app)).open()
        assert client.session is not None
        assert manager.load(client.session).id == client.session


# --- what is given wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_one", "complaint"),
    [
        (lambda: StreamableProxy(SCRIPTED, "redis://localhost"), "session_storage .* not str"),
        (lambda: TransparentProxy(AWAY, "redis://localhost"), "session_storage .* not str"),
        (lambda: StreamableProxy(SCRIPTED, options={}), "options must be ProxyOptions.* not dict"),
        (lambda: TransparentProxy(AWAY, options={"threads": 4}), "options must be ProxyOptions"),
        (lambda: StreamableProxy(SCRIPTED, name=""), "name must be a text that is not empty"),
        (
            lambda: StreamableProxy(SCRIPTED, name=7),
            "StdioServer: name: expected a text, got a number",
        ),
        (lambda: StreamableProxy([]), "command of a stdio server is empty"),
        (lambda: StreamableProxy(7), "A command is a text or a list of texts, not 7"),
        (lambda: StreamableProxy(["a", 1]), "A command is a text or a list of texts"),
        (lambda: StdioServer("x", ()), "command of a stdio server is empty"),
        (lambda: StdioServer(7, ("a",)), "StdioServer: name: expected a text, got a number"),
        (lambda: StdioServer("", "a"), "StdioServer: name: .* not empty"),
        (lambda: StdioServer("x", ("",)), "command of a stdio server is empty"),
        (lambda: StdioServer("x", ("a", "b\0")), "x: an argument .* has a NUL character"),
        (lambda: StdioServer("x", "a", {"N": 1}), "env: .* texts, got one with a number in it$"),
        (lambda: StdioServer("x", "a", None), "StdioServer: env: expected .* texts, got null"),
        (
            lambda: StdioServer("x", "a", {"A=B": "1"}),
            r"x: 'A=\*\*\*' is no name of an environment",
        ),
        (lambda: StdioServer("x", "a", {"": "1"}), "x: '' is no name of an environment"),
        (lambda: StdioServer("x", "a", {"A": "b\0"}), "x: the variable 'A' has a NUL"),
        (lambda: StdioServer("x", "a", cwd=5), "StdioServer: cwd: expected a text, got a number"),
        *[
            (
                lambda kind=kind, wrong=wrong: kind("x", "http://h/", timeout=wrong),
                "Server: timeout: expected a number above 0 and at most 315360000, got",
            )
            for kind in (StdioServer, HttpServer)
            for wrong in (0, -1, math.nan, math.inf, "5", True)
        ],
        (lambda: HttpServer("", "http://h/"), "HttpServer: name: .* not empty"),
        (lambda: HttpServer("x", 5), "HttpServer: urls: expected a list of texts, got a number"),
        (lambda: HttpServer("x", (5,)), "urls: .* list of texts, got one with a number in it"),
        (lambda: HttpServer("x", "http://h/", "A: b"), "headers: .* list of texts, got a text"),
        (lambda: HttpServer("x", "http://h/", ("A",)), "x: .* header .* 'Name: value'"),
        (lambda: HttpServer("x", "http://h/", ("A: b\r\nC: d",)), "x: .* header 'A'"),
        (lambda: HttpServer("x", ()), "x: its URLs must be absolute"),
        (lambda: HttpServer("x", ("localhost:1",)), "x: its URLs must be absolute"),
        (lambda: TransparentProxy(7), "target_url takes absolute"),
        (lambda: TransparentProxy([7]), "target_url takes absolute"),
        (lambda: TransparentProxy(AWAY, allowed_backends=[7]), "allowed_backends takes a list"),
        (lambda: TransparentProxy(AWAY, verify="/nowhere.pem"), "verify: '/nowhere.pem' cannot be"),
        (lambda: TransparentProxy(AWAY, verify=None), "verify is True, False or a file"),
        (lambda: TransparentProxy(AWAY, resolver="dns"), "resolver is a function"),
        (lambda: RedisStorage("localhost"), "The URL of Redis .* cannot be read"),
        (lambda: RedisStorage("redis://localhost", ttl=0), "ttl must be a number of seconds"),
        (lambda: LocalStorage(ttl=-1), "ttl must be a number of seconds"),
        (lambda: LocalStorage(ttl="60"), "ttl must be a number of seconds above 0 .* not '60'"),
        (lambda: LocalStorage(ttl=True), "ttl must be a number of seconds above 0"),
        *[
            (
                lambda wrong=wrong: RedisStorage("redis://localhost", timeout=wrong),
                "timeout must be a number of seconds above 0",
            )
            for wrong in (0, -1, math.nan, "5", None, True)
        ],
        (lambda: RedisStorage(5), "client must be a redis-py client, .* or a URL, not int"),
        (lambda: RedisStorage(b"redis://h"), "client must be a redis-py client, .* not bytes"),
        (lambda: RedisStorage(redis.asyncio.Redis()), "client must be a redis-py client"),
        (lambda: RedisStorage("redis://localhost", prefix=5), "prefix must be a text, not 5"),
        (lambda: RedisStorage("redis://localhost").scoped(""), "name must be a text that is not"),
        (lambda: LocalStorage().scoped(5), "name must be a text that is not empty, not 5"),
        (lambda: SessionManager.with_redis(5), "client must be a redis-py client"),
        (lambda: SessionManager("redis://localhost"), "storage must be a Storage, .* not str"),
        (lambda: SessionManager(unknown_status=200), "unknown_status must be 400 or 404, not 200"),
        (lambda: create_app({}), "config must be ProxyConfig.*, not dict"),
        (lambda: create_app(ProxyOptions()), "config must be ProxyConfig.*, not ProxyOptions"),
        (lambda: Application(None), "config must be ProxyConfig.*, not NoneType"),
        (lambda: ProxyConfig.from_env({"MCP_PROXY_THREADS": 8}), "MCP_PROXY_THREADS: .* not int"),
    ],
)
def test_what_does_not_fit_is_said_when_it_is_given(make_one: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_one()


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, "x", None])
def test_a_time_to_close_that_is_none_closes_nothing(wrong: Any) -> None:
    complaint = "timeout must be a number of seconds from 0 "
    with (
        create_app(ProxyConfig(command=SCRIPTED)) as app,
        StreamableProxy(SCRIPTED) as streamable,
        TransparentProxy(AWAY) as transparent,
    ):
        for each in (app, streamable, transparent):
            with pytest.raises(ConfigError, match=complaint):
                each.close(wrong)
            assert not each.edge.is_draining


def test_a_server_takes_its_command_as_a_text() -> None:
    assert StdioServer("x", "python -m 'a b'").argv == ("python", "-m", "a b")  # type: ignore[arg-type]


# --- the end -------------------------------------------------------------------------------------


def test_closing_twice_is_harmless_and_leaves_the_store_open(shared: RedisStorage) -> None:
    proxy = StreamableProxy(SCRIPTED, shared)
    client_of(proxy).open()
    for _ in range(2):
        proxy.close()
        assert proxy.owner.supervisor.children == 0
    proxy.close(timeout=0.1)
    proxy.close(timeout=8)
    shared.check()


@pytest.mark.parametrize("was_used", [True, False])
def test_a_closed_proxy_refuses_sessions_and_starts_no_process(was_used: bool) -> None:
    before = set(children_of(os.getpid()))
    proxy = StreamableProxy(SCRIPTED)
    if was_used:
        client_of(proxy).open()
        assert set(children_of(os.getpid())) > before
    proxy.close()
    eventually(lambda: set(children_of(os.getpid())) <= before)
    assert client_of(proxy).initialize().failure == "draining"
    assert SseClient(WsgiFront(proxy)).connect().status == 404
    assert set(children_of(os.getpid())) <= before


def test_a_closed_proxy_serves_no_session_either(shared: RedisStorage, make: Make) -> None:
    proxy = make(SCRIPTED, shared)
    client = client_of(proxy).open()
    proxy.close()
    answers = (client.call("count"), client.notify("notifications/x"), client.listen())
    assert [answer.status for answer in answers] == [200, 202, 503]
    assert {answer.failure for answer in answers} == {"draining"}
    assert proxy.owner.supervisor.children == 0


def test_running_calls_get_the_time_that_close_is_given() -> None:
    with StreamableProxy(SCRIPTED) as proxy:
        call = client_of(proxy).open().call("sleep", {"seconds": 0.5, "token": "slow"})
        proxy.close(timeout=20)
        assert call.message()["result"]["token"] == "slow"


@pytest.mark.parametrize("kind", [StreamableProxy, SSEProxy])
def test_the_end_of_the_block_closes(kind: type[StdioTransport]) -> None:
    with kind(SCRIPTED) as proxy:
        if kind is SSEProxy:
            SseClient(WsgiFront(proxy)).open()
        else:
            client_of(proxy).open()
        assert proxy.owner.supervisor.children == 1
    assert proxy.owner.supervisor.children == 0
    answer = client_of(proxy).initialize()
    assert answer.status == 404 or answer.failure == "draining"


# --- a store of the user's own -------------------------------------------------------------------


class Plain(Storage):
    """What somebody has written who read the abstract methods, and no further."""

    def __init__(self) -> None:
        self._records = LocalStorage()

    def create(self, session: Session) -> None:
        self._records.create(session)

    def load(self, session_id: str) -> Session:
        return self._records.load(session_id)

    def exists(self, session_id: str) -> bool:
        return self._records.exists(session_id)

    def peek(self, session_id: str) -> Session | None:
        return self._records.peek(session_id)

    def swap(self, old: Session, new: Session) -> bool:
        return self._records.swap(old, new)

    def delete(self, session_id: str) -> None:
        self._records.delete(session_id)

    def issued(self, session_id: str) -> bool:
        return self._records.issued(session_id)

    def event_log(self) -> EventLog:
        return self._records.event_log()

    def check(self) -> None:
        self._records.check()

    def close(self) -> None:
        self._records.close()


def test_a_plain_store_has_every_abstract_method_and_no_more() -> None:
    assert Storage.__abstractmethods__ == {name for name in vars(Plain) if name[0] != "_"}


def test_a_plain_store_works_without_a_name(make: Make) -> None:
    storage = Plain()
    proxy = make(SCRIPTED, storage)
    client = client_of(proxy).open()
    assert client.session is not None
    assert storage.exists(client.session)
    assert client.result("count")["calls"] == 1
    client.call("die")
    assert eventually(lambda: client.result("count")["calls"]) == 1, "it is brought back"
    assert client.delete().status == 204
    assert not storage.exists(client.session)


def test_a_plain_store_works_on_the_other_wires() -> None:
    storage = Plain()
    with SSEProxy(SCRIPTED, storage) as proxy:
        client = SseClient(LocalFront(proxy)).open()
        assert storage.exists(client.session)
        assert client.result("count")["calls"] == 1
        client.close()
    with HttpBackend() as backend, TransparentProxy(backend.url, storage) as transparent:
        front = LocalFront(transparent)
        http = McpClient(front).open()
        assert http.result("tools/list")["backend"] == "backend"
        front.close()
    assert http.session is not None
    assert storage.exists(http.session)


@pytest.mark.parametrize("kind", [StreamableProxy, SSEProxy])
def test_a_plain_store_keeps_no_names_apart(kind: type[StdioTransport]) -> None:
    with pytest.raises(ConfigError, match=r"Plain .*name"):
        kind(SCRIPTED, Plain(), name="a")


def test_a_plain_store_keeps_no_names_apart_behind_http_either() -> None:
    with pytest.raises(ConfigError, match=r"Plain .*name"):
        TransparentProxy("http://127.0.0.1:9", Plain(), name="a")


def test_servers_that_differ_in_their_environment_do_not_meet() -> None:
    storage = LocalStorage()
    one, other = (
        StreamableProxy(StdioServer("server", SCRIPTED, {"TOKEN": token}), storage)
        for token in ("one", "other")
    )
    with one, other:
        client = McpClient(WsgiFront(one)).open()
        assert client.at(WsgiFront(other)).call("echo").status == 404


def test_the_time_limit_of_a_server_is_heeded() -> None:
    server = StdioServer("slow", ("sleep", "60"), timeout=0.5)
    with StreamableProxy(server) as proxy:
        answer = McpClient(LocalFront(proxy)).initialize()
        assert answer.headers["X-MCP-Proxy-Error"] == "server-timeout"


@pytest.mark.parametrize("allowed", ["http://b/*", "*", ("nonsense",), 5])
def test_allowed_backends_that_mean_nothing_are_refused(allowed: Any) -> None:
    with pytest.raises(ConfigError, match="allowed_backends takes a list"):
        TransparentProxy("http://a", allowed_backends=allowed)


def test_the_demo_server_gives_half_a_character_back() -> None:
    call = {"name": "echo", "arguments": {"text": "\ud800"}}
    with StreamableProxy(demo_server()) as proxy:
        answer = client_of(proxy).open().result("tools/call", call)
    assert answer["content"][0]["text"] in ("\ud800", "\ufffd")


def test_an_id_of_another_process_is_logged_where_nothing_is_passed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with StreamableProxy(SCRIPTED) as app:
        client = McpClient(WsgiFront(app))
        client.session = f"mcp-{'0' * 8}-{'0' * 32}"
        assert client.call("echo").status == 404
    assert "set redis_url" in caplog.text
