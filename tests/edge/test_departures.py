"""Clients that leave while their request waits."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from mcp_proxy.edge import disconnects as departures
from mcp_proxy.edge.disconnects import ClientConnection, Departures
from tests.support.waiting import eventually


class Gone:
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
    monkeypatch.setattr(departures, "LOOK", 0.01)


def test_a_departure_is_told_once() -> None:
    watching, client, told = Departures(), Gone(), []
    watching.watch(client.connection, lambda: told.append(1))
    client.wait_for_looks()
    assert told == []
    client.has_left = True
    eventually(lambda: told)
    witness = Gone()
    watching.watch(witness.connection, lambda: None)
    witness.wait_for_looks()
    assert told == [1]


def test_who_is_not_watched_any_more_is_not_told() -> None:
    watching, client, told = Departures(), Gone(), []
    forget = watching.watch(client.connection, lambda: told.append(1))
    forget()
    forget()
    client.has_left = True
    witness = Gone()
    watching.watch(witness.connection, lambda: None)
    witness.wait_for_looks()
    assert told == []


def test_a_failure_does_not_end_the_watching(caplog: Any) -> None:
    watching, first, second = Departures(), Gone(), Gone()
    told = threading.Event()

    def fail() -> None:
        raise RuntimeError("on purpose")

    watching.watch(first.connection, fail)
    watching.watch(second.connection, told.set)
    first.has_left = True
    eventually(lambda: "on purpose" in caplog.text)
    second.has_left = True
    assert told.wait(5)


def test_a_server_that_shows_no_connection_starts_nothing() -> None:
    watching = Departures()
    before = threading.active_count()
    watching.watch(ClientConnection({}), lambda: None)()
    assert threading.active_count() == before
    assert repr(watching) == "<Departures watched=0>"


@pytest.mark.parametrize("reset", [False, True])
def test_a_socket_that_was_closed(reset: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watching, told = Departures(), threading.Event()
        watching.watch(ClientConnection({"gunicorn.socket": ours}), told.set)
        theirs.send(b"the next request")
        assert not told.wait(0.05)
        theirs.close()
        assert told.wait(5)


def test_many_at_once() -> None:
    watching, clients, told = Departures(), [Gone() for _ in range(200)], []
    for number, client in enumerate(clients):
        watching.watch(client.connection, lambda number=number: told.append(number))  # type: ignore[misc]
    for client in clients[::2]:
        client.has_left = True
    eventually(lambda: len(told) == 100)
    assert sorted(told) == list(range(0, 200, 2))
