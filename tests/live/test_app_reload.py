"""`Application.reload`, for who embeds it, and what becomes of each kind of server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import (
    Application,
    ConfigError,
    HttpServer,
    ProxyConfig,
    StdioServer,
    create_app,
    shared_text,
)
from mcp_proxy.eras.legacy_home import LegacyHome
from mcp_proxy.server_table import ServerTable, encode
from mcp_proxy.servers import Server
from mcp_proxy.shared_text import SharedText
from tests.servers.http_backend import HttpBackend
from tests.support.era_servers import EraServerProcess
from tests.support.front import SCRIPTED, McpClient
from tests.support.modern_client import SAMPLED, ModernClient, called, server_of
from tests.support.proxy_process import is_alive
from tests.support.redis_server import RedisServer
from tests.support.reloads import ENTRY, write
from tests.support.tls import Certificates
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually

SERVER = StdioServer("one", SCRIPTED)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "servers.json"
    write(made, one=ENTRY)
    return made


@pytest.fixture(params=["memory", "redis"])
def app(
    request: pytest.FixtureRequest, file: Path, redis_server: RedisServer, redis_prefix: str
) -> Iterator[Application]:
    """An application that serves what is in `file`."""
    settings: dict[str, Any] = {"config": str(file)}
    if request.param == "redis":
        settings |= {"redis_url": redis_server.url, "redis_prefix": redis_prefix}
    with create_app(ProxyConfig(**settings)) as made:
        yield made


@pytest.fixture
def client_at(app: Application) -> Iterator[Callable[[str], McpClient]]:
    """Makes a client, without a session, of a server."""
    front = LocalFront(app)
    yield lambda name: McpClient(front, f"/servers/{name}/mcp")
    front.close()


def test_what_is_the_same_is_not_touched(
    app: Application, file: Path, client_at: Callable[[str], McpClient]
) -> None:
    client = client_at("one").open()
    before = client.result("count")
    transports = app.mounts.current.transports["one"]
    write(file, two=ENTRY, one=ENTRY)
    app.reload()
    assert app.mounts.current.transports["one"] is transports
    assert client.result("count") == {"calls": 2, "pid": before["pid"]}
    assert client_at("two").open().result("count")["calls"] == 1


@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        ({"env": {"A": "1"}}, True),
        ({"cwd": "/"}, True),
        ({"args": ["-B", *ENTRY["args"]]}, True),
        ({"timeout": 9}, False),
        ({"alwaysAllow": ["x"]}, False),
    ],
)
def test_a_process_is_replaced_where_another_one_would_be_started(
    app: Application,
    file: Path,
    client_at: Callable[[str], McpClient],
    change: dict[str, Any],
    is_new: bool,
) -> None:
    client = client_at("one").open()
    before = client.result("count")["pid"]
    write(file, one={**ENTRY, **change})
    app.reload()
    after = client.result("count")
    assert (after["pid"] != before) == is_new
    assert is_alive(before) != is_new or eventually(lambda: not is_alive(before))


def test_a_process_whose_calls_always_overlap_is_replaced_in_the_time_of_a_call(
    app: Application, file: Path, client_at: Callable[[str], McpClient]
) -> None:
    write(file, one={**ENTRY, "timeout": 3})
    app.reload()
    client = client_at("one").open()
    before = client.result("count")["pid"]
    calls: list[Future[Any]] = []
    with ThreadPoolExecutor(16) as pool:

        def is_new() -> bool:
            calls.append(pool.submit(client.result, "sleep", {"seconds": 1}))
            time.sleep(0.1)  # the last one is under way, and nine others
            return client.result("environment")["environ"].get("A") == "new"

        assert not is_new()
        write(file, one={**ENTRY, "timeout": 3, "env": {"A": "new"}})
        app.reload()
        eventually(is_new, 20)
        assert len(calls) > 3
        assert [call.result()["slept"] for call in calls] == [1] * len(calls)
    eventually(lambda: not is_alive(before))


def test_spares_of_another_command_end(file: Path) -> None:
    with create_app(ProxyConfig(config=str(file), spare_children=1)) as app:
        app.keep_spares()
        spares = app.mounts.current.owners["one"].spares
        (before,) = eventually(lambda: spares.pids)
        write(file, one={**ENTRY, "timeout": 5})
        app.reload()
        assert spares.pids == [before]
        write(file, one={**ENTRY, "env": {"A": "1"}}, two=ENTRY)
        app.reload()
        eventually(lambda: not is_alive(before))
        eventually(lambda: spares.pids and spares.pids != [before])
        eventually(lambda: app.mounts.current.owners["two"].spares.pids)


@pytest.mark.parametrize("eras", [("legacy", "modern"), ("modern", "legacy")])
def test_a_home_ends_and_the_era_of_another_server_is_learnt(
    app: Application, file: Path, eras: tuple[str, str]
) -> None:
    first, second = ({"command": cmd[0], "args": list(cmd[1:])} for cmd in map(server_of, eras))
    write(file, one=first)
    app.reload()
    client = ModernClient(LocalFront(app), authorization="Bearer me", path="/servers/one/mcp")
    assert "tools" in client.call("tools/list").message()["result"]
    (home,) = app.mounts.current.owners["one"].backends
    write(file, one=second)
    app.reload()
    eventually(lambda: not home.is_alive)
    assert "tools" in client.call("tools/list").message()["result"]
    (home,) = app.mounts.current.owners["one"].backends
    assert isinstance(home, LegacyHome) == (eras[1] == "legacy")


def test_a_mistake_changes_nothing_and_raises(
    app: Application, file: Path, client_at: Callable[[str], McpClient]
) -> None:
    client = client_at("one").open()
    before = client.result("count")["pid"]
    file.write_text("{")
    with pytest.raises(ConfigError, match="line 1"):
        app.reload()
    assert client.result("count") == {"calls": 2, "pid": before}
    document = json.loads(LocalFront(app).request("GET", "/readyz", {}, None).body())
    assert document["status"] == "degraded"
    assert "line 1" in document["checks"]["configuration"]["reason"]
    write(file, one=ENTRY)
    app.reload()
    eventually(
        lambda: (
            json.loads(LocalFront(app).request("GET", "/readyz", {}, None).body())["status"]
            == "ready"
        )
    )


def test_a_mistake_in_an_entry_is_that_entrys(
    app: Application, file: Path, client_at: Callable[[str], McpClient]
) -> None:
    client = client_at("one").open()
    before = client.result("count")["pid"]
    write(file, one={"command": 1}, two=ENTRY, three={"url": "nowhere"})
    app.reload()
    assert client.result("count") == {"calls": 2, "pid": before}
    assert client_at("two").open().result("count")["calls"] == 1
    assert client_at("three").initialize().failure == "misconfigured"
    document = json.loads(LocalFront(app).request("GET", "/readyz", {}, None).body())
    assert "served as it was before" in document["checks"]["configuration"]["reason"]
    write(file, one={**ENTRY, "disabled": True}, two=ENTRY, three=ENTRY)
    app.reload()
    assert client.call("count").failure == "disabled"
    eventually(lambda: not is_alive(before))
    assert client_at("three").open().result("count")["calls"] == 1
    write(file, one=ENTRY, two=ENTRY)
    app.reload()
    assert client.call("count").error()["message"] == "Session not found"
    assert client_at("one").open().result("count")["calls"] == 1


def test_a_removed_server_has_no_process_and_may_come_back_without_its_sessions(
    app: Application, file: Path, client_at: Callable[[str], McpClient]
) -> None:
    client = client_at("one").open()
    pid = client.result("count")["pid"]
    write(file, two=ENTRY)
    app.reload()
    assert client.call("count").status == 404
    assert client_at("one").initialize().status == 404
    assert "Nothing is served" in client_at("none").initialize().error()["message"]
    eventually(lambda: not is_alive(pid))
    eventually(lambda: "leaving=0" in repr(app.mounts))
    write(file, one=ENTRY)
    app.reload()
    assert client.call("count").error()["message"] == "Session not found"
    assert client_at("one").open().result("count")["calls"] == 1
    assert client_at("two").initialize().status == 404


def test_sessions_go_on_where_a_removed_server_is_back_before_they_have_ended(
    app: Application, file: Path, client_at: Callable[[str], McpClient]
) -> None:
    client, idle = client_at("one").open(), client_at("one").open()
    pid = client.result("count")["pid"]
    write(file, two=ENTRY)
    app.reload()
    assert client.call("count").status == 404
    write(file, one=ENTRY)
    app.reload()
    again = client.result("count")
    assert again["pid"] != pid
    eventually(lambda: "leaving=0" in repr(app.mounts))
    eventually(lambda: not is_alive(pid))
    assert client.result("count") == {"calls": 2, "pid": again["pid"]}
    assert idle.result("count")["calls"] == 1


def test_servers_can_be_given(app: Application, client_at: Callable[[str], McpClient]) -> None:
    client = client_at("one").open()
    pid = client.result("count")["pid"]
    app.reload([SERVER, StdioServer("two", SCRIPTED)])
    assert client.result("count")["pid"] == pid
    assert client_at("two").open().result("count")["calls"] == 1
    for wrong in ([], ["one"], [SERVER, SERVER], [StdioServer("a/b", SCRIPTED)]):
        with pytest.raises(ConfigError):
            app.reload(wrong)  # type: ignore[arg-type]
    assert client.result("count")["pid"] == pid


def test_what_is_served_without_a_file_keeps_its_name() -> None:
    with create_app(ProxyConfig(command=SCRIPTED)) as app:
        client = McpClient(LocalFront(app)).open()
        before = client.result("count")["pid"]
        app.reload([StdioServer("default", SCRIPTED, {"A": "1"})])
        assert client.result("count")["pid"] != before
        with pytest.raises(ConfigError, match="named 'default'"):
            app.reload([SERVER])
        app.reload()
        assert client.result("count")["calls"] == 1


@pytest.fixture
def published() -> Iterator[SharedText]:
    """What a master would publish to the applications of this process."""
    text = SharedText()
    shared_text.set_current(text)
    yield text
    shared_text.set_current(None)


def test_servers_that_could_not_be_served_are_tried_again(
    file: Path, published: SharedText, tmp_path: Path
) -> None:
    authorities = tmp_path / "own-ca.pem"
    good = Path(Certificates(tmp_path).path("ca.pem")).read_bytes()
    authorities.write_bytes(good)

    def publish(*names: str) -> None:
        servers: list[Server] = [StdioServer(name, SCRIPTED, timeout=50) for name in names]
        published.publish(encode(ServerTable(str(file), servers)))

    publish("one")
    config = ProxyConfig(config=str(file), ca_file=str(authorities))
    with create_app(config) as app, closing(LocalFront(app)) as front:
        client = McpClient(front, "/servers/one/mcp").open()
        other = McpClient(front, "/servers/two/mcp")
        authorities.write_text("nonsense")
        publish("one", "two")
        assert other.initialize().status == 404
        assert client.result("count")["calls"] == 1
        authorities.write_bytes(good)
        eventually(lambda: other.initialize().status == 200)
        assert client.result("count")["calls"] == 2


# --- HTTP servers --------------------------------------------------------------------------------


@pytest.fixture
def backends() -> Iterator[tuple[HttpBackend, HttpBackend]]:
    with HttpBackend() as one, HttpBackend() as other:
        yield one, other


def test_a_session_is_initialized_anew_where_its_address_is_no_target_any_more(
    app: Application,
    file: Path,
    client_at: Callable[[str], McpClient],
    backends: tuple[HttpBackend, HttpBackend],
) -> None:
    one, other = backends
    write(file, web={"url": f"{one.url}/mcp"})
    app.reload()
    client = client_at("web").open()
    assert client.call("tools/call").has_succeeded
    write(file, web={"url": f"{other.url}/mcp"})
    app.reload()
    asked = len(one.seen)
    session = client.session
    assert client.call("tools/call").has_succeeded
    assert client.session == session
    assert len(one.seen) == asked
    assert "initialize" in [seen.rpc for seen in other.seen]


def test_headers_are_others_from_the_next_request_on_and_sessions_the_same(
    app: Application,
    file: Path,
    client_at: Callable[[str], McpClient],
    backends: tuple[HttpBackend, HttpBackend],
) -> None:
    one, _ = backends
    write(file, web={"url": f"{one.url}/mcp", "headers": {"X-Key": "a"}})
    app.reload()
    client = client_at("web")
    client.initialize()
    write(file, web={"url": f"{one.url}/mcp", "headers": {"X-Key": "b"}})
    app.reload()
    assert client.call("tools/call").has_succeeded
    assert one.last.header("X-Key") == "b"
    assert [seen.rpc for seen in one.seen].count("initialize") == 1
    eventually(lambda: "leaving=0" in repr(app.mounts))
    assert client.call("tools/call").has_succeeded


@pytest.mark.parametrize("to_http", [True, False])
def test_a_server_of_another_kind_is_another_server(
    app: Application,
    file: Path,
    client_at: Callable[[str], McpClient],
    backends: tuple[HttpBackend, HttpBackend],
    to_http: bool,
) -> None:
    web = {"url": f"{backends[0].url}/mcp"}
    first, second = (ENTRY, web) if to_http else (web, ENTRY)
    write(file, one=first)
    app.reload()
    client = client_at("one").open()
    write(file, one=second)
    app.reload()
    eventually(lambda: client.call("count").status in (400, 404))
    assert client_at("one").open().call("tools/list").status == 200


def test_urls_of_servers_that_are_given() -> None:
    with (
        HttpBackend() as backend,
        create_app(ProxyConfig(target_url=(backend.url,))) as app,
        closing(LocalFront(app)) as front,
    ):
        client = McpClient(front).open()
        app.reload([HttpServer("default", (backend.url,), ("X-Key: a",))])
        assert client.call("tools/call").has_succeeded
        assert backend.last.header("X-Key") == "a"


@pytest.fixture
def modern() -> Iterator[EraServerProcess]:
    with EraServerProcess("modern") as server:
        yield server


@pytest.fixture(params=["memory", "redis", "relayed"])
def replicas(
    request: pytest.FixtureRequest, file: Path, redis_server: RedisServer, redis_prefix: str
) -> Iterator[list[Application]]:
    """An application that sweeps often, perhaps with another one that relays to it."""
    settings: dict[str, Any] = {"config": str(file), "input_timeout": 1.0}
    if request.param != "memory":
        settings |= {"redis_url": redis_server.url, "redis_prefix": redis_prefix}
    with ExitStack() as stack:
        count = 2 if request.param == "relayed" else 1
        yield [stack.enter_context(create_app(ProxyConfig(**settings))) for _ in range(count)]


def test_calls_in_flight_over_a_bridge_end_well_and_later_ones_go_to_the_changed_server(
    replicas: list[Application], file: Path, modern: EraServerProcess
) -> None:
    def reload(form: str, apps: list[Application]) -> None:
        write(file, web={"url": modern.url, "headers": {"X-Form": form}})
        for app in apps:
            app.reload()

    def form_of_last(rpc: str) -> str:
        form: str = modern.requests(rpc)[-1]["x-form"]
        return form

    reload("1", replicas)
    with ExitStack() as stack:
        owner, other = (stack.enter_context(closing(LocalFront(replicas[at]))) for at in (0, -1))
        client = McpClient(owner, "/servers/web/mcp").open("2025-11-25")
        relayed = client.at(other)
        asking = client.call("tools/call", called("ask", kind="sampling")).stream()
        question = next(asking)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        slow = pool.submit(relayed.result, "tools/call", called("slow", seconds=4))
        modern.await_line("started")
        reload("2", replicas[:1])
        assert not relayed.result("tools/call", called("pid")).get("isError")
        reload("2", replicas)
        assert not client.result("tools/call", called("pid")).get("isError")
        assert form_of_last("tools/call") == "2"
        assert not slow.done()
        assert slow.result()["structuredContent"]["label"] == ""
        client.post({"jsonrpc": "2.0", "id": question["id"], "result": SAMPLED})
        assert next(asking)["result"]["structuredContent"]["answers"]["sampling"] == SAMPLED
        eventually(lambda: all("leaving=0" in repr(app.mounts) for app in replicas))


def test_a_server_that_changes_while_it_is_asked_what_it_speaks_is_asked_anew(
    app: Application, file: Path
) -> None:
    slow = {**ENTRY, "args": [*ENTRY["args"], "--slow-start", "1.5"]}
    write(file, one=slow)
    app.reload()
    client = ModernClient(LocalFront(app), authorization="Bearer me", path="/servers/one/mcp")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(lambda: client.call("environment").message())
        eventually(lambda: app.parts.supervisor.children)
        write(file, one={**slow, "env": {"A": "new"}})
        app.reload()
        first.result()
    assert client.call("environment").message()["result"]["environ"]["A"] == "new"


def test_a_call_goes_on_while_its_server_is_disabled(file: Path) -> None:
    with create_app(ProxyConfig(config=str(file), idle_timeout=1)) as app:
        front = LocalFront(app)
        client = McpClient(front, "/servers/one/mcp").open()
        with ThreadPoolExecutor() as pool:
            call = pool.submit(lambda: client.result("sleep", {"seconds": 4}))
            eventually(lambda: next(iter(app.mounts.current.transports["one"].values())).is_busy)
            write(file, one={**ENTRY, "disabled": True}, two=ENTRY)
            app.reload()
            call.result()
        front.close()
