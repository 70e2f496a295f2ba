"""A process that forks while its workers run: `python -m tests.house.forking`.

The child and then the parent assert that theirs work; the exit code is 0 if all do.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable

from mcp_proxy.background import (
    KeyedExecutor,
    Periodic,
    QueueWorker,
    SelectorWorker,
    Worker,
    Workers,
)
from tests.support.waiting import eventually

_NEVER = 1000.0


class Taking(QueueWorker[int]):
    """Notes what it takes; holds on to 0 until it is released."""

    def __init__(self, workers: Workers) -> None:
        super().__init__("taking", workers)
        self.taken: list[int] = []
        self.release = threading.Event()

    def run_once(self) -> None:
        for item in self.take(None):
            self.taken.append(item)
            if item == 0:
                self.release.wait()


class Everything:
    """One worker of each kind."""

    def __init__(self) -> None:
        self.workers = Workers()
        self.acted = threading.Event()
        self.periodic = Periodic("periodic", _NEVER, self.acted.set, self.workers)
        self.taking = Taking(self.workers)
        self.selecting = SelectorWorker("selecting", self.workers)
        self.executor = KeyedExecutor("executor", 2)
        self.each: list[Worker] = [self.periodic, self.taking, self.selecting]

    def start(self) -> None:
        for worker in self.each:
            worker.start()

    def require_work(self, item: int) -> None:
        """Every worker does what it is for."""
        self.acted.clear()
        self.periodic.wake()
        assert self.acted.wait(10)
        self.taking.put(item)
        eventually(lambda: item in self.taking.taken)
        called = threading.Event()
        self.selecting.call(called.set)
        assert called.wait(10)
        executed = threading.Event()
        self.executor.submit(f"key {item}", executed.set)
        assert executed.wait(10)
        assert self.workers.not_ready_reason() is None


def begin(everything: Everything) -> None:
    """What was made before a fork, and not started, starts behind it."""
    everything.start()
    everything.require_work(1)


def begin_anew(everything: Everything) -> None:
    """Threads do not survive a fork: all begins anew, and nobody is missed before."""
    assert threading.active_count() == 1
    assert not any(worker.is_running for worker in everything.each)
    assert everything.workers.not_ready_reason() is None
    everything.start()
    everything.require_work(2)
    executed = threading.Event()
    everything.executor.submit("held", executed.set)
    assert executed.wait(10), "a key that the parent is at waits for nobody in the child"
    assert everything.taking.taken == [0, 2], "what waited in the parent was taken in the child"
    for worker in everything.each:
        worker.stop(10)
        assert not worker.is_running


def in_fork(act: Callable[[], object]) -> int:
    """The exit code of a forked process that does `act`."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    everything = Everything()
    if in_fork(lambda: begin(everything)):
        return 1
    everything.start()
    everything.taking.put(0)
    eventually(lambda: everything.taking.taken == [0])
    everything.taking.put(1)  # waits behind 0
    everything.executor.submit("held", everything.taking.release.wait)
    code = in_fork(lambda: begin_anew(everything))
    everything.taking.release.set()
    everything.require_work(3)
    assert everything.taking.taken == [0, 1, 3]
    return code


if __name__ == "__main__":
    sys.exit(main())
