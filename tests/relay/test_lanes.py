"""Lanes: in order within one, independent of each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from mcp_proxy.relay.lanes import Lanes
from tests.support.threads import run_together
from tests.support.waiting import eventually

PATIENCE = 10.0


def void(value: object) -> None:
    """Passes over a value."""


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    """Four lanes move at a time."""
    made = Lanes(4)
    yield made
    made.close()


def test_what_is_in_one_lane_is_done_in_order_by_one_thread_at_a_time(lanes: Lanes) -> None:
    done: list[int] = []
    inside = threading.Lock()

    def act(number: int) -> None:
        assert inside.acquire(blocking=False), "two threads are in one lane"
        done.append(number)
        inside.release()

    for number in range(500):
        lanes.add("a", lambda number=number: act(number))
    eventually(lambda: len(done) == 500)
    assert done == list(range(500))


def test_a_blocked_lane_blocks_no_other(lanes: Lanes) -> None:
    free, done = threading.Event(), threading.Event()
    order: list[str] = []
    lanes.add("blocked", lambda: order.append("first" if free.wait(PATIENCE) else "never"))
    lanes.add("blocked", lambda: order.append("second"))
    lanes.add("other", done.set)
    assert done.wait(PATIENCE)
    assert order == []
    free.set()
    eventually(lambda: order == ["first", "second"])


def test_lanes_move_at_the_same_time_as_far_as_they_may(lanes: Lanes) -> None:
    together = threading.Barrier(4)
    passed: list[int] = []
    for number in range(4):
        lanes.add(str(number), lambda: passed.append(together.wait(PATIENCE)))
    eventually(lambda: len(passed) == 4)


def test_a_lane_that_waits_for_a_thread_gets_its_turn(lanes: Lanes) -> None:
    free, done = threading.Event(), threading.Event()
    for number in range(4):
        lanes.add(str(number), lambda: void(free.wait(PATIENCE)))
    lanes.add("fifth", done.set)
    assert not done.is_set()
    free.set()
    assert done.wait(PATIENCE)


def test_what_fails_does_not_stop_its_lane(lanes: Lanes) -> None:
    done = threading.Event()

    def fail() -> None:
        raise RuntimeError("this work is broken")

    lanes.add("a", fail)
    lanes.add("a", done.set)
    assert done.wait(PATIENCE)


def test_work_may_add_to_its_own_lane(lanes: Lanes) -> None:
    done: list[int] = []

    def act(number: int) -> None:
        done.append(number)
        if number < 5:
            lanes.add("a", lambda: act(number + 1))

    lanes.add("a", lambda: act(0))
    eventually(lambda: done == [0, 1, 2, 3, 4, 5])


def test_nothing_is_forgotten_when_many_threads_add(lanes: Lanes) -> None:
    done: dict[str, list[int]] = {str(lane): [] for lane in range(8)}

    def adding(lane: str) -> Callable[[], None]:
        def add() -> None:
            for number in range(300):
                lanes.add(lane, lambda number=number: done[lane].append(number))

        return add

    run_together([adding(lane) for lane in done])
    eventually(lambda: all(numbers == list(range(300)) for numbers in done.values()))


def test_lanes_that_are_done_are_not_kept(lanes: Lanes) -> None:
    for number in range(100):
        lanes.add(str(number), lambda: None)
    eventually(lambda: repr(lanes) == "<Lanes 0>")


def test_adding_to_closed_lanes_is_harmless_and_does_nothing() -> None:
    lanes, done = Lanes(2), threading.Event()
    lanes.close()
    lanes.add("a", done.set)
    lanes.add("a", done.set)
    assert not done.wait(0.05)


def test_what_waits_when_lanes_are_closed_is_not_begun() -> None:
    lanes, free, begun = Lanes(1), threading.Event(), threading.Event()
    under_way = threading.Event()

    def hold() -> None:
        under_way.set()
        free.wait(PATIENCE)

    lanes.add("a", hold)
    assert under_way.wait(PATIENCE)
    lanes.add("b", begun.set)
    lanes.close()
    free.set()
    assert not begun.wait(0.05)
