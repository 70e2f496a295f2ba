"""Starts that take turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcp_proxy import ProxyOptions, StreamableProxy
from mcp_proxy.errors import ClientLeft, Draining, Overloaded
from mcp_proxy.ownership import turns as turning
from mcp_proxy.ownership.turns import Turns
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.waiting import eventually


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def waiting(turns: Turns) -> int:
    return int(repr(turns).partition("waiting=")[2].rstrip(">"))


def test_who_comes_first_is_served_first(pool: ThreadPoolExecutor) -> None:
    turns, served = Turns(lambda: 1), []
    first = turns.take(10)

    def serve(name: int) -> None:
        with turns.take(60):
            served.append(name)

    starts = []
    for name in range(5):
        starts.append(pool.submit(serve, name))
        eventually(lambda: waiting(turns) == len(starts))
    first.give_back()
    for start in starts:
        start.result(10)
    assert served == [0, 1, 2, 3, 4]
    assert repr(turns) == "<Turns under_way=0 waiting=0>"


def test_as_many_as_may_start_at_once() -> None:
    turns = Turns(lambda: 2)
    first = turns.take(10)
    with turns.take(10), pytest.raises(Overloaded, match="try again"):
        turns.take(0)
    first.give_back()
    first.give_back()
    with turns.take(10), turns.take(10), pytest.raises(Overloaded):
        turns.take(0.01)


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No start counts as long."""
    monkeypatch.setattr(turning, "LONGEST", 60.0)


def test_who_has_left_is_passed_over(pool: ThreadPoolExecutor) -> None:
    turns, leaves = Turns(lambda: 1), threading.Event()
    first = turns.take(10)
    left = pool.submit(turns.take, 60, leaves.is_set)
    eventually(lambda: waiting(turns) == 1)
    stays = pool.submit(turns.take, 60)
    eventually(lambda: waiting(turns) == 2)
    leaves.set()
    with pytest.raises(ClientLeft):
        left.result(10)
    assert waiting(turns) == 1
    first.give_back()
    stays.result(10).give_back()


def test_a_start_that_takes_long_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turning, "LONGEST", 0.1)
    turns = Turns(lambda: 1)
    turns.take(10)
    turns.take(10)


# --- servers -------------------------------------------------------------------------------------


@pytest.fixture
def slow() -> Iterator[StreamableProxy]:
    command = [*SCRIPTED, "--slow-start", "0.3"]
    with StreamableProxy(command, options=ProxyOptions()) as proxy:
        proxy.owner.supervisor.cpu_affinity = frozenset({0})
        yield proxy


def test_no_more_servers_than_that_are_starting_at_once(
    slow: StreamableProxy, pool: ThreadPoolExecutor
) -> None:
    clients = [McpClient(WsgiFront(slow)) for _ in range(8)]
    seen = []

    def look() -> bool:
        begun, held = slow.owner.supervisor.children, len(slow.owner.backends)
        seen.append(begun - held)
        return all(start.done() for start in starts)

    starts = [pool.submit(client.open) for client in clients]
    eventually(look, timeout=30)
    assert max(seen) <= 3  # one more may have answered and not be held yet
    assert repr(slow.owner.turns) == "<Turns under_way=0 waiting=0>"
    for client in clients:
        assert client.result("count")["calls"] == 1


def test_what_is_brought_back_waits_in_the_same_line(
    slow: StreamableProxy, pool: ThreadPoolExecutor
) -> None:
    client = McpClient(WsgiFront(slow)).open()
    client.call("die").body()
    eventually(lambda: slow.owner.supervisor.children == 0)
    held = [slow.owner.turns.take(10) for _ in range(2)]
    back = pool.submit(client.result, "count")
    eventually(lambda: waiting(slow.owner.turns) == 1)
    assert slow.owner.supervisor.children == 0
    held[0].give_back()
    assert back.result(10)["calls"] == 1
    held[1].give_back()


@pytest.mark.parametrize("option", ["--refuse", "--die-on-initialize"])
def test_a_turn_is_given_back_whatever_becomes_of_the_start(option: str) -> None:
    with StreamableProxy([*SCRIPTED, option]) as proxy:
        for _ in range(3):
            McpClient(WsgiFront(proxy)).initialize().body()
        eventually(lambda: "under_way=0" in repr(proxy.owner.turns))


def test_a_turn_is_given_back_where_there_is_no_server() -> None:
    with StreamableProxy(["/no/such/server"]) as proxy:
        for _ in range(3):
            assert McpClient(WsgiFront(proxy)).initialize().failure == "server-start-failed"
        assert "under_way=0" in repr(proxy.owner.turns)


def test_a_start_that_nobody_waits_for_begins_when_no_other_does() -> None:
    turns = Turns(lambda: 2)
    with turns.take(10):
        assert not turns.take_ahead()
    assert turns.take_ahead()
    assert not turns.take_ahead(), "one at a time"
    with turns.take(0), turns.take(0):
        pass  # it keeps no other waiting


def test_no_start_is_made_ahead_where_another_waits_or_after_the_end(
    pool: ThreadPoolExecutor,
) -> None:
    turns = Turns(lambda: 0)
    waits = pool.submit(turns.take, 60)
    eventually(lambda: waiting(turns) == 1)
    assert not turns.take_ahead()
    turns.close()
    with pytest.raises(Draining):
        waits.result(10)
    assert not turns.take_ahead()


def test_starts_ahead_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turning, "LONGEST", 0.05)
    turns = Turns(lambda: 1)
    assert turns.take_ahead()
    eventually(turns.take_ahead)
