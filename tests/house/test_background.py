"""The threads of the package: what ends them, what does not, and who says so."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.background import (
    KeyedExecutor,
    Periodic,
    QueueWorker,
    Reader,
    SelectorWorker,
    TimerWorker,
    Worker,
    Workers,
)
from tests.support.ended_threads import end_thread, end_worker, threads_end
from tests.support.threads import run_together
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]

PATIENCE = 10.0
NEVER = 1000.0


class Unforeseen(Exception):
    """What no loop has reckoned with."""


def fail() -> None:
    raise Unforeseen("this work is broken")


class Stubborn(Worker):
    """Does not look up when it is woken, only when it is released."""

    def __init__(self, workers: Workers | None = None) -> None:
        super().__init__("stubborn", workers)
        self.is_inside = threading.Event()
        self.release = threading.Event()

    def wake(self) -> None:
        """It would not listen."""

    def run_once(self) -> None:
        self.is_inside.set()
        self.release.wait(PATIENCE)


class Calling(QueueWorker[Callable[[], object]]):
    """Calls what it finds in its queue."""

    def run_once(self) -> None:
        for act in self.take(None):
            act()


class Acting:
    """A worker of some kind, and the way to have its thread call something."""

    def __init__(self, kind: str) -> None:
        self.workers = Workers()
        self.worker: Worker
        self.call: Callable[[Callable[[], object]], None]
        self._acts: list[Callable[[], object]] = []
        if kind == "periodic":
            self.worker = Periodic("test", NEVER, self._act, self.workers)
            self.call = self._act_later
        elif kind == "queue":
            self.worker = calling = Calling("test", self.workers)
            self.call = calling.put
        elif kind == "timer":
            self.worker = timing = TimerWorker("test", self.workers)
            timing.is_essential = True
            self.call = partial(timing.call_later, 0.0)
        else:
            self.worker = selecting = SelectorWorker("test", self.workers)
            self.call = selecting.call

    def _act_later(self, act: Callable[[], object]) -> None:
        self._acts.append(act)
        self.worker.wake()

    def _act(self) -> None:
        while self._acts:
            self._acts.pop(0)()

    def require_work(self) -> None:
        """Fails unless the thread does something."""
        done = threading.Event()
        self.call(done.set)
        assert done.wait(PATIENCE)


KINDS = ["periodic", "queue", "timer", "selector"]


@pytest.fixture(params=KINDS)
def acting(request: pytest.FixtureRequest) -> Iterator[Acting]:
    """A worker of each kind that there is, not started."""
    made = Acting(request.param)
    yield made
    made.worker.stop(PATIENCE)
    assert not made.worker.is_running


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The system has no thread to give, until this is undone."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    return monkeypatch


# --- beginning -----------------------------------------------------------------------------------


def test_nothing_starts_in_a_constructor() -> None:
    before = threading.enumerate(), os.listdir("/proc/self/fd")
    made: list[object] = [Acting(kind).worker for kind in KINDS]
    made += [Reader("test", fail, fail), KeyedExecutor("test", 4), Stubborn(), Workers()]
    assert (threading.enumerate(), os.listdir("/proc/self/fd")) == before


def test_a_thread_is_a_daemon_and_bears_the_name_of_its_worker(acting: Acting) -> None:
    found: list[threading.Thread] = []
    acting.worker.start()
    acting.call(lambda: found.append(threading.current_thread()))
    (thread,) = eventually(lambda: list(found))
    assert thread.daemon
    assert thread.name == acting.worker.name == "test"


def test_starting_twice_is_harmless(acting: Acting) -> None:
    before = threading.active_count()
    run_together([acting.worker.start] * 8)
    assert threading.active_count() == before + 1
    acting.require_work()


def test_a_start_that_fails_leaves_nothing_half_started(
    acting: Acting, no_threads: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't start"):
            acting.worker.start()
        assert not acting.worker.is_running
        assert acting.worker.not_ready_reason() is None
        assert acting.workers.not_ready_reason() is None
    acting.worker.wait(PATIENCE)
    no_threads.undo()
    acting.worker.start()
    acting.require_work()


def test_what_the_loop_needs_is_made_once_and_again_if_that_failed() -> None:
    class Preparing(Calling):
        prepared = 0

        def prepare(self) -> None:
            self.prepared += 1
            if self.prepared == 1:
                raise OSError("no more files")

    worker = Preparing("test")
    with pytest.raises(OSError, match="files"):
        worker.start()
    assert not worker.is_running
    for _ in range(3):
        worker.start()
    assert worker.prepared == 2
    worker.stop(PATIENCE)


def test_a_fork_begins_anew() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.house.forking"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- going on ------------------------------------------------------------------------------------


def test_a_loop_survives_what_it_did_not_foresee_and_says_so(
    acting: Acting, caplog: pytest.LogCaptureFixture
) -> None:
    acting.worker.start()
    threads: set[int] = set()
    acting.call(lambda: threads.add(threading.get_ident()))
    acting.require_work()

    def errors() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.levelname == "ERROR"]

    def has_said(times: int) -> bool:
        return len(errors()) == times

    for number in range(1, 3):
        acting.call(fail)
        eventually(partial(has_said, number))
        acting.require_work()
    acting.call(lambda: threads.add(threading.get_ident()))
    acting.require_work()
    assert len(threads) == 1
    assert acting.workers.not_ready_reason() is None
    for record in errors():
        assert "the thread test" in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[0] is Unforeseen


def test_a_failing_loop_does_not_spin() -> None:
    class Failing(Calling):
        rounds = 0

        def run_once(self) -> None:
            self.rounds += 1
            fail()

    worker = Failing("test")
    worker.start()
    began = time.monotonic()
    eventually(lambda: worker.rounds == 3)
    assert time.monotonic() - began > 0.4
    worker.stop(PATIENCE)


def test_a_timer_calls_each_at_its_time_and_in_order() -> None:
    worker, called, is_done = TimerWorker("test"), [], threading.Event()
    worker.call_later(0.2, is_done.set)
    worker.call_later(NEVER, fail)
    for number in range(3):
        worker.call_later(0.1, partial(called.append, number))
    worker.call_later(0.0, partial(called.append, "first"))
    assert is_done.wait(PATIENCE)
    assert called == ["first", 0, 1, 2]
    worker.stop(PATIENCE)
    assert not worker.is_running


# --- ending unasked ------------------------------------------------------------------------------


@threads_end
def test_a_thread_that_has_ended_is_missed_and_can_be_started_again(
    acting: Acting, caplog: pytest.LogCaptureFixture
) -> None:
    assert acting.workers.not_ready_reason() is None
    acting.worker.start()
    acting.require_work()
    for _ in range(2):
        end_worker(acting.worker)
        assert acting.workers.not_ready_reason() == "the thread test has ended"
        assert acting.worker.not_ready_reason() == "the thread test has ended"
        assert not acting.worker.is_running
        acting.worker.start()
        acting.require_work()
        assert acting.workers.not_ready_reason() is None
    said = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert said == ["the thread test has ended"] * 2


@threads_end
def test_a_thread_that_cannot_be_started_again_stays_missed(
    acting: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting.worker.start()
    end_worker(acting.worker)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: fail())
        with pytest.raises(Unforeseen):
            acting.worker.start()
    assert acting.workers.not_ready_reason() == "the thread test has ended"


@threads_end
def test_each_thread_that_is_missed_is_named() -> None:
    workers = Workers()
    several = [Calling(name, workers) for name in ("first", "second", "third")]
    for worker in several:
        worker.start()
    assert repr(workers) == "<Workers ['first', 'second', 'third']>"
    end_worker(several[0])
    end_worker(several[2])
    assert workers.not_ready_reason() == "the thread first has ended; the thread third has ended"
    several[0].stop()
    assert workers.not_ready_reason() == "the thread third has ended"
    for worker in several:
        worker.stop(PATIENCE)
    assert workers.not_ready_reason() is None
    assert repr(workers) == "<Workers []>"


@threads_end
def test_files_of_a_selector_outlive_its_thread() -> None:
    ours, theirs = socket.socketpair()
    received: list[bytes] = []
    worker = SelectorWorker("test")
    worker.start()
    worker.call(lambda: worker.register(ours, lambda: received.append(ours.recv(10))))
    theirs.send(b"one")
    eventually(lambda: received == [b"one"])
    end_worker(worker)
    theirs.send(b"two")
    worker.start()
    eventually(lambda: received == [b"one", b"two"])
    worker.stop(PATIENCE)
    ours.close()
    theirs.close()


# --- ending when told to -------------------------------------------------------------------------


def test_a_worker_that_was_told_to_stop_is_not_missed(acting: Acting) -> None:
    acting.worker.start()
    acting.require_work()
    began = time.monotonic()
    acting.worker.stop(PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2, "it was not woken"
    assert not acting.worker.is_running
    assert acting.workers.not_ready_reason() is None
    acting.worker.stop(PATIENCE)  # harmless
    acting.worker.start()
    assert not acting.worker.is_running, "a stop is final"


def test_a_stop_waits_no_longer_than_it_may() -> None:
    workers = Workers()
    worker = Stubborn(workers)
    worker.start()
    assert worker.is_inside.wait(PATIENCE)
    for timeout in (0.0, 0.1):
        began = time.monotonic()
        worker.stop(timeout)
        assert timeout <= time.monotonic() - began < PATIENCE / 2
        assert worker.is_running
        assert workers.not_ready_reason() is None
    worker.release.set()
    eventually(lambda: not worker.is_running)


def test_a_worker_may_stop_itself(acting: Acting) -> None:
    acting.worker.start()
    acting.call(lambda: acting.worker.stop(NEVER))
    eventually(lambda: not acting.worker.is_running)


def test_a_worker_that_was_never_started_can_be_stopped(acting: Acting) -> None:
    acting.worker.stop(PATIENCE)
    acting.worker.start()
    assert not acting.worker.is_running


def test_stopping_while_starting_leaves_no_thread_behind() -> None:
    """Whichever comes first: a thread that nobody has woken would wait for ever."""
    workers = Workers()
    made = [Calling(f"race-{number}", workers) for number in range(150)]
    for worker in made:
        run_together([worker.start, worker.stop])
    eventually(lambda: not any(worker.is_running for worker in made))
    assert workers.not_ready_reason() is None
    assert repr(workers) == "<Workers []>"


def test_the_last_thing_is_done_once_when_a_worker_is_told_to_stop() -> None:
    class Finishing(Calling):
        finished = 0

        def finish(self) -> None:
            self.finished += 1

    for is_started in (True, False):
        worker = Finishing("test")
        if is_started:
            worker.start()
        for _ in range(2):
            worker.stop(PATIENCE)
        assert worker.finished == is_started


_STUCK = """
import threading
from mcp_proxy.background import KeyedExecutor, Periodic, Reader, SelectorWorker

stuck, inside = threading.Event().wait, threading.Semaphore(0)

def act():
    inside.release()
    stuck()

periodic = Periodic("periodic", 1000, act)
periodic.start()
periodic.wake()
selecting = SelectorWorker("selecting")
selecting.start()
selecting.call(act)
Reader("reader", act, act).start()
KeyedExecutor("executor", 1).submit("key", act)
for _ in range(4):
    assert inside.acquire(timeout=30)
assert all(t.daemon for t in threading.enumerate() if t is not threading.main_thread())
print("leaving", flush=True)
"""


def test_no_thread_keeps_the_interpreter_from_leaving() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STUCK], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


# --- each kind -----------------------------------------------------------------------------------


def test_a_periodic_worker_acts_in_time_and_at_once_when_it_is_woken() -> None:
    acted: list[float] = []
    quick = Periodic("quick", 0.01, lambda: acted.append(time.monotonic()))
    quick.start()
    eventually(lambda: len(acted) >= 3)
    quick.stop(PATIENCE)
    assert acted[2] - acted[0] >= 0.02
    count = len(acted)

    def has_acted(times: int) -> bool:
        return len(acted) == times

    slow = Periodic("slow", NEVER, lambda: acted.append(0))
    slow.start()
    for number in range(1, 4):
        slow.wake()
        eventually(partial(has_acted, count + number))
    slow.stop(PATIENCE)
    assert len(acted) == count + 3, "a stop is no reason to act"


@given(st.lists(st.integers(0, 9) | st.none(), max_size=30))
def test_a_queue_gives_each_item_once_and_in_order(items: list[int | None]) -> None:
    worker: QueueWorker[int] = _Taking("test")
    for item in items:
        worker.wake() if item is None else worker.put(item)
    expected = list(dict.fromkeys(item for item in items if item is not None))
    assert list(worker.take(0)) == expected
    assert list(worker.take(0)) == []


class _Taking(QueueWorker[int]):
    def run_once(self) -> None:
        """Is not called here."""


def test_an_empty_queue_is_waited_for_no_longer_than_that() -> None:
    began = time.monotonic()
    assert _Taking("test").take(0.05) == {}
    assert 0.04 < time.monotonic() - began < PATIENCE


def test_items_that_come_before_the_start_are_kept() -> None:
    done = threading.Event()
    worker = Calling("test")
    worker.put(done.set)
    worker.start()
    assert done.wait(PATIENCE)
    worker.stop(PATIENCE)


@pytest.fixture
def selecting() -> Iterator[SelectorWorker]:
    """A selector whose thread runs."""
    worker = SelectorWorker("test")
    worker.start()
    yield worker
    worker.stop(PATIENCE)


def test_what_is_called_is_done_in_order_whoever_asks(selecting: SelectorWorker) -> None:
    done: dict[int, list[int]] = {caller: [] for caller in range(4)}

    def calling(caller: int) -> Callable[[], None]:
        def call() -> None:
            for number in range(200):
                selecting.call(partial(done[caller].append, number))

        return call

    run_together([calling(caller) for caller in done])
    eventually(lambda: all(numbers == list(range(200)) for numbers in done.values()))


def test_a_file_is_looked_at_until_it_is_forgotten(selecting: SelectorWorker) -> None:
    ours, theirs = socket.socketpair()
    received: list[bytes] = []
    selecting.call(lambda: selecting.unregister(ours))  # harmless: it is not known
    selecting.call(lambda: selecting.register(ours, lambda: received.append(ours.recv(1))))
    theirs.send(b"ab")
    eventually(lambda: received == [b"a", b"b"])
    forgotten = threading.Event()
    selecting.call(lambda: selecting.unregister(ours))
    selecting.call(forgotten.set)
    assert forgotten.wait(PATIENCE)
    theirs.send(b"c")
    seen = threading.Event()
    selecting.call(seen.set)
    assert seen.wait(PATIENCE)
    assert received == [b"a", b"b"]
    ours.close()
    theirs.close()


def test_a_task_that_fails_keeps_no_other_from_its_turn(
    selecting: SelectorWorker, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    done = threading.Event()

    def look() -> None:
        ours.recv(1)
        fail()

    selecting.call(lambda: selecting.register(ours, look))
    theirs.send(b"ab")
    eventually(lambda: caplog.text.count("failed at one of its tasks") == 2)
    selecting.call(fail)
    selecting.call(done.set)
    assert done.wait(PATIENCE)
    ours.close()
    theirs.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_selector_that_has_ended_leaves_no_file_open_and_takes_calls_in_silence() -> None:
    before = open_files()
    worker = SelectorWorker("test")
    worker.start()
    assert open_files() == before + 3
    worker.stop(PATIENCE)
    assert open_files() == before
    worker.call(fail)


@threads_end
def test_a_selector_without_a_thread_leaves_no_file_open_when_it_is_told_to_stop() -> None:
    before = open_files()
    worker = SelectorWorker("test")
    worker.start()
    end_worker(worker)
    assert open_files() == before + 3
    for _ in range(2):
        worker.stop(PATIENCE)
        assert open_files() == before


def test_a_selector_that_could_not_be_started_leaves_no_file_open_when_it_is_told_to_stop(
    no_threads: pytest.MonkeyPatch,
) -> None:
    before = open_files()
    worker = SelectorWorker("test")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't start"):
            worker.start()
    assert open_files() == before + 3
    worker.stop(PATIENCE)
    assert open_files() == before


# --- readers -------------------------------------------------------------------------------------


def require_end(name: str) -> None:
    """Waits for the end of every thread of that name."""
    eventually(lambda: name not in [thread.name for thread in threading.enumerate()])


def test_a_reader_that_reaches_its_end_has_not_failed() -> None:
    read: list[str] = []
    failed = threading.Event()

    def reading() -> None:
        thread = threading.current_thread()
        assert thread.daemon
        read.append(thread.name)

    reader = Reader("reader", reading, failed.set)
    reader.start()
    require_end("reader")
    assert read == ["reader"]
    assert not failed.is_set()


def test_a_reader_that_fails_says_so_and_is_not_survived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = threading.Event()
    reader = Reader("reader", fail, failed.set)
    reader.start()
    assert failed.wait(PATIENCE)
    require_end("reader")
    assert "the thread reader failed" in caplog.text
    assert "this work is broken" in caplog.text


@threads_end
def test_a_reader_whose_thread_is_ended_has_failed() -> None:
    failed = threading.Event()
    reader = Reader("reader", end_thread, failed.set)
    reader.start()
    assert failed.wait(PATIENCE)
    require_end("reader")  # or its end is the next test's


def test_a_reader_that_finds_no_thread_can_be_started_later(
    no_threads: pytest.MonkeyPatch,
) -> None:
    read, failed = threading.Event(), threading.Event()
    reader = Reader("reader", read.set, failed.set)
    with pytest.raises(RuntimeError, match="can't start"):
        reader.start()
    assert not read.is_set()
    assert not failed.is_set(), "whoever starts it is told already"
    no_threads.undo()
    reader.start()
    assert read.wait(PATIENCE)


# --- the keyed executor --------------------------------------------------------------------------


@pytest.fixture
def executor() -> Iterator[KeyedExecutor]:
    """Four keys have their turn at a time."""
    made = KeyedExecutor("test", 4)
    yield made
    made.close()
    eventually(lambda: "threads=0" in repr(made))


def test_what_is_submitted_for_one_key_is_done_in_order_by_one_thread_at_a_time(
    executor: KeyedExecutor,
) -> None:
    done: list[int] = []
    inside = threading.Lock()

    def act(number: int) -> None:
        assert inside.acquire(blocking=False), "two threads are at one key"
        done.append(number)
        inside.release()

    for number in range(500):
        executor.submit("a", partial(act, number))
    eventually(lambda: len(done) == 500)
    assert done == list(range(500))


def test_a_blocked_key_blocks_no_other(executor: KeyedExecutor) -> None:
    free, done = threading.Event(), threading.Event()
    order: list[str] = []
    executor.submit("blocked", lambda: order.append("first" if free.wait(PATIENCE) else "never"))
    executor.submit("blocked", lambda: order.append("second"))
    executor.submit("other", done.set)
    assert done.wait(PATIENCE)
    assert order == []
    free.set()
    eventually(lambda: order == ["first", "second"])


def test_keys_are_served_at_the_same_time_as_far_as_they_may(executor: KeyedExecutor) -> None:
    together = threading.Barrier(4)
    passed: list[int] = []
    for number in range(4):
        executor.submit(str(number), lambda: passed.append(together.wait(PATIENCE)))
    eventually(lambda: len(passed) == 4)


def test_a_key_that_waits_for_a_thread_gets_its_turn(executor: KeyedExecutor) -> None:
    free, done = threading.Event(), threading.Event()
    for number in range(4):
        executor.submit(str(number), partial(free.wait, PATIENCE))
    executor.submit("fifth", done.set)
    assert not done.is_set()
    assert "threads=4" in repr(executor)
    free.set()
    assert done.wait(PATIENCE)


def test_threads_are_started_when_they_are_needed_and_are_daemons() -> None:
    executor = KeyedExecutor("test", 4)
    threads: list[threading.Thread] = []
    assert "threads=0" in repr(executor)

    def has_done(count: int) -> bool:
        return len(threads) == count and "busy=0" in repr(executor)

    for number in range(20):
        executor.submit("a", lambda: threads.append(threading.current_thread()))
        eventually(partial(has_done, number + 1))
    assert len(set(threads)) == 1
    assert threads[0].daemon
    assert threads[0].name == "test-0"
    executor.close()
    threads[0].join(PATIENCE)
    assert not threads[0].is_alive()


def test_what_fails_does_not_stop_its_key(
    executor: KeyedExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()
    executor.submit("a", fail)
    executor.submit("a", done.set)
    assert done.wait(PATIENCE)
    assert "the thread test failed at one of its tasks" in caplog.text
    assert "this work is broken" in caplog.text


def test_an_act_may_submit_for_its_own_key(executor: KeyedExecutor) -> None:
    done: list[int] = []

    def act(number: int) -> None:
        done.append(number)
        if number < 5:
            executor.submit("a", lambda: act(number + 1))

    executor.submit("a", lambda: act(0))
    eventually(lambda: done == [0, 1, 2, 3, 4, 5])


def test_nothing_is_forgotten_when_many_threads_submit(executor: KeyedExecutor) -> None:
    done: dict[str, list[int]] = {str(key): [] for key in range(8)}

    def submitting(key: str) -> Callable[[], None]:
        def submit() -> None:
            for number in range(300):
                executor.submit(key, partial(done[key].append, number))

        return submit

    run_together([submitting(key) for key in done])
    eventually(lambda: all(numbers == list(range(300)) for numbers in done.values()))


def test_keys_that_are_done_are_not_kept(executor: KeyedExecutor) -> None:
    for number in range(100):
        executor.submit(str(number), lambda: None)
    eventually(lambda: "keys=0" in repr(executor))


def test_submitting_to_a_closed_executor_is_harmless_and_does_nothing() -> None:
    executor, done = KeyedExecutor("test", 2), threading.Event()
    executor.close()
    executor.close()
    executor.submit("a", done.set)
    executor.submit("a", done.set)
    assert "threads=0" in repr(executor)
    assert not done.is_set()


def test_what_waits_when_an_executor_is_closed_is_not_begun() -> None:
    executor = KeyedExecutor("test", 1)
    free, begun, under_way = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        under_way.set()
        free.wait(PATIENCE)

    executor.submit("a", hold)
    assert under_way.wait(PATIENCE)
    executor.submit("a", begun.set)
    executor.submit("b", begun.set)
    executor.close()
    free.set()
    eventually(lambda: "threads=0" in repr(executor))
    assert not begun.is_set()


# --- threads of an executor that end, or that there are none of ----------------------------------


class _Holding:
    """An act that lasts until it is released, or has to end its thread."""

    def __init__(self) -> None:
        self.began, self.free = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._ends_its_thread = False

    def __call__(self) -> None:
        self._thread = threading.current_thread()
        self.began.set()
        self.free.wait(PATIENCE)
        if self._ends_its_thread:
            end_thread()

    def end(self) -> None:
        assert self.began.wait(PATIENCE)
        assert self._thread is not None
        self._ends_its_thread = True
        self.free.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@threads_end
@pytest.mark.parametrize("width", [1, 4])
def test_a_key_whose_thread_was_ended_goes_on_with_another(
    width: int, caplog: pytest.LogCaptureFixture
) -> None:
    executor, holding = KeyedExecutor("test", width), _Holding()
    done: list[str] = []
    executor.submit("a", holding)
    executor.submit("a", lambda: done.append("second"))
    executor.submit("a", lambda: done.append("third"))
    holding.end()
    eventually(lambda: done == ["second", "third"])
    assert "a thread of test has ended" in caplog.text
    executor.submit("b", lambda: done.append("other"))
    eventually(lambda: "other" in done)
    executor.close()
    eventually(lambda: "threads=0" in repr(executor))


@threads_end
def test_keys_that_wait_for_a_thread_that_was_ended_get_another() -> None:
    executor, holding, done = KeyedExecutor("test", 1), _Holding(), threading.Event()
    executor.submit("a", holding)
    executor.submit("b", done.set)
    holding.end()
    assert done.wait(PATIENCE)
    executor.close()


@threads_end
def test_an_idle_thread_that_was_ended_is_not_counted_on() -> None:
    executor, holding, done = KeyedExecutor("test", 2), _Holding(), threading.Event()
    executor.submit("a", holding)
    assert holding.began.wait(PATIENCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_next_key", end_thread)  # when it has nothing to do
        holding.free.set()
        eventually(lambda: "threads=0" in repr(executor))
    assert "busy=0" in repr(executor)
    executor.submit("a", done.set)
    assert done.wait(PATIENCE)
    executor.close()


@threads_end
def test_a_key_whose_thread_was_ended_goes_on_when_there_are_threads_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor, holding = KeyedExecutor("test", 4), _Holding()
    done: list[str] = []
    executor.submit("a", holding)
    executor.submit("a", lambda: done.append("second"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        holding.end()
        with pytest.raises(RuntimeError, match="can't start"):
            executor.submit("a", lambda: done.append("never"))
    executor.submit("a", lambda: done.append("third"))
    eventually(lambda: done == ["second", "third"])
    executor.close()


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_submission_that_finds_no_thread_is_none(no_threads: pytest.MonkeyPatch) -> None:
    executor, never, done = KeyedExecutor("test", 4), threading.Event(), threading.Event()
    for key in ("a", "a", "b"):
        with pytest.raises(RuntimeError, match="can't start"):
            executor.submit(key, never.set)
    assert repr(executor) == "<KeyedExecutor test keys=0 busy=0 threads=0>"
    no_threads.undo()
    executor.submit("a", done.set)
    assert done.wait(PATIENCE)
    assert not never.is_set()
    executor.close()


def test_where_there_are_no_more_threads_the_others_do_the_work(
    executor: KeyedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding, done = _Holding(), threading.Event()
    executor.submit("a", holding)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        executor.submit("b", done.set)
    assert not done.is_set()
    holding.free.set()
    assert done.wait(PATIENCE)


KEYS = ("a", "b", "c")

SCRIPTS = st.lists(
    st.tuples(st.sampled_from(KEYS), st.sampled_from(["do", "do", "fail", "leave"])), max_size=25
)


@threads_end
@given(width=st.integers(1, 3), script=SCRIPTS)
def test_whatever_acts_do_each_is_called_once_and_in_order(
    width: int, script: list[tuple[str, str]]
) -> None:
    executor = KeyedExecutor("test", width)
    done: dict[str, list[int]] = {key: [] for key in KEYS}
    inside = {key: threading.Lock() for key in KEYS}

    def act(key: str, number: int, what: str) -> None:
        with inside[key]:
            done[key].append(number)
        if what == "fail":
            fail()
        if what == "leave":
            sys.exit()

    for number, (key, what) in enumerate(script):
        executor.submit(key, partial(act, key, number, what))
    expected = {
        key: [number for number, (other, _) in enumerate(script) if other == key] for key in KEYS
    }
    eventually(lambda: done == expected)
    eventually(lambda: "keys=0" in repr(executor))
    assert int(repr(executor).partition("threads=")[2].rstrip(">")) <= width
    executor.close()
    eventually(lambda: "threads=0" in repr(executor))
