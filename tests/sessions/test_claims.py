"""Claims: of all who want to bring a backend back exactly one does."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcp_proxy import LocalStorage, Session, SessionManager
from mcp_proxy.errors import (
    BackendLost,
    BackendTimeout,
    ClientLeft,
    SessionEnded,
    StorageUnavailable,
)
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


def living(claimant: str) -> bool:
    """For claims that nothing but time ends."""
    return False


def won(manager: SessionManager, session: Session) -> Session:
    claimed = claims.claim(manager, session, "me", living)
    assert claimed is not None
    return claimed


def test_one_of_many_wins_and_the_others_see_its_result(
    manager: SessionManager, session: Session
) -> None:
    barrier = threading.Barrier(16)

    def compete(number: int) -> bool:
        barrier.wait()
        claimed = claims.claim(manager, session, "me", living)
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
        waiting = pool.submit(claims.claim, manager, manager.load(session.id), "me", living)
        eventually(waiting.running)
        assert not waiting.done()
        assert claims.settle(manager, claimed, backend_url="new")
        assert waiting.result(5) is None


def test_a_claim_that_is_given_back_leaves_the_record_as_it_was(
    manager: SessionManager, session: Session
) -> None:
    claims.release(manager, won(manager, session))
    assert manager.load(session.id).metadata == session.metadata


def mark(manager: SessionManager, session: Session, deadline: object) -> Session:
    """The session with the claim of somebody whose clock we do not know."""
    marked = session.with_metadata(**{CLAIM: f"{deadline} 0123456789abcdef other"})
    assert manager.swap(session, marked)
    return marked


@pytest.mark.parametrize("deadline", ["4000000000.000", "now", "nan", "", "1e999"])
def test_a_claim_that_was_seen_for_its_time_is_taken_over_whatever_it_says(
    manager: SessionManager, session: Session, monkeypatch: pytest.MonkeyPatch, deadline: str
) -> None:
    monkeypatch.setattr(claims, "CLAIM_TIME", 0.2)
    first = mark(manager, session, time.time() if deadline == "now" else deadline)
    began = time.monotonic()
    second = won(manager, first)
    assert 0.1 < time.monotonic() - began < 2
    assert not claims.settle(manager, first, backend_url="late")
    assert claims.settle(manager, second, backend_url="new")


def test_who_has_seen_a_claim_before_does_not_wait_for_it_anew(
    manager: SessionManager, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = mark(manager, session, 4e9)
    seen = manager.first_seen(marked.metadata[CLAIM])
    now = time.monotonic
    monkeypatch.setattr(claims.time, "monotonic", lambda: now() + claims.CLAIM_TIME)
    began = now()
    won(manager, marked)
    assert now() - began < claims.CLAIM_TIME / 2
    assert manager.first_seen(marked.metadata[CLAIM]) == seen


def test_a_claim_that_is_long_over_is_taken_over_at_once(
    manager: SessionManager, session: Session
) -> None:
    began = time.monotonic()
    won(manager, mark(manager, session, time.time() - 86_400))
    assert time.monotonic() - began < claims.CLAIM_TIME / 2


def test_nobody_waits_for_ever_for_claims_that_follow_each_other(
    manager: SessionManager, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "CLAIM_TIME", 0.3)
    current = mark(manager, session, 4e9)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(claims.unclaimed, manager, current, living)
        while not waiting.done():
            following = current.with_metadata(**{CLAIM: f"4e9 {time.monotonic()} other"})
            assert manager.swap(current, following)
            current = following
            time.sleep(0.1)
        with pytest.raises(BackendTimeout):
            waiting.result()


@pytest.mark.parametrize("failure", [ValueError, BackendTimeout, KeyboardInterrupt])
def test_a_claim_is_given_back_whatever_goes_wrong(
    manager: SessionManager, session: Session, failure: type[BaseException]
) -> None:
    claimed = won(manager, session)
    with pytest.raises(failure), claims.released_on_failure(manager, claimed):
        raise failure
    assert manager.load(session.id).metadata == session.metadata


def test_the_failure_is_what_is_told_even_if_the_store_is_away_too(
    manager: SessionManager, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(old: Session, new: Session) -> bool:
        raise StorageUnavailable

    claimed = won(manager, session)
    monkeypatch.setattr(manager, "swap", away)
    with pytest.raises(ValueError, match="mine"), claims.released_on_failure(manager, claimed):
        raise ValueError("mine")


def test_a_client_that_leaves_waits_for_no_claim(manager: SessionManager, session: Session) -> None:
    assert claims.claim(manager, session, "other", lambda _: False) is not None
    held = manager.load(session.id)
    with pytest.raises(ClientLeft):
        claims.claim(manager, held, "me", lambda _: False, lambda: True)
    assert manager.load(session.id) == held


def test_a_claim_that_could_not_be_given_back_holds_up_nobody_here(
    manager: SessionManager, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = claims.claim(manager, session, "me", lambda _: False)
    assert claimed is not None

    def away(*_: object) -> bool:
        raise StorageUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(type(manager), "swap", away)
        with pytest.raises(BackendLost), claims.released_on_failure(manager, claimed):
            raise BackendLost("no server")
        with pytest.raises(StorageUnavailable):
            claims.give_back_left(manager)
    again = claims.claim(manager, manager.load(session.id), "me", lambda _: False)
    assert again is not None
    claims.give_back_left(manager)
    assert manager.claims_left() == {}
    assert manager.load(session.id) == again


def test_the_claim_of_somebody_who_has_gone_is_taken_over(
    manager: SessionManager, session: Session
) -> None:
    first = claims.claim(manager, session, "one", living)
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
        waiting = pool.submit(claims.claim, manager, manager.load(session.id), "me", living)
        eventually(waiting.running)
        manager.end(session.id)
        with pytest.raises(SessionEnded):
            waiting.result(5)


def test_who_waits_for_a_claim_has_a_time_limit_of_its_own(
    manager: SessionManager, session: Session
) -> None:
    marked = mark(manager, session, 4e9)
    began = time.monotonic()
    with pytest.raises(BackendTimeout, match=r"within 0\.2 seconds"):
        claims.claim(manager, marked, "me", living, limit=0.2)
    assert 0.1 < time.monotonic() - began < 5
