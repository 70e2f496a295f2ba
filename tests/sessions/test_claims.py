"""Claims: of all who want to bring a backend back exactly one does."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcp_proxy import LocalStorage, Session, SessionManager
from mcp_proxy.errors import SessionEnded
from mcp_proxy.sessions import claims
from mcp_proxy.storage.session import CLAIM, new_session
from tests.support.waiting import eventually


@pytest.fixture
def manager() -> SessionManager:
    return SessionManager(LocalStorage())


@pytest.fixture
def session(manager: SessionManager) -> Session:
    session = new_session("mcp-00000000-" + "0" * 32, "streamable", backend_url="old")
    manager.create(session)
    return session


def won(manager: SessionManager, session: Session) -> Session:
    claimed = claims.claim(manager, session)
    assert claimed is not None
    return claimed


def test_one_of_many_wins_and_the_others_see_its_result(
    manager: SessionManager, session: Session
) -> None:
    barrier = threading.Barrier(16)

    def compete(number: int) -> bool:
        barrier.wait()
        claimed = claims.claim(manager, session)
        if claimed is None:
            return False
        return claims.settle(manager, claimed, backend_url=f"new-{number}")

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(compete, range(16)))
    assert results.count(True) == 1
    record = manager.load(session.id)
    assert record.metadata == {"backend_url": f"new-{results.index(True)}"}


def test_who_comes_later_waits_for_the_claimant(manager: SessionManager, session: Session) -> None:
    claimed = won(manager, session)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(claims.claim, manager, manager.load(session.id))
        eventually(waiting.running)
        assert not waiting.done()
        assert claims.settle(manager, claimed, backend_url="new")
        assert waiting.result(5) is None


def test_a_claim_that_is_given_back_leaves_the_record_as_it_was(
    manager: SessionManager, session: Session
) -> None:
    claims.release(manager, won(manager, session))
    assert manager.load(session.id).metadata == session.metadata


def test_a_claim_whose_time_is_over_is_taken_over(
    manager: SessionManager, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "CLAIM_TIME", 0.1)
    first = won(manager, session)
    eventually(lambda: time.time() > float(first.metadata[CLAIM].split()[0]))
    second = won(manager, manager.load(session.id))
    assert not claims.settle(manager, first, backend_url="late")
    assert claims.settle(manager, second, backend_url="new")


def test_the_claim_of_somebody_who_has_gone_is_taken_over(
    manager: SessionManager, session: Session
) -> None:
    first = claims.claim(manager, session, "one")
    assert first is not None
    with ThreadPoolExecutor(1) as pool:
        gone = threading.Event()
        again = manager.load(session.id)
        waiting = pool.submit(claims.unclaimed, manager, again, lambda who: gone.is_set())
        eventually(waiting.running)
        assert not waiting.done()
        gone.set()
        assert waiting.result(5) == first
    second = claims.claim(manager, first, "two", lambda who: who == "one")
    assert second is not None
    assert claims.settle(manager, second, backend_url="new")


def test_a_session_that_was_ended_meanwhile_stays_ended(
    manager: SessionManager, session: Session
) -> None:
    claimed = won(manager, session)
    manager.end(session.id)
    assert not claims.settle(manager, claimed, backend_url="new")
    assert not manager.exists(session.id)


def test_who_waits_learns_that_the_session_was_ended(
    manager: SessionManager, session: Session
) -> None:
    won(manager, session)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(claims.claim, manager, manager.load(session.id))
        eventually(waiting.running)
        manager.end(session.id)
        with pytest.raises(SessionEnded):
            waiting.result(5)
