"""Clients that leave while their request waits."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mcp_proxy.background import Workers
from mcp_proxy.edge import disconnects
from mcp_proxy.edge.disconnects import ClientConnection, DisconnectWatcher
from tests.support.waiting import eventually


class Visitor:
    """A client as waitress shows it."""

    def __init__(self) -> None:
        self.has_left = False
        self.looks = 0
        self.connection = ClientConnection({"waitress.client_disconnected": self._look})

    def _look(self) -> bool:
        self.looks += 1
        return self.has_left

    def wait_for_looks(self, count: int = 3) -> None:
        """Returns when so many more looks have begun; all but the last are over then."""
        wanted = self.looks + count
        eventually(lambda: self.looks >= wanted)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnects, "LOOK", 0.01)


@pytest.fixture
def watcher() -> Iterator[DisconnectWatcher]:
    watcher = DisconnectWatcher()
    yield watcher
    watcher.stop(5)
    assert not watcher.is_running


def test_a_disconnect_is_told_once(watcher: DisconnectWatcher) -> None:
    client, told = Visitor(), []
    watcher.watch(client.connection, lambda: told.append(1))
    client.wait_for_looks()
    assert told == []
    client.has_left = True
    eventually(lambda: told)
    other = Visitor()
    watcher.watch(other.connection, lambda: None)
    other.wait_for_looks()
    assert told == [1]


def test_who_is_not_watched_any_more_is_not_told(watcher: DisconnectWatcher) -> None:
    client, told = Visitor(), []
    forget = watcher.watch(client.connection, lambda: told.append(1))
    forget()
    forget()
    client.has_left = True
    other = Visitor()
    watcher.watch(other.connection, lambda: None)
    other.wait_for_looks()
    assert told == []


def test_a_failure_does_not_end_the_watching(watcher: DisconnectWatcher, caplog: Any) -> None:
    first, second = Visitor(), Visitor()
    told = threading.Event()

    def fail() -> None:
        raise RuntimeError("on purpose")

    watcher.watch(first.connection, fail)
    watcher.watch(second.connection, told.set)
    first.has_left = True
    eventually(lambda: "on purpose" in caplog.text)
    second.has_left = True
    assert told.wait(5)


def test_a_server_that_shows_no_connection_starts_nothing(watcher: DisconnectWatcher) -> None:
    before = threading.active_count()
    watcher.watch(ClientConnection({}), lambda: None)()
    assert threading.active_count() == before
    assert repr(watcher) == "<DisconnectWatcher watched=0>"


@pytest.mark.parametrize("reset", [False, True])
def test_a_socket_that_was_closed(watcher: DisconnectWatcher, reset: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        told = threading.Event()
        watcher.watch(ClientConnection({"gunicorn.socket": ours}), told.set)
        theirs.send(b"the next request")
        assert not told.wait(0.05)
        theirs.close()
        assert told.wait(5)


def test_many_at_once(watcher: DisconnectWatcher) -> None:
    clients, told = [Visitor() for _ in range(200)], []
    for number, client in enumerate(clients):
        watcher.watch(client.connection, lambda number=number: told.append(number))  # type: ignore[misc]
    for client in clients[::2]:
        client.has_left = True
    eventually(lambda: len(told) == 100)
    assert sorted(told) == list(range(0, 200, 2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_thread_is_missed_when_it_has_ended_and_started_again_with_the_next_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers()
    watcher = DisconnectWatcher(workers)
    assert workers.not_ready_reason() is None  # nothing has started

    def end() -> None:
        raise SystemExit

    watcher.watch(Visitor().connection, lambda: None)
    monkeypatch.setattr(watcher, "look", end)
    reason = eventually(workers.not_ready_reason)
    assert reason == "the thread mcp-disconnects has ended"
    assert workers.ended(is_essential=True) is None
    monkeypatch.undo()
    client = Visitor()
    watcher.watch(client.connection, lambda: None)
    client.wait_for_looks()
    assert workers.not_ready_reason() is None
    watcher.stop(5)
    assert workers.not_ready_reason() is None


def test_nobody_looks_while_nothing_is_watched(
    watcher: DisconnectWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Visitor()
    forget = watcher.watch(client.connection, lambda: None)
    client.wait_for_looks()
    looks: list[int] = []
    forget()
    threading.Event().wait(0.05)  # the look that has begun
    monkeypatch.setattr(watcher, "look", lambda: looks.append(1))
    threading.Event().wait(0.1)
    assert looks == []
    assert watcher.is_running
