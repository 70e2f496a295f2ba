"""Sessions in memory: how they expire, and that their memory is bounded."""

from __future__ import annotations

import contextlib

import pytest

from mcp_proxy.errors import SessionExists, SessionNotFound
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage import records as local
from mcp_proxy.storage.records import ISSUED_TTL, LocalStorage
from tests.storage.stores import record
from tests.support.threads import run_together
from tests.support.waiting import eventually


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The clock of `storage`."""
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> LocalStorage:
    """A store in which records live for ten seconds."""
    return LocalStorage(ttl=10, clock=clock)


def held(storage: LocalStorage) -> tuple[int, int]:
    """How many records and issued ids the store holds, as it says itself."""
    sessions, issued = repr(storage)[1:-1].split()[1:3]
    return int(sessions.removeprefix("sessions=")), int(issued.removeprefix("issued="))


def test_a_record_is_gone_the_moment_its_time_is_over(storage: LocalStorage, clock: Clock) -> None:
    storage.create(record())
    clock.now += 9.999
    assert storage.exists("s")
    clock.now += 0.001
    assert not storage.exists("s")


@pytest.mark.parametrize("use", ["create", "load", "exists", "peek", "swap"])
def test_whatever_is_asked_sweeps_out_what_has_expired(
    storage: LocalStorage, clock: Clock, use: str
) -> None:
    for number in range(5):
        storage.create(record(f"old{number}"))
    clock.now += 10
    _use(storage, use)
    sessions, issued = held(storage)
    assert sessions == (1 if use == "create" else 0)
    assert issued >= 5


def _use(storage: LocalStorage, use: str) -> None:
    if use == "create":
        storage.create(record("new"))
    elif use == "load":
        with pytest.raises(SessionNotFound):
            storage.load("other")
    elif use == "exists":
        storage.exists("other")
    elif use == "peek":
        assert storage.peek("other") is None
    else:
        storage.swap(record("other"), record("other"))


def test_the_sweep_spares_what_was_used_since(storage: LocalStorage, clock: Clock) -> None:
    for session_id in ("loaded", "swapped", "idle"):
        storage.create(record(session_id))
    clock.now += 6
    storage.load("loaded")
    storage.swap(record("swapped"), record("swapped", a="1"))
    clock.now += 6
    assert not storage.exists("idle")
    assert held(storage) == (2, 3)
    assert storage.load("loaded") == record("loaded")
    assert storage.load("swapped") == record("swapped", a="1")


def test_an_id_of_our_own_form_costs_no_memory_once_it_is_over(storage: LocalStorage) -> None:
    minted = SessionManager().mint_id()
    storage.create(record(minted))
    assert held(storage) == (1, 0)
    storage.delete(minted)
    assert held(storage) == (0, 0)


def test_a_deleted_record_leaves_its_issued_id_only(storage: LocalStorage) -> None:
    storage.create(record())
    storage.delete("s")
    assert held(storage) == (0, 1)


def test_issued_ids_are_bounded_and_the_oldest_is_forgotten_first(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MAX_ISSUED", 3)
    for session_id in ("a", "b", "c", "d"):
        storage.create(record(session_id))
    assert [storage.issued(session_id) for session_id in "abcd"] == [False, True, True, True]
    assert held(storage) == (4, 3)


def test_texts_that_are_kept_are_bounded_and_the_oldest_goes_first(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MAX_KEPT", 3)
    for name in ("a", "b", "c", "d"):
        storage.keep(name, name, 60)
    assert [storage.kept(name) for name in "abcd"] == [None, "b", "c", "d"]


def test_an_id_that_is_issued_again_counts_as_new(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(local, "MAX_ISSUED", 2)
    storage.create(record("a"))
    storage.create(record("b"))
    clock.now += 60
    storage.create(record("a"))
    storage.create(record("c"))
    assert [storage.issued(session_id) for session_id in "abc"] == [True, False, True]
    clock.now += ISSUED_TTL - 1
    assert storage.issued("a")


def test_an_id_is_forgotten_after_seven_days(storage: LocalStorage, clock: Clock) -> None:
    storage.create(record())
    clock.now += ISSUED_TTL - 0.5
    assert storage.issued("s")
    clock.now += 0.5
    assert not storage.issued("s")


def test_stores_know_nothing_of_each_other(storage: LocalStorage) -> None:
    storage.create(record())
    other = LocalStorage()
    assert not other.exists("s")
    assert not other.issued("s")


def test_no_thread_swaps_what_another_one_has_just_swapped() -> None:
    storage = LocalStorage()
    storage.create(record(count="0"))

    def add_many() -> int:
        won = 0
        for _ in range(6000):
            old = storage.load("s")
            count = int(old.metadata["count"]) + 1
            won += storage.swap(old, record(count=str(count)))
        return won

    won = run_together([add_many] * 8)
    assert storage.load("s") == record(count=str(sum(won)))


def test_no_two_threads_create_the_same_id() -> None:
    storage = LocalStorage()

    def create_many() -> int:
        created = 0
        for number in range(8000):
            with contextlib.suppress(SessionExists):
                storage.create(record(str(number)))
                created += 1
        return created

    assert sum(run_together([create_many] * 8)) == 8000


def test_without_a_clock_of_its_own_time_passes_by_itself() -> None:
    storage = LocalStorage(ttl=0.05)
    storage.create(record())
    eventually(lambda: not storage.exists("s"), message="the record did not expire")


def test_the_time_to_live_is_two_hours_unless_given() -> None:
    assert LocalStorage().ttl == 7200


def test_the_memory_of_records_is_bounded_and_the_least_recently_used_end_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 10 * (10_000 + local.RECORD_COST) + 5_000
    monkeypatch.setattr(local, "MAX_RECORDS_BYTES", limit)
    storage = LocalStorage()
    for number in range(10):
        storage.create(record(f"s{number}", init_body="x" * 10_000))
    storage.load("s0")
    old = storage.load("s2")
    assert storage.swap(old, old.with_metadata(init_body="x" * 30_000))
    held = [number for number in range(10) if storage.exists(f"s{number}")]
    assert held == [0, 2, 4, 5, 6, 7, 8, 9]
    for number in range(10):
        storage.delete(f"s{number}")
    assert "bytes=0" in repr(storage)
