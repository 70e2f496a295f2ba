"""Several gunicorns that share a store are seen on the page of each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mcp_proxy import metrics
from mcp_proxy.metrics import MetricsPage
from mcp_proxy.monitoring.hosts import KEPT, MAX_HOSTS, Hosts
from mcp_proxy.monitoring.status import ServerPart, WorkerPart, document, for_others, write
from mcp_proxy.storage.records import LocalStorage


class Gunicorn:
    """One with a worker, as others see it."""

    def __init__(self, storage: LocalStorage, name: str) -> None:
        self.page = MetricsPage(2)
        self.name = name
        self.counters = self.page.take(0)
        self.hosts = Hosts(storage, lambda: for_others(self.page, "1"))

    def turn(self) -> None:
        """What its worker does every second or two."""
        if time.monotonic() - max(self.page.looked_at(), self.page.looked_from_afar_at()) < 10:
            server = ServerPart("s", "what", "ok" if self.name == "a" else "failed", self.name)
            noted = [], self.counters.recent.failures()
            write(self.counters, WorkerPart(ord(self.name[0]), 0.0, 4, {}, [server], *noted))
        metrics.use(self.counters)
        self.hosts.exchange()

    def look(self) -> Any:
        """Somebody looks at its page."""
        self.page.look(time.monotonic())
        return json.loads(document(self.page, "1"))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> Iterator[LocalStorage]:
    yield LocalStorage(clock=clock)
    metrics.use(None)


def test_the_page_of_one_shows_the_workers_of_all(storage: LocalStorage) -> None:
    a, b = Gunicorn(storage, "a"), Gunicorn(storage, "b")
    b.counters.recent.note_call("session-00000001", "s")
    b.counters.recent.note_failure("s", "it exited", [])
    a.look()
    for _ in range(3):
        a.turn()
        b.turn()
    told = a.look()
    assert [worker["pid"] for worker in told["workers"]] == [ord("a"), ord("b")]
    assert len(told["hosts"]) == 2
    (server,) = told["servers"]
    assert (server["state"], server["reason"]) == ("failed", "b")
    (session,), (failure,) = told["sessions"], told["failures"]
    assert session["id"] == "00000001"
    assert abs(session["last"] - time.time()) < 60
    assert failure["reason"] == "it exited"


def test_nobody_writes_unless_somebody_looks(storage: LocalStorage, clock: Clock) -> None:
    a, b = Gunicorn(storage, "a"), Gunicorn(storage, "b")
    for _ in range(3):
        a.turn()
        b.turn()
    assert all(storage.kept(f"host {number}") is None for number in range(MAX_HOSTS))
    assert a.page.texts.read(0) == b.page.texts.read(0) == b""
    a.look()
    a.turn()
    b.turn()
    assert sum(storage.kept(f"host {number}") is not None for number in range(MAX_HOSTS)) == 2
    clock.now += KEPT + 1
    assert all(storage.kept(f"host {number}") is None for number in range(MAX_HOSTS))


def test_who_looks_at_one_keeps_no_other_looking(storage: LocalStorage, clock: Clock) -> None:
    """One that writes for somebody who looks elsewhere is no reason for others to go on."""
    a, b = Gunicorn(storage, "a"), Gunicorn(storage, "b")
    a.look()
    a.turn()
    b.turn()
    a.page.look(0.0)
    clock.now += KEPT + 1
    for _ in range(3):
        b.turn()
        a.turn()
    assert all(storage.kept(f"host {number}") is None for number in range(MAX_HOSTS))


def test_there_is_room_for_so_many_and_one_that_ends_makes_room(
    storage: LocalStorage, clock: Clock
) -> None:
    all_of_them = [Gunicorn(storage, chr(ord("a") + number)) for number in range(MAX_HOSTS + 2)]
    first = all_of_them[0]
    first.look()
    for _ in range(3):
        for each in all_of_them:
            each.turn()
    assert len(first.look()["workers"]) == MAX_HOSTS
    clock.now += KEPT + 1
    for _ in range(3):
        for each in all_of_them[0], *all_of_them[-2:]:
            each.turn()
    assert len(first.look()["workers"]) == 3


def test_what_another_version_shows_in_another_form_is_left_out(storage: LocalStorage) -> None:
    a = Gunicorn(storage, "a")
    a.look()
    for number, text in enumerate(
        ["v " + "x" * 600_000, "x {}", "y []", "z nonsense", 'w {"now": 1, "workers": [{}]}']
    ):
        storage.put(f"host {number}", text, KEPT)
    for _ in range(2):
        a.turn()
    assert [worker["pid"] for worker in a.look()["workers"]] == [ord("a")]


def test_of_several_workers_the_first_one_that_goes_on_writes_for_all(
    storage: LocalStorage,
) -> None:
    a = Gunicorn(storage, "a")
    second = a.page.take(1)
    a.look()
    metrics.use(second)
    a.hosts.exchange()
    assert all(storage.kept(f"host {number}") is None for number in range(MAX_HOSTS))
    a.counters.say(metrics.Health.DRAINING)
    a.hosts.exchange()
    assert sum(storage.kept(f"host {number}") is not None for number in range(MAX_HOSTS)) == 1
