"""Where modern calls go: homes, which are recorded, found, taken over and ended."""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.config import ProxyOptions
from mcp_proxy.eras import legacy_home
from mcp_proxy.ownership import homes as homing
from mcp_proxy.ownership.homes import Homes
from mcp_proxy.storage.session import KINDS, PRINCIPAL
from tests.support.front import Json, McpClient, WsgiFront
from tests.support.modern_client import (
    ASKABLE,
    ModernClient,
    Trace,
    answering,
    server_of,
)
from tests.support.proxies import Replicas, replicas
from tests.support.threads import run_together
from tests.support.waiting import eventually

ERAS = ["modern", "legacy"]


@pytest.fixture(params=ERAS)
def era(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def two(store: dict[str, Any], era: str) -> Iterator[Replicas]:
    """Two replicas that take one another for gone after a second without a sign."""
    with replicas(2, **store, command=server_of(era), lease=1.0, sse_after=0.3) as several:
        yield several


def home_id(client: ModernClient) -> str:
    """The home of a client that can be asked."""
    state: str = client.asked("ask")["requestState"]
    return state.partition(".")[0]


# --- records -------------------------------------------------------------------------------------


def test_a_home_is_a_record_of_its_own_type_which_names_its_key() -> None:
    with replicas(1, command=server_of("legacy")) as one:
        client = ModernClient(one[0].front, {"elicitation": {}, "roots": {}}, "Bearer secret")
        record = one[0].app.manager.peek(home_id(client))
        assert record is not None
        assert record.type == homing.SHARED
        assert record.metadata[KINDS] == "elicitation.form,roots"
        assert len(record.metadata[PRINCIPAL]) == 64
        assert "secret" not in repr(record)
        assert hashlib.sha256(b"Bearer secret").hexdigest() != record.metadata[PRINCIPAL]
        assert record.backend_url is not None
        assert record.backend_url.startswith("worker://")


def test_a_home_is_no_session_of_a_legacy_client() -> None:
    with replicas(1, command=server_of("legacy")) as one:
        client = ModernClient(one[0].front, ASKABLE)
        thief = McpClient(one[0].front)
        thief.session = home_id(client)
        for answer in (thief.call("tools/list"), thief.listen(), thief.delete()):
            assert answer.status == 400
        assert client.pid()


def test_a_session_of_a_legacy_client_is_no_home() -> None:
    with replicas(1, command=server_of("legacy")) as one:
        session = McpClient(one[0].front).open("2025-11-25").session
        client = ModernClient(one[0].front, ASKABLE)
        retry = {"requestState": f"{session}.AAAA", "inputResponses": {}}
        assert client.tool("ask", retry=retry).error()["code"] == -32602


# --- one home a key ------------------------------------------------------------------------------


def test_one_home_a_key_at_two_replicas(two: Replicas, era: str) -> None:
    callers = ["Bearer a", "Bearer b"]
    clients = [
        ModernClient(replica.front, authorization=caller)
        for caller in callers
        for replica in two.each
    ]
    pids = run_together([client.pid for client in clients * 2])
    assert len(set(pids)) == len(callers)
    assert pids[0] == pids[1]
    eventually(lambda: sum(replica.children for replica in two.each) == len(callers))


def test_calls_at_once_after_the_owner_has_gone_share_one_home(two: Replicas) -> None:
    first, second = (ModernClient(replica.front) for replica in two.each)
    pid = first.pid()
    assert second.pid() == pid
    two[0].app.close()
    pids = run_together([second.pid] * 6)
    assert len(set(pids)) == 1
    assert pids[0] != pid
    eventually(lambda: two[1].children == 1)


def test_a_home_whose_server_is_killed_is_taken_by_whoever_comes_first(two: Replicas) -> None:
    clients = [ModernClient(replica.front) for replica in two.each]
    pid = clients[0].pid()
    assert clients[0].tool("crash").message()["error"]
    pids = run_together([client.pid for client in clients * 3])
    assert len(set(pids)) == 1
    assert pids[0] != pid
    eventually(lambda: sum(replica.children for replica in two.each) == 1)


# --- what a caller's clients can be asked for -----------------------------------------------------

SETS: list[Json] = [{}, {"elicitation": {}}, {"roots": {}}, {"sampling": {}}, ASKABLE]


def test_a_fifth_set_takes_the_place_of_the_one_that_was_unused_longest() -> None:
    with replicas(1, command=server_of("legacy")) as one:
        client = ModernClient(one[0].front)
        first, second, *others = (client.declaring(**declared) for declared in SETS)
        pids = [each.pid() for each in (first, second, *others[:-1])]
        stranger = client.known_as("Bearer other")
        theirs = stranger.pid()
        assert first.pid() == pids[0]
        last = others[-1].pid()
        eventually(lambda: one[0].children == homing.MAX_SETS + 1)
        assert [each.pid() for each in (first, *others)] == [pids[0], *pids[2:], last]
        assert stranger.pid() == theirs
        assert second.pid() not in pids
        eventually(lambda: one[0].children == homing.MAX_SETS + 1)
        assert first.pid() != pids[0]


def test_a_set_whose_place_is_taken_keeps_its_server_while_that_is_needed() -> None:
    with replicas(1, command=server_of("legacy"), sse_after=0.3) as one:
        client = ModernClient(one[0].front)
        everybody = [client.declaring(**declared) for declared in SETS]
        listening = [each.listen(toolsListChanged=True) for each in everybody]
        for answer in listening:
            assert next(answer.stream())["method"].endswith("acknowledged")
        one[0].app.owner.sweep()
        assert one[0].children == len(SETS)
        for answer in listening:
            answer.close()
        eventually(lambda: (one[0].app.owner.sweep(), one[0].children)[1] == homing.MAX_SETS)


def test_a_modern_server_has_one_home_whatever_its_clients_declare() -> None:
    with replicas(1, command=server_of("modern")) as one:
        client = ModernClient(one[0].front)
        assert len({client.declaring(**declared).pid() for declared in SETS}) == 1


# --- the end of a home ---------------------------------------------------------------------------


def test_a_home_that_nobody_uses_ends_and_comes_back(era: str) -> None:
    with replicas(1, command=server_of(era), idle_timeout=1) as one:
        client = ModernClient(one[0].front)
        pid = client.pid()
        eventually(lambda: one[0].children == 0)
        assert client.pid() != pid


def test_without_a_time_of_idleness_a_home_has_its_own(
    monkeypatch: pytest.MonkeyPatch, era: str
) -> None:
    monkeypatch.setattr(legacy_home, "HOME_IDLE", 0.2)
    monkeypatch.setattr(homing, "HOME_IDLE", 0.2)
    with replicas(1, command=server_of(era)) as one:
        client = ModernClient(one[0].front)
        pid = client.pid()
        eventually(lambda: (one[0].app.owner.sweep(), one[0].children)[1] == 0)
        assert client.pid() != pid


def test_a_session_keeps_its_server_when_the_home_beside_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(legacy_home, "HOME_IDLE", 0.2)
    with replicas(1, command=server_of("legacy")) as one:
        session = McpClient(one[0].front).open("2025-11-25")
        assert ModernClient(one[0].front).pid()
        assert one[0].children == 2
        eventually(lambda: (one[0].app.owner.sweep(), one[0].children)[1] == 1)
        assert session.call("tools/list").status == 200


def test_a_home_in_use_does_not_end(tmp_path: Path, era: str) -> None:
    trace = Trace(tmp_path / "trace")
    command = server_of(era, "--trace", str(trace.path))
    with replicas(1, command=command, idle_timeout=1, sse_after=0.3) as one:
        client = ModernClient(one[0].front)
        listening = client.listen(toolsListChanged=True)
        messages = listening.stream()
        next(messages)
        call = client.call("tools/call", {"name": "slow", "arguments": {"seconds": 2.5}})
        assert "result" in call.message()
        client.done("notify", kinds=["tools"])
        assert next(messages)["method"] == "notifications/tools/list_changed"
        assert len(trace.lines("pid")) == 1
        listening.close()
        eventually(lambda: one[0].children == 0)


def test_a_record_that_is_removed_takes_its_server_along() -> None:
    with replicas(1, command=server_of("legacy"), session_ttl=2) as one:
        client = ModernClient(one[0].front, ASKABLE)
        one[0].app.manager.end(home_id(client))
        eventually(lambda: one[0].children == 0)
        assert client.pid()


# --- what was started to learn the era -----------------------------------------------------------


def test_a_stranger_who_is_refused_leaves_no_server_behind() -> None:
    with replicas(1, command=server_of("legacy")) as one:
        stranger = ModernClient(WsgiFront(one[0].app, {"REMOTE_ADDR": "203.0.113.9"}))
        assert stranger.call("server/discover").status == 400
        eventually(lambda: one[0].children == 0)
        assert stranger.call("server/discover").status == 400
        assert one[0].children == 0


def test_a_state_that_leads_nowhere_leaves_no_server_behind() -> None:
    with replicas(1, command=server_of("legacy")) as one:
        client = ModernClient(one[0].front, ASKABLE)
        retry = {"requestState": f"home-{'0' * 40}.AAAA", "inputResponses": {}}
        assert client.tool("ask", retry=retry).error()["code"] == -32602
        eventually(lambda: one[0].children == 0)


def test_an_era_that_is_learnt_once_more_leaves_one_server(era: str) -> None:
    with replicas(1, command=server_of(era)) as one:
        owner = one[0].app.owner
        homes = Homes(owner, ProxyOptions())
        assert homes.is_modern("one", frozenset(), None) is (era == "modern")
        assert homes.is_modern_now("two", frozenset(), None) is (era == "modern")
        homes.end_first_home("two", frozenset())
        eventually(lambda: owner.supervisor.children == 0)


def test_what_a_server_speaks_is_asked_by_one_replica(
    redis_url: str, redis_prefix: str, tmp_path: Path
) -> None:
    store = {"redis_url": redis_url, "redis_prefix": redis_prefix}
    trace = Trace(tmp_path / "trace")
    command = server_of("legacy", "--trace", str(trace.path))
    with replicas(2, **store, command=command) as two:
        pids = {
            ModernClient(replica.front, authorization=f"Bearer {number}").pid()
            for number, replica in enumerate(two.each)
        }
        assert len(pids) == 2
        assert trace.lines("discover") == ["discover"]


def test_a_server_that_takes_long_where_it_has_never_run_is_asked_there(
    redis_url: str, redis_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As npx does it, on another machine than the first."""
    store = {"redis_url": redis_url, "redis_prefix": redis_prefix}
    trace = Trace(tmp_path / "trace")
    command = server_of("legacy", "--trace", str(trace.path), "--slow-start", "1")
    with replicas(2, **store, command=command) as two:
        assert ModernClient(two[0].front, authorization="Bearer 0").pid()
        monkeypatch.setattr(homing, "START_TIME", 0.2)
        other = ModernClient(two[1].front, authorization="Bearer 1")
        assert other.tool("pid").failure
        assert eventually(lambda: "result" in other.tool("pid").message())
        assert other.pid()


def test_the_end_of_the_proxy_ends_what_was_started(era: str) -> None:
    with replicas(1, command=server_of(era)) as one:
        clients = [ModernClient(one[0].front, ASKABLE, f"Bearer {n}") for n in range(3)]
        run_together([client.pid for client in clients])
        app = one[0].app
    assert app.owner.supervisor.children == 0


# --- further servers of a home -------------------------------------------------------------------


def test_servers_that_no_call_needs_end_but_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_home, "FURTHER_TIME", 0.3)
    with replicas(1, command=server_of("legacy"), idle_timeout=60) as one:
        client = ModernClient(one[0].front, ASKABLE)
        pid = client.pid()
        asked = [client.asked("ask", message=str(number)) for number in range(3)]
        assert one[0].children == 3
        one[0].app.owner.sweep()
        assert one[0].children == 3  # all of them wait for answers
        for number, each in enumerate(asked):
            client.tool("ask", message=str(number), retry=answering(each)).body()
        eventually(lambda: (one[0].app.owner.sweep(), one[0].children)[1] == 1)
        assert client.pid() == pid


def bridges() -> list[Bridge]:
    """Every one of this process that is not forgotten."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Bridge]


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "print('{')"])
def test_servers_that_did_not_start_are_forgotten(program: str) -> None:
    before = bridges()  # of other tests, which are kept by this list, too
    with replicas(1, command=(sys.executable, "-c", program)) as one:
        client = ModernClient(one[0].front)
        for _ in range(4):
            assert client.call("tools/list").failure
        # A thread may be about to end with one.
        eventually(lambda: len(bridges()) <= len(before) + 1)


def test_servers_that_were_not_needed_are_forgotten() -> None:
    before = bridges()
    with replicas(1, command=server_of("legacy", "--exit-on-discover")) as one:
        client = ModernClient(one[0].front)
        assert client.pid()
        eventually(lambda: all(each.is_alive for each in bridges() if each not in before))
