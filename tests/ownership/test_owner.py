"""Bringing a lost child back: claims, deletions in between, sessions that cannot come back."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from mcp_proxy import (
    LocalStorage,
    ProxyConfig,
    ProxyOptions,
    RedisStorage,
    Session,
    StreamableProxy,
    create_app,
)
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.background import Periodic
from mcp_proxy.errors import BackendExited, ClientLeft, StorageUnavailable
from mcp_proxy.ownership import homes as homing
from mcp_proxy.ownership import owner as owning
from mcp_proxy.sessions import claims, handshake
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import CLAIM, INIT_BODY, new_session
from tests.support.front import MORTAL, SCRIPTED, McpClient, WsgiFront
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually


@contextlib.contextmanager
def serving(
    *options: str, storage: Storage | None = None, **settings: Any
) -> Iterator[tuple[StreamableProxy, McpClient]]:
    app = StreamableProxy([*SCRIPTED, *options], storage, options=ProxyOptions(**settings))
    try:
        yield app, McpClient(WsgiFront(app))
    finally:
        app.close()


def children(app: StreamableProxy) -> int:
    return app.owner.supervisor.children


def kill_server(app: StreamableProxy, client: McpClient) -> None:
    client.call("die").body()
    eventually(lambda: children(app) == 0)


def test_a_session_deleted_while_its_server_comes_back_stays_deleted() -> None:
    with serving("--slow-start", "0.5") as (app, client):
        client.open()
        kill_server(app, client)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(lambda: client.call("count").status)
            eventually(lambda: children(app) == 1)
            assert client.session is not None
            app.manager.end(client.session)
            assert call.result(10) == 404
        eventually(lambda: children(app) == 0)


class Fetched:
    """A server that begins at once when it is first started, and later when its gate is open.

    As one that `uvx` or `npx` fetches first, in a version that is new in the file of servers.
    """

    _PROGRAM = (
        "import os, sys, time; starts, gate = sys.argv[1:3]\n"
        "is_first = not os.path.exists(starts)\n"
        "open(starts, 'a').write('.')\n"
        "while not is_first and not os.path.exists(gate): time.sleep(0.02)\n"
        "os.execv(sys.argv[3], sys.argv[3:])"
    )

    def __init__(self, folder: Path) -> None:
        self._starts, self._gate = folder / "starts", folder / "gate"
        program = [sys.executable, "-c", self._PROGRAM]
        self.command = [*program, str(self._starts), str(self._gate), *SCRIPTED]

    @property
    def starts(self) -> int:
        return self._starts.stat().st_size

    def let_begin(self) -> None:
        self._gate.touch()


def test_a_server_has_most_of_a_minute_to_come_back() -> None:
    """Well within the claim, so that no other replica starts one beside it."""
    assert owning.REPLAY_TIME == homing.START_TIME == 45 < claims.CLAIM_TIME


def test_a_server_that_takes_longer_to_come_back_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Fetched(tmp_path)
    with contextlib.closing(StreamableProxy(server.command)) as app:
        client = McpClient(WsgiFront(app)).open()
        kill_server(app, client)
        with monkeypatch.context() as short:
            short.setattr(owning, "REPLAY_TIME", 0.2)
            assert client.call("count").failure == "server-timeout"
        eventually(lambda: children(app) == 0)
        server.let_begin()
        assert eventually(lambda: "result" in client.call("count").message())
        assert server.starts == 3


def test_a_call_waits_for_a_server_to_come_back_no_longer_than_for_an_answer(
    tmp_path: Path,
) -> None:
    """The start goes on: with a short time limit a slow server would never come back."""
    server = Fetched(tmp_path)
    with contextlib.closing(StreamableProxy(server.command)) as app:
        client = McpClient(WsgiFront(app)).open()
        options = replace(app.options, request_timeout=0.5)
        app.owner.change(app.owner.server, options)
        app.change(options, is_other=False)
        kill_server(app, client)
        for _ in range(2):  # the second one finds the claim of the first
            answer = client.call("count")
            assert answer.failure == "server-timeout"
            said = answer.message()["error"]["message"]
            assert said == "The session's server was not brought back within 0.5 seconds"
        server.let_begin()
        assert eventually(lambda: "result" in client.call("count").message())
        assert server.starts == 2


def test_a_session_whose_initialize_was_too_long_to_keep_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handshake, "MAX_INIT_BODY", 10)
    with serving() as (app, client):
        client.open()
        kill_server(app, client)
        assert client.call("count").status == 404
        assert client.session is not None
        assert not app.manager.exists(client.session)


def test_a_server_that_comes_back_at_another_revision_ends_the_session() -> None:
    with serving() as (app, client):
        client.open("2025-06-18")
        kill_server(app, client)
        app.owner.server = type(app.owner.server)("default", (*SCRIPTED, "--version", "2024-11-05"))
        assert client.call("count").status == 404


def test_a_server_that_cannot_come_back_gives_its_claim_up() -> None:
    with serving() as (app, client):
        client.open()
        kill_server(app, client)
        app.owner.server = type(app.owner.server)("default", ("/no/such/server",))
        assert client.call("count").failure == "server-start-failed"
        assert client.session is not None
        assert CLAIM not in app.manager.load(client.session).metadata


@contextlib.contextmanager
def serving_mortal(**settings: Any) -> Iterator[tuple[StreamableProxy, McpClient]]:
    """A server that closes its input or its output, and a session of it."""
    app = StreamableProxy(MORTAL, options=ProxyOptions(**settings))
    try:
        yield app, McpClient(WsgiFront(app)).open()
    finally:
        app.close()


def use(client: McpClient, tool: str, **arguments: Any) -> Any:
    return client.call("tools/call", {"name": tool, "arguments": arguments}).message()


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_a_server_that_has_closed_its_input_does_not_get_another_one_gets(
    stubborn: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where there is place for no more than one server, and the old one takes its time."""
    with serving_mortal(max_sessions=1) as (app, client):
        assert "result" in use(client, "deaf", stubborn=stubborn)
        before = time.monotonic()
        assert use(client, "ok")["result"]["content"][0]["text"] == "call 1"
        assert time.monotonic() - before < 3.5
        assert use(client, "ok")["result"]["content"][0]["text"] == "call 2"
        eventually(lambda: children(app) == 1)
    assert "exited by itself" not in caplog.text
    assert "has closed its input; stopping it" in caplog.text


def test_a_notification_that_a_deaf_server_does_not_get_another_one_gets() -> None:
    with serving_mortal() as (_, client):
        use(client, "deaf", stubborn=True)
        client.notify("tools/call", {"name": "ok"})  # which it counts
        assert use(client, "ok")["result"]["content"][0]["text"] == "call 2"


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_server_that_closes_its_output_fails_its_calls_at_once_and_is_replaced(
    stubborn: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_mortal(max_sessions=1) as (_, client):
        before = time.monotonic()
        error = use(client, "mute", stubborn=stubborn)["error"]
        assert error["message"] == "The server closed its output before it answered"
        assert use(client, "ok")["result"]["content"][0]["text"] == "call 1"
        assert time.monotonic() - before < 2
        eventually(lambda: "the server was ended by the proxy (signal SIG" in caplog.text)
    assert "has closed its output; stopping it" in caplog.text
    assert "exited by itself" not in caplog.text


def test_a_claim_of_somebody_else_is_waited_for_within_the_time_limit() -> None:
    with serving(request_timeout=1) as (app, client):
        client.open()
        kill_server(app, client)
        assert client.session is not None
        record = app.manager.load(client.session)
        mark = "4000000000.000 0123456789abcdef another-host-0-0"
        assert app.manager.swap(record, record.with_metadata(**{CLAIM: mark}))
        began = time.monotonic()
        assert client.call("count").failure == "server-timeout"
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "change",
    [
        {"init_body": "no JSON"},
        {"init_body": "[]"},
        {"init_body": '{"jsonrpc":"2.0","method":"notifications/initialized"}'},
        {"init_body": '{"jsonrpc":"2.0","id":1,"method":"initialize","params":[]}'},
        {"init_body": None},
        {"protocol_version": None},
        {"resume": "no JSON"},
        {"resume": '{"subscriptions":[1]}'},
    ],
    ids=str,
)
def test_a_record_from_which_no_server_can_be_brought_back_is_over(
    change: dict[str, str | None],
) -> None:
    with serving() as (app, client):
        client.open()
        kill_server(app, client)
        assert client.session is not None
        record = app.manager.load(client.session)
        assert app.manager.swap(record, record.with_metadata(**change))
        for _ in range(2):
            began = time.monotonic()
            assert client.call("count").status == 404
            assert time.monotonic() - began < 5
        assert not app.manager.exists(client.session)
        assert children(app) == 0


def test_a_redis_without_getex_leaves_no_child(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis(settings=['rename-command GETEX ""'])
    with (
        contextlib.closing(RedisStorage(server.url)) as storage,
        serving(storage=storage) as (app, client),
    ):
        answer = client.call("initialize", {"protocolVersion": "2025-06-18"})
        assert answer.failure == "store-unavailable"
        assert "GETEX" in answer.error()["message"]
        eventually(lambda: children(app) == 0)


def test_a_claim_is_given_back_when_something_unforeseen_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving() as (app, client):
        client.open()
        kill_server(app, client)

        def fail(*_: object) -> None:
            raise RuntimeError("unforeseen")

        with monkeypatch.context() as patch:
            patch.setattr("mcp_proxy.backends.handshake.replay", fail)
            assert client.call("count").failure == "internal-error"
        assert client.session is not None
        assert CLAIM not in app.manager.load(client.session).metadata
        eventually(lambda: children(app) == 0)
        assert client.result("count")["calls"] == 1


def test_a_store_that_fails_when_the_child_is_back_leaves_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving() as (app, client):
        client.open()
        kill_server(app, client)

        def away(*_: object, **__: object) -> bool:
            raise StorageUnavailable

        with monkeypatch.context() as patch:
            patch.setattr(claims, "settle", away)
            assert client.call("count").failure == "store-unavailable"
        eventually(lambda: children(app) == 0)
        assert client.result("count")["calls"] == 1


def test_a_record_that_never_stays_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving() as (app, client):
        client.open()
        kill_server(app, client)
        tried = []

        def never(old: Session, new: Session) -> bool:
            tried.append(old)
            return False

        monkeypatch.setattr(app.manager, "swap", never)
        answer = client.call("count")
        assert answer.failure == "server-exited"
        assert "keep changing" in answer.error()["message"]
        assert len(tried) < 20


def test_another_replica_takes_a_session_over_and_sees_its_state() -> None:
    storage = LocalStorage()
    with serving(storage=storage) as (first, client), serving(storage=storage) as (second, _):
        client.open()
        client.result("logging/setLevel", {"level": "error"})
        other = McpClient(WsgiFront(second))
        other.session = client.session
        methods = [m["method"] for m in other.result("seen")["messages"]][:3]
        assert methods == ["initialize", "notifications/initialized", "logging/setLevel"]
        assert children(first) == children(second) == 1


def test_a_change_of_state_that_the_server_refuses_is_not_recorded() -> None:
    with serving() as (app, client):
        client.open()
        client.result("resources/subscribe", {"uri": "there:1"})
        refused = client.call("resources/subscribe", {"uri": "gone:1"})
        assert refused.error()["message"] == "Resource not found"
        assert client.session is not None
        recorded = app.manager.load(client.session).metadata["resume"]
        assert "there:1" in recorded
        assert "gone:1" not in recorded


def test_a_store_that_is_away_is_not_taken_for_sessions_that_are_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(session_ttl=0.5) as (app, client):
        client.open()

        def away(session_id: str) -> bool:
            raise StorageUnavailable

        monkeypatch.setattr(app.manager, "peek", away)
        with pytest.raises(StorageUnavailable):
            app.owner.sweep()
        assert children(app) == 1


def test_the_record_has_what_a_recovery_needs() -> None:
    with serving() as (app, client):
        client.open()
        assert client.session is not None
        record = app.manager.load(client.session)
        assert record.type == "streamable"
        assert record.metadata["protocol_version"] == "2025-06-18"
        assert '"method":"initialize"' in record.metadata[INIT_BODY]
        assert record.backend_url is not None
        assert record.backend_url.startswith(f"worker://{app.owner.replica.id}/")


def test_a_session_of_another_transport_is_not_served() -> None:
    with serving() as (app, client):
        client.open()
        assert client.session is not None
        record = app.manager.load(client.session)
        app.manager.swap(record, type(record)(**{**_fields(record), "type": "sse"}))
        answer = client.call("count")
        assert answer.status == 400
        assert "another transport" in answer.error()["message"]


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def test_a_server_that_exits_as_soon_as_it_has_answered_keeps_no_place() -> None:
    with serving(max_sessions=1) as (app, client):
        for _ in range(3):
            client.open()
            kill_server(app, client)
            eventually(lambda: "held=0" in repr(app.owner))
            client.delete()


def test_a_child_that_was_lost_before_it_was_held_is_not_held() -> None:
    with serving() as (app, _):
        bridge = app.owner.start()
        bridge.close()
        app.owner.establish(new_session("early", "streamable"), bridge)
        assert "held=0" in repr(app.owner)
        assert not app.owner.is_busy


def test_a_place_is_given_back_whatever_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with serving(max_sessions=1) as (app, client):
        with monkeypatch.context() as patch:
            patch.setattr(Periodic, "start", fail)
            assert client.initialize().failure == "internal-error"
        eventually(lambda: children(app) == 0)
        assert not app.owner.is_busy
        client.open()


def test_a_session_that_is_brought_back_needs_a_place_too() -> None:
    with serving(max_sessions=1) as (app, client):
        first = client.open()
        kill_server(app, first)
        second = McpClient(client.front).open()
        answer = first.call("echo")
        assert answer.failure == "overloaded"
        assert "sessions of this worker are taken" in answer.error()["message"]
        second.delete()
        assert first.call("echo").status == 200


def test_a_claim_is_given_back_once_the_store_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (app, client):
        client.open()
        kill_server(app, client)
        swap, server = app.manager.storage.swap, app.owner.server
        away = threading.Event()

        def fickle(old: Session, new: Session) -> bool:
            if away.is_set():
                raise StorageUnavailable
            is_won = swap(old, new)
            away.set()  # the claim is in the record
            return is_won

        monkeypatch.setattr(app.manager.storage, "swap", fickle)
        app.owner.server = type(server)("default", ("/no/such/server",))
        assert client.call("count").failure == "server-start-failed"
        assert client.session is not None
        assert CLAIM in app.manager.load(client.session).metadata
        monkeypatch.setattr(app.manager.storage, "swap", swap)
        eventually(lambda: CLAIM not in app.manager.load(str(client.session)).metadata)
        assert app.owner._sweeper.interval == app.owner._interval


@pytest.mark.parametrize(("choice", "status"), [("json-rpc", 200), ("http", 502)])
def test_a_call_that_the_end_of_its_replica_cuts_off_says_so(choice: str, status: int) -> None:
    """It may have acted, so nobody is told to repeat it."""
    with serving(failure_status=choice) as (app, client), ThreadPoolExecutor(1) as pool:
        client.open()
        call = pool.submit(client.call, "silence", Accept="application/json")
        eventually(lambda: app.is_busy)
        app.close()
        answer = call.result(10)
        assert (answer.status, answer.failure) == (status, "draining")
        assert "Retry-After" not in answer.headers


@pytest.mark.parametrize("width", [2, 0])
def test_an_initialize_that_the_end_of_its_replica_cuts_off_says_so(width: int) -> None:
    """Whether its server has begun to start, or it waits for its turn."""
    with serving("--slow-start", "60") as (app, client), ThreadPoolExecutor(1) as pool:
        app.owner.turns.width = lambda: width
        call = pool.submit(client.initialize, Accept="application/json")
        eventually(lambda: app.is_busy and (children(app) == 1 or not width))
        app.close()
        answer = call.result(10)
        assert (answer.status, answer.failure) == (200, "draining")
        assert app.owner.backoff.not_ready_reason() is None


def test_a_session_that_is_brought_back_as_its_replica_ends_says_so() -> None:
    """The call has not begun, so another replica may be asked."""
    with serving(failure_status="http") as (app, client), ThreadPoolExecutor(1) as pool:
        client.open()
        kill_server(app, client)
        server = app.owner.server
        slow = (*server.argv, "--slow-start", "60")
        app.owner.server = type(server)("default", slow)
        call = pool.submit(client.call, "count", Accept="application/json")
        eventually(lambda: children(app) == 1)
        app.close()
        answer = call.result(10)
        assert (answer.status, answer.failure) == (503, "draining")
        assert "Retry-After" in answer.headers
        assert app.owner.backoff.not_ready_reason() is None


def test_a_client_that_leaves_frees_its_thread_and_the_server_comes_back_all_the_same() -> None:
    with serving("--slow-start", "3") as (app, client):
        client.open()
        assert client.session is not None
        kill_server(app, client)
        began = time.monotonic()
        with pytest.raises(ClientLeft):
            app.owner.backend_of(app.manager.load(client.session), has_left=lambda: True)
        assert time.monotonic() - began < 2.9
        eventually(lambda: CLAIM not in app.manager.load(str(client.session)).metadata)
        assert children(app) == 1
        assert client.result("count")["calls"] == 1
        assert children(app) == 1


# --- what starts no server -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {"id": 1, "result": {}},
        {"id": "q", "error": {"code": -1, "message": "no"}},
        {"method": "notifications/cancelled", "params": {"requestId": 1}},
    ],
    ids=["result", "error", "cancelled"],
)
def test_what_was_for_the_server_that_is_lost_starts_none(message: dict[str, Any]) -> None:
    with serving() as (app, client):
        client.open()
        kill_server(app, client)
        answer = client.post({"jsonrpc": "2.0", **message})
        assert (answer.status, answer.failure) == (202, "server-exited")
        assert children(app) == 0
        assert client.session is not None
        assert CLAIM not in app.manager.load(client.session).metadata
        assert client.notify("notifications/x").status == 202
        assert children(app) == 1


# --- idle sessions -------------------------------------------------------------------------------


def wait_until_idle(app: StreamableProxy) -> None:
    """Waits until every server of the proxy has been idle for long enough to be stopped."""
    bridges = app.owner.backends
    eventually(lambda: all(time.monotonic() - one.last_used > 0.02 for one in bridges))


def test_where_there_is_no_room_the_server_of_the_longest_idle_session_stops() -> None:
    with serving(max_sessions=2, evict_after=0.01) as (app, client):
        first, second = client.open(), McpClient(client.front).open()
        begun = second.result("count")["pid"]
        first.result("count")
        first.result("count")
        wait_until_idle(app)
        assert McpClient(client.front).initialize().has_succeeded
        eventually(lambda: children(app) == 2)
        assert first.result("count")["calls"] == 3
        eventually(lambda: (back := second.call("count")).status == 200 and not back.failure)
        assert second.result("count")["pid"] != begun
        assert app.owner.backoff.not_ready_reason() is None


def test_the_sessions_of_all_servers_of_a_worker_count(tmp_path: Path) -> None:
    command, *args = SCRIPTED
    file = tmp_path / "servers.json"
    servers = {name: {"command": command, "args": args} for name in ("one", "two")}
    file.write_text(json.dumps({"mcpServers": servers}))
    for evict_after in (60, 0.01):
        config = ProxyConfig(config=str(file), max_sessions=1, evict_after=evict_after)
        with create_app(config) as app:
            one, two = (McpClient(WsgiFront(app), f"/servers/{name}/mcp") for name in servers)
            one.open()
            eventually(lambda: app.parts.supervisor.children == 1)
            time.sleep(0.05)  # idle for long enough
            if evict_after == 60:
                assert two.initialize().failure == "overloaded"
            else:
                two.open()
                assert app.parts.supervisor.children == 1, "the other server's has stopped"
                time.sleep(0.05)
                assert one.result("count")["calls"] == 1, "and is back"


def test_a_session_that_was_never_called_makes_room_first() -> None:
    with serving(max_sessions=2, evict_after=0.01) as (app, client):
        called = client.open()
        called.result("count")
        McpClient(client.front).open()
        wait_until_idle(app)
        assert McpClient(client.front).initialize().has_succeeded
        assert called.result("count")["calls"] == 2


@pytest.mark.parametrize("need", ["call", "left", "stream", "question"])
def test_a_server_that_somebody_needs_makes_no_room(need: str) -> None:
    with serving(max_sessions=1, evict_after=0.01, sse_after=0.1) as (app, client):
        client.open()
        stream = client.listen() if need == "stream" else None
        if need == "call":
            held = client.call("hold", {"name": "a", "_meta": {"progressToken": 1}})
            next(held.stream())
        elif need == "left":
            client.call("hold", {"name": "a", "_meta": {"progressToken": 1}}).close()
        elif need == "question":
            message = {"id": "q", "method": "roots/list"}
            client.call("later", {"message": message, "seconds": 0}).body()
            (bridge,) = app.owner.backends
            eventually(lambda: "asked=1" in repr(bridge))
        for _ in range(2):
            assert McpClient(client.front).initialize().failure == "overloaded"
        assert children(app) == 1
        if stream is not None:
            stream.close()


def test_a_session_that_is_not_idle_for_long_enough_makes_no_room() -> None:
    with serving(max_sessions=1) as (_, client):
        client.open()
        assert McpClient(client.front).initialize().failure == "overloaded"


def test_a_session_that_is_brought_back_makes_room_as_a_new_one_does() -> None:
    with serving(max_sessions=1, evict_after=0.01) as (app, client):
        first = client.open()
        wait_until_idle(app)
        assert McpClient(client.front).initialize().has_succeeded
        wait_until_idle(app)
        assert first.result("count")["calls"] == 1
        eventually(lambda: children(app) == 1)


def test_an_idle_server_stops_after_its_time_and_a_request_brings_it_back() -> None:
    with serving(idle_timeout=0.5) as (app, client):
        client.open("2025-06-18")
        client.call("logging/setLevel", {"level": "error"}).body()
        eventually(lambda: children(app) == 0)
        assert client.session is not None
        assert app.manager.load(client.session).backend_url is None
        assert client.result("count")["calls"] == 1
        methods = [m["method"] for m in client.result("seen")["messages"]]
        assert "logging/setLevel" in methods


def test_a_server_that_is_used_does_not_stop_by_time() -> None:
    with serving(idle_timeout=0.5, sse_after=0.1) as (app, client):
        client.open()
        until = time.monotonic() + 2
        number = 0
        with contextlib.closing(client.listen()):
            while time.monotonic() < until:
                app.owner.sweep()
                time.sleep(0.05)
            number += 1
            assert client.result("count")["calls"] == number


def test_what_comes_while_its_server_stops_for_being_idle_brings_it_back() -> None:
    with serving(evict_after=0.01) as (app, client):
        client.open()
        session = app.manager.load(client.session or "")
        backend = app.owner.backend_of(session)
        assert isinstance(backend, Bridge)
        eventually(lambda: backend.stop_if_idle(0.01))
        assert not backend.stop_if_idle(0.01)
        assert app.owner.on_backend(session, lambda found: found is not backend or raise_lost())


def raise_lost() -> bool:
    raise BackendExited("gone")
