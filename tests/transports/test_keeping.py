"""Open streams keep their sessions alive."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mcp_proxy import LocalStorage, Session, SessionManager
from mcp_proxy.errors import SessionEnded, StorageError, StorageUnavailable
from mcp_proxy.sessions.refresh import SessionKeeper
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


def test_a_kept_session_outlives_its_time(manager: SessionManager, clock: Clock) -> None:
    kept, other = stored(manager, "kept"), stored(manager, "other")
    keeper = SessionKeeper(manager, 1_000_000)
    release = keeper.keep(kept.id)
    for _ in range(5):
        clock.now += 60
        keeper.prolong()
    assert manager.load(kept.id) == kept
    with pytest.raises(SessionEnded):
        manager.load(other.id)
    release()
    clock.now += 60
    keeper.prolong()
    clock.now += 60
    with pytest.raises(SessionEnded):
        manager.load(kept.id)
    keeper.close()


def test_two_streams_of_a_session(manager: SessionManager, clock: Clock) -> None:
    stored(manager, "kept")
    keeper = SessionKeeper(manager, 1_000_000)
    releases = [keeper.keep("kept"), keeper.keep("kept")]
    releases[0]()
    assert repr(keeper) == "<SessionKeeper kept=1>"
    clock.now += 60
    keeper.prolong()
    clock.now += 60
    assert manager.exists("kept")
    releases[1]()
    assert repr(keeper) == "<SessionKeeper kept=0>"
    keeper.close()


def test_a_session_that_is_over_stays_over(manager: SessionManager) -> None:
    stored(manager, "gone")
    stored(manager, "kept")
    keeper = SessionKeeper(manager, 1_000_000)
    keeper.keep("gone")
    keeper.keep("kept")
    manager.end("gone")
    keeper.prolong()
    assert not manager.exists("gone")
    assert manager.exists("kept")
    keeper.close()


@pytest.mark.parametrize(("error", "count"), [(StorageUnavailable, 1), (StorageError, 2)])
def test_a_store_that_is_away_is_left_alone_a_record_that_is_broken_passed_over(
    manager: SessionManager, monkeypatch: pytest.MonkeyPatch, error: type[Exception], count: int
) -> None:
    asked: list[str] = []

    def fail(session_id: str) -> Any:
        asked.append(session_id)
        raise error("on purpose")

    keeper = SessionKeeper(manager, 1_000_000)
    keeper.keep("a")
    keeper.keep("b")
    monkeypatch.setattr(manager.storage, "load", fail)
    keeper.prolong()
    assert len(asked) == count
    keeper.close()


def test_it_happens_by_itself_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SessionManager(LocalStorage(ttl=0.6))
    keeper = SessionKeeper(manager, 0.6)
    before = set(threading.enumerate())

    def threads() -> int:
        new = set(threading.enumerate()) - before
        return sum(thread.name == "mcp-keeper" for thread in new)

    for number in range(5):
        stored(manager, str(number))
        keeper.keep(str(number))
    assert threads() == 1
    threading.Event().wait(1.5)
    assert all(manager.exists(str(number)) for number in range(5))
    keeper.close()
    eventually(lambda: threads() == 0)


def test_the_time_to_live_is_the_storages() -> None:
    from mcp_proxy import TransparentProxy

    proxy = TransparentProxy("http://127.0.0.1:9", LocalStorage(ttl=30))
    assert proxy.keeper._interval == 10
    proxy.close()
