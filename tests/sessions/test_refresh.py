"""Open streams keep their sessions alive."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mcp_proxy import LocalStorage, Session, SessionManager
from mcp_proxy.background import Workers
from mcp_proxy.errors import SessionEnded, StorageError, StorageUnavailable
from mcp_proxy.sessions.refresh import SessionRefresher
from mcp_proxy.storage.session import new_session
from tests.support.waiting import eventually


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(clock: Clock) -> SessionManager:
    return SessionManager(LocalStorage(ttl=100, clock=clock))


def stored(manager: SessionManager, name: str) -> Session:
    session = new_session(name, "mcp")
    manager.create(session)
    return session


def test_a_held_session_outlives_its_time(manager: SessionManager, clock: Clock) -> None:
    held, other = stored(manager, "held"), stored(manager, "other")
    refresher = SessionRefresher(manager, 1_000_000)
    release = refresher.hold(held.id)
    for _ in range(5):
        clock.now += 60
        refresher.refresh()
    assert manager.load(held.id) == held
    with pytest.raises(SessionEnded):
        manager.load(other.id)
    release()
    clock.now += 60
    refresher.refresh()
    clock.now += 60
    with pytest.raises(SessionEnded):
        manager.load(held.id)
    refresher.stop()


def test_two_streams_of_a_session(manager: SessionManager, clock: Clock) -> None:
    stored(manager, "held")
    refresher = SessionRefresher(manager, 1_000_000)
    releases = [refresher.hold("held"), refresher.hold("held")]
    releases[0]()
    assert repr(refresher) == "<SessionRefresher held=1>"
    clock.now += 60
    refresher.refresh()
    clock.now += 60
    assert manager.exists("held")
    releases[1]()
    assert repr(refresher) == "<SessionRefresher held=0>"
    refresher.stop()


def test_a_session_that_is_over_stays_over(manager: SessionManager) -> None:
    stored(manager, "gone")
    stored(manager, "held")
    refresher = SessionRefresher(manager, 1_000_000)
    refresher.hold("gone")
    refresher.hold("held")
    manager.end("gone")
    refresher.refresh()
    assert not manager.exists("gone")
    assert manager.exists("held")
    refresher.stop()


@pytest.mark.parametrize(("error", "count"), [(StorageUnavailable, 1), (StorageError, 2)])
def test_a_store_that_is_away_is_left_alone_a_record_that_is_broken_passed_over(
    manager: SessionManager, monkeypatch: pytest.MonkeyPatch, error: type[Exception], count: int
) -> None:
    asked: list[str] = []

    def fail(session_id: str) -> Any:
        asked.append(session_id)
        raise error("on purpose")

    refresher = SessionRefresher(manager, 1_000_000)
    refresher.hold("a")
    refresher.hold("b")
    monkeypatch.setattr(manager.storage, "load", fail)
    refresher.refresh()
    assert len(asked) == count
    refresher.stop()


def test_it_happens_by_itself_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SessionManager(LocalStorage(ttl=0.6))
    refresher = SessionRefresher(manager, 0.6)
    before = set(threading.enumerate())

    def threads() -> int:
        new = set(threading.enumerate()) - before
        return sum(thread.name == "mcp-session-refresher" for thread in new)

    for number in range(5):
        stored(manager, str(number))
        refresher.hold(str(number))
    assert threads() == 1
    threading.Event().wait(1.5)
    assert all(manager.exists(str(number)) for number in range(5))
    refresher.stop()
    eventually(lambda: threads() == 0)


def test_the_time_to_live_is_the_storages() -> None:
    from mcp_proxy import TransparentProxy

    proxy = TransparentProxy("http://127.0.0.1:9", LocalStorage(ttl=30))
    assert proxy.refresher.interval == 10
    proxy.close()


def test_the_thread_starts_with_the_first_session_and_stands_among_the_workers(
    manager: SessionManager,
) -> None:
    workers = Workers()
    refresher = SessionRefresher(manager, 1_000_000, workers)
    assert not refresher.is_running
    refresher.hold("a")
    assert refresher.is_running
    assert refresher.name in repr(workers)
    refresher.stop(5)
    assert not refresher.is_running
    assert repr(workers) == "<Workers []>"
