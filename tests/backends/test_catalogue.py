"""For how long what a server lists is waited for, and by whom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import cast

import pytest
from msgspec import Raw

from mcp_proxy.backends import catalogue
from mcp_proxy.backends.catalogue import GATHER_TIMEOUT, Catalogue, Gathering, Listed
from mcp_proxy.background import TimerWorker


class Timer:
    """A clock that the test sets, and what is to be done later by it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.later: list[float] = []
        self.acts: list[Callable[[], object]] = []

    def monotonic(self) -> float:
        """The time."""
        return self.now

    def call_later(self, seconds: float, act: Callable[[], object]) -> None:
        """Notes when something is to be done."""
        self.later.append(self.now + seconds)
        self.acts.append(act)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    """The timer that the catalogue has."""
    made = Timer()
    monkeypatch.setattr(catalogue, "time", made)
    return made


@pytest.fixture
def answer(timer: Timer) -> Iterator[threading.Event]:
    """Has the servers answer."""
    event = threading.Event()
    yield event
    event.set()


def gathering(known: Catalogue, answer: threading.Event, *keys: str) -> Gathering:
    """Somebody who waits for what servers list that have not answered yet."""

    def look() -> Listed:
        answer.wait()
        return Listed(Raw(b"{}"), {})

    looks = dict.fromkeys(keys, look)
    return Gathering(known, looks, GATHER_TIMEOUT, lambda: None, lambda: True)


def test_who_comes_later_waits_no_longer_than_who_has_begun(
    timer: Timer, answer: threading.Event
) -> None:
    known = Catalogue(cast(TimerWorker, timer), 2)
    gathering(known, answer, "one").begin()
    timer.now += 3
    gathering(known, answer, "one").begin()
    assert timer.later == [100 + GATHER_TIMEOUT] * 2
    gathering(known, answer, "one", "two").begin()
    assert timer.later[2] == 100 + GATHER_TIMEOUT
    timer.now = timer.later[2]
    timer.acts[2]()
    assert timer.later[3] == 103 + GATHER_TIMEOUT
    known.close()
