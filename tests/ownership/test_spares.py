"""Servers that are started ahead: who gets them, what they count for, and what ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import ProxyOptions, SSEProxy, StreamableProxy, create_app
from mcp_proxy.config import from_values
from mcp_proxy.ownership import spares as keeping
from mcp_proxy.ownership import turns as turning
from mcp_proxy.ownership.owner import Owner
from mcp_proxy.processes import supervisor as supervising
from mcp_proxy.processes.child import Child
from mcp_proxy.transports.stdio import StdioTransport
from tests.support.front import SCRIPTED, HttpFront, McpClient, WsgiFront
from tests.support.modern_client import ASKABLE, ModernClient, server_of
from tests.support.proxies import replicas
from tests.support.proxy_process import ProxyProcess, children_of, is_alive
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually
from tests.transports.calls import hold, judging, pid_of, release

#: How a server that nobody has asked for a while fails whoever takes it.
USELESS = ["dies when asked", "is deaf", "is mute"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares are started one after the other, but nobody waits a second between two."""
    monkeypatch.setattr(keeping, "MISSING", 0.01)
    monkeypatch.setattr(turning, "LONGEST", 0.05)


@pytest.fixture
def start() -> Iterator[Callable[..., StdioTransport]]:
    """Makes a transport in front of the scripted server, and ends it."""
    made: list[StdioTransport] = []

    def make(
        *options: str, kind: type[StdioTransport] = StreamableProxy, **settings: Any
    ) -> StdioTransport:
        settings = {"spare_children": 1, **settings}
        made.append(kind([*SCRIPTED, *options], options=ProxyOptions(**settings)))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def ahead(owner: Owner, count: int = 1) -> list[int]:
    """Has so many servers started ahead, and waits for that."""
    owner.spares.keep()
    return eventually(lambda: len(owner.spares.pids) == count and owner.spares.pids)


def opened(app: StdioTransport) -> McpClient:
    return McpClient(WsgiFront(app)).open()


# --- who gets them -------------------------------------------------------------------------------


def test_a_session_gets_a_server_that_was_started_ahead(
    start: Callable[..., StdioTransport],
) -> None:
    app = start()
    (spare,) = ahead(app.owner)
    assert pid_of(opened(app)) == spare
    assert ahead(app.owner) != [spare], "there is another one"
    assert repr(app.owner.spares) == f"<Spares {ahead(app.owner)} of 1>"
    assert app.owner.supervisor.children == 2


def test_nothing_is_started_ahead_before_the_first_use(
    start: Callable[..., StdioTransport],
) -> None:
    app = start(spare_children=2)
    assert WsgiFront(app).request("DELETE", "/mcp", {}, None).status == 400
    assert app.owner.supervisor.children == 0
    opened(app)
    eventually(lambda: app.owner.spares.count == 2)


def test_without_the_setting_nothing_is_started_ahead(start: Callable[..., StdioTransport]) -> None:
    app = start(spare_children=0)
    app.owner.spares.keep()
    opened(app)
    assert not app.owner.spares.is_running
    assert app.owner.supervisor.children == 1


def test_a_session_over_http_and_sse_gets_one(start: Callable[..., StdioTransport]) -> None:
    app = start(kind=SSEProxy)
    (spare,) = ahead(app.owner)
    client = SseClient(WsgiFront(app)).open()
    assert client.result("count")["pid"] == spare
    client.close()


@pytest.mark.parametrize("era", ["modern", "legacy"])
def test_the_first_home_gets_one(era: str) -> None:
    with replicas(1, command=server_of(era), spare_children=1) as one:
        (spare,) = ahead(one[0].app.owner)
        assert ModernClient(one[0].front).pid() == spare


@pytest.mark.parametrize("era", ["modern", "legacy"])
def test_the_home_of_another_caller_gets_one(era: str) -> None:
    with replicas(1, command=server_of(era), spare_children=1) as one:
        ModernClient(one[0].front, authorization="Bearer a").pid()
        (spare,) = ahead(one[0].app.owner)
        assert ModernClient(one[0].front, authorization="Bearer b").pid() == spare


def test_the_second_server_of_a_home_is_one() -> None:
    with replicas(1, command=server_of("legacy"), spare_children=1) as one:
        client = ModernClient(one[0].front, ASKABLE)
        client.pid()
        (spare,) = ahead(one[0].app.owner)
        client.asked("ask")
        assert client.pid() == spare, "the first one waits for an answer"


def test_a_session_that_is_taken_over_gets_one(store: dict[str, Any]) -> None:
    with replicas(2, **store, lease=1.0, spare_children=1) as two:
        _, other = two.opened()
        judging(two)
        (spare,) = ahead(two[1].app.owner)
        two[0].app.close()
        assert pid_of(other) == spare


def test_what_a_server_says_before_it_is_asked_is_heard(
    start: Callable[..., StdioTransport],
) -> None:
    app = start("--greet")
    (spare,) = ahead(app.owner)
    client = McpClient(WsgiFront(app))
    answer = client.initialize()
    assert [message.get("method") for message in answer.messages()] == [
        "notifications/message",
        None,
    ]
    assert pid_of(client) == spare


def test_none_is_started_while_a_session_starts_a_server(
    start: Callable[..., StdioTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turning, "LONGEST", 60.0)
    app = start()
    turns, answers = app.owner.turns, list[bool]()
    take_ahead = turns.take_ahead
    monkeypatch.setattr(turns, "take_ahead", lambda: answers.append(take_ahead()) or answers[-1])
    with turns.take(10):
        app.owner.spares.keep()
        eventually(lambda: len(answers) >= 3)
        assert not any(answers)
        assert app.owner.supervisor.children == 0
    assert ahead(app.owner)
    assert answers.count(True) == 1


# --- what they count for -------------------------------------------------------------------------


def test_they_count_as_sessions_and_end_first(start: Callable[..., StdioTransport]) -> None:
    app = start(max_sessions=3, spare_children=2)
    before = ahead(app.owner, 2)
    first = opened(app)
    ahead(app.owner, 2)
    second = opened(app)
    assert pid_of(first) == before[0]
    assert app.server_reason() is None
    third = opened(app)
    eventually(lambda: app.owner.supervisor.children == 3)
    assert app.owner.spares.count == 0
    assert McpClient(WsgiFront(app)).initialize().failure == "overloaded"
    assert app.server_reason() == "all 3 sessions of this worker are taken"
    third.delete()
    eventually(lambda: app.owner.spares.count == 1)
    assert pid_of(second)
    eventually(lambda: app.owner.supervisor.children == 3)


def test_a_session_of_another_server_ends_one_before_an_idle_session(tmp_path: Path) -> None:
    entry = {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"a": entry, "b": entry}}))
    settings = {"config": str(file), "spare_children": 1, "max_sessions": 3, "evict_after": 0.001}
    with create_app(from_values(settings)) as app:
        front = WsgiFront(app)
        owners = {name: proxy.owner for name, proxy in app.proxies.items()}  # type: ignore[attr-defined]
        sessions = [McpClient(front, "/servers/a/mcp").open() for _ in range(2)]
        pids = [pid_of(session) for session in sessions]
        ahead(owners["a"])
        McpClient(front, "/servers/b/mcp").open()
        assert [pid_of(session) for session in sessions] == pids
        assert owners["a"].spares.count == 0


def test_none_is_started_where_there_is_no_room(start: Callable[..., StdioTransport]) -> None:
    app = start(max_sessions=1)
    (spare,) = ahead(app.owner)
    client = opened(app)
    assert pid_of(client) == spare
    assert app.owner.supervisor.children == 1
    client.delete()
    assert ahead(app.owner) != [spare]


# --- those that exit -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--greet",)])
def test_one_that_has_exited_is_replaced_and_not_given_out(
    start: Callable[..., StdioTransport], options: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    app = start(*options)
    (spare,) = ahead(app.owner)
    if options:
        eventually(lambda: f"{spare}] stderr: greeted" in caplog.text)
    os.kill(spare, signal.SIGKILL)
    client = opened(app)
    pid = pid_of(client)
    assert pid != spare
    assert ahead(app.owner) not in ([spare], [pid])
    assert app.owner.backoff.doubt() is None
    eventually(lambda: app.owner.supervisor.children == 2)
    eventually(lambda: f"mcp-child-{spare}" not in [each.name for each in threading.enumerate()])
    assert [line for line in caplog.messages if "exited" in line] == [
        f"[default pid={spare}] a server that was started ahead exited (signal SIGKILL)"
    ]


def test_one_whose_exit_nobody_has_noticed_yet_is_not_given_out(
    start: Callable[..., StdioTransport],
) -> None:
    app = start(spare_children=2)
    first, second = ahead(app.owner, 2)
    is_noticed = threading.Event()
    app.owner.supervisor.call(is_noticed.wait)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not is_alive(first))
    assert pid_of(opened(app)) == second
    is_noticed.set()
    assert first not in ahead(app.owner, 2)


def test_those_that_keep_exiting_are_started_less_and_less_often(
    start: Callable[..., StdioTransport], caplog: pytest.LogCaptureFixture
) -> None:
    """The log has one line, until one was of use."""
    caplog.set_level("DEBUG")
    app = start("--unasked", "exits")
    app.owner.spares.keep()

    def exits() -> list[int]:
        found = [each for each in caplog.records if "started ahead exited" in each.getMessage()]
        return [each.levelno for each in found]

    eventually(lambda: len(exits()) == 3)
    assert exits() == [30, 10, 10]
    with pytest.raises(keeping.BackendNotStarted, match="keeps ending"):
        app.owner.backoff.require_over("spare")
    assert app.server_reason() is None
    assert opened(app).result("count")["calls"] == 1


@pytest.mark.parametrize("way", USELESS)
def test_who_gets_one_that_ends_at_once_gets_another_server(
    start: Callable[..., StdioTransport], way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    app = start("--greet", "--unasked", way)
    (spare,) = ahead(app.owner)
    eventually(lambda: f"{spare}] stderr: nobody asks me" in caplog.text)
    client = opened(app)
    assert pid_of(client) != spare
    assert not is_alive(spare)
    assert client.result("seen")["messages"][0]["method"] == "initialize"
    assert app.owner.backoff.doubt() is None
    assert "the server exited by itself" not in caplog.text
    client.delete()


def test_a_session_over_http_and_sse_gets_another_one_too(
    start: Callable[..., StdioTransport], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    app = start("--unasked", "dies when asked", kind=SSEProxy)
    (spare,) = ahead(app.owner)
    eventually(lambda: f"{spare}] stderr: nobody asks me" in caplog.text)
    client = SseClient(WsgiFront(app)).open()
    assert client.result("count")["pid"] != spare
    client.close()


def test_two_messages_are_not_told_again(
    start: Callable[..., StdioTransport], caplog: pytest.LogCaptureFixture
) -> None:
    """The second may be a call, which is executed at most once."""
    app = start("--slow-start", "60", kind=SSEProxy)
    ahead(app.owner)
    client = SseClient(WsgiFront(app))
    client.connect()
    client.call("initialize", {"protocolVersion": "2024-11-05"})
    key = client.call("die", {"code": 7})
    assert "exit code 7" in client.answer(key)["error"]["message"]
    assert "started ahead exited" not in caplog.text
    client.close()


def test_a_server_that_no_session_can_start_fails_once(
    start: Callable[..., StdioTransport],
) -> None:
    app = start("--die-on-initialize")
    ahead(app.owner)
    answer = McpClient(WsgiFront(app)).initialize()
    assert answer.failure == "server-exited"
    assert answer.error()["message"] == "The server exited (exit code 3) before it answered"
    eventually(lambda: not app.owner.is_busy)


def test_a_server_that_cannot_be_started_is_not_tried_again_and_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = StreamableProxy("/no/such/server", options=ProxyOptions(spare_children=1))
    with app:
        app.owner.spares.keep()
        eventually(lambda: "cannot start" in caplog.text)
        eventually(lambda: app.owner.spares.interval == keeping.COMPLETE)
        assert caplog.text.count("cannot start") == 1


# --- the end -------------------------------------------------------------------------------------


def test_a_replica_that_drains_ends_them_while_calls_go_on(store: dict[str, Any]) -> None:
    with replicas(2, **store, spare_children=2) as two, ThreadPoolExecutor(1) as pool:
        owner, other = two.opened()
        before = pid_of(owner)
        ahead(two[0].app.owner, 2)
        call = hold(other, "h")
        next(call.stream())
        draining = pool.submit(two[0].app.close, 8)
        eventually(lambda: two[0].children == 1)
        assert is_alive(before)
        eventually(lambda: not two[0].app.owner.spares.is_running)
        release(owner, "h")
        draining.result(15)
        assert two[0].children == 0
        assert two[0].app.owner.spares.count == 0
        call.close()


def test_the_end_of_the_proxy_ends_them(start: Callable[..., StdioTransport]) -> None:
    app = start(spare_children=2)
    pids = ahead(app.owner, 2)
    app.close()
    assert not any(map(is_alive, pids))
    assert app.owner.spares.count == 0
    eventually(lambda: not app.owner.spares.is_running)


def test_one_that_is_being_started_ends_too(
    start: Callable[..., StdioTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, started, is_begun = start(), list[Child](), threading.Event()

    def late(*given: Any) -> Child:
        is_begun.set()
        eventually(lambda: app.owner.spares.is_stopping)
        time.sleep(0.2)  # as slow as the start of a process is on a busy machine
        started.append(Child(*given))
        return started[0]

    monkeypatch.setattr(supervising, "Child", late)
    app.owner.spares.keep()
    assert is_begun.wait(10)
    app.close()
    eventually(lambda: not app.owner.spares.is_running)
    assert not any(is_alive(child.pid) for child in started)


FORKED = """
import os, sys
from mcp_proxy import ProxyOptions, StreamableProxy
from tests.ownership.test_spares import ahead
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.transports.calls import pid_of

app = StreamableProxy(SCRIPTED, options=ProxyOptions(spare_children=1))
(spare,) = ahead(app.owner)
pid = os.fork()
if pid == 0:
    assert app.owner.spares.count == 0
    (own,) = ahead(app.owner)
    assert pid_of(McpClient(WsgiFront(app)).open()) == own != spare
    app.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert pid_of(McpClient(WsgiFront(app)).open()) == spare
app.close()
print("both")
"""


def test_a_fork_has_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("both\n", 0), done.stderr


# --- under gunicorn ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_a_worker_starts_them_before_its_first_request(
    kind: str, redis_url: str, redis_prefix: str
) -> None:
    options = ["--spare-children", "1", "--workers", "2", "--redis-url", redis_url]
    options += ["--worker-class", kind]
    with ProxyProcess(SCRIPTED, options=[*options, "--redis-prefix", redis_prefix]) as proxy:
        eventually(lambda: [len(children_of(pid)) for pid in proxy.worker_pids()] == [2, 2])
        spares = set(proxy.server_pids())
        assert pid_of(McpClient(HttpFront(proxy.base)).open()) in spares
