"""The threads of this package: one base for all of them.

Each has a name and a loop that survives what it did not foresee and says so in the log. Each can be
stopped with a time limit, and is missed by /readyz when it has ended although it should run. All
are daemon threads: none keeps the interpreter from leaving. Nothing starts in a constructor, and
`start` begins anew in a forked process, since threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import queue
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before a loop that failed is entered again.
_PAUSE = 0.25


class Workers:
    """The threads that an application cannot do without, once they have been started.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _started
        self._started: dict[Worker, None] = {}

    def __repr__(self) -> str:
        return f"<Workers {[worker.name for worker in self._started]}>"

    def add(self, worker: Worker) -> None:
        """From now on the worker is missed when its thread has ended."""
        with self._lock:
            self._started[worker] = None

    def discard(self, worker: Worker) -> None:
        """The worker was told to stop."""
        with self._lock:
            self._started.pop(worker, None)

    @property
    def started(self) -> list[Worker]:
        """Those that were started, in that order, and not told to stop."""
        with self._lock:
            return list(self._started)

    def not_ready_reason(self) -> str | None:
        """Which threads have ended that should run, None if none has."""
        return self.ended(is_essential=True) or self.ended(is_essential=False)

    def ended(self, is_essential: bool) -> str | None:
        """Which of the threads have ended without which nothing works, or which of the others."""
        asked = [worker for worker in self.started if worker.is_essential == is_essential]
        return "; ".join(r for worker in asked if (r := worker.not_ready_reason())) or None


class Worker(ABC):
    """A thread that calls `run_once` until it is told to stop.

    `workers` is who misses it when it has ended. Every method may be called from any thread.
    """

    #: Whether nothing can be served when the thread has ended.
    is_essential = True

    def __init__(self, name: str, workers: Workers | None = None) -> None:
        self.name = name
        self.is_stopping = False
        self._workers = workers
        self._starting = threading.Lock()  # guards _thread and _pid, and that a stop is final
        self._thread: threading.Thread | None = None
        self._pid: int | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} running={self.is_running}>"

    @property
    def is_running(self) -> bool:
        """Whether the thread was started, in this process, and has not ended."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def was_started(self) -> bool:
        """Whether the thread was ever started in this process."""
        return self._pid == os.getpid() and self._thread is not None

    def start(self) -> None:
        """Starts the thread; harmless when repeated.

        One that has ended unasked is started again. Raises RuntimeError when the system has no
        thread to give; then nothing has started.
        """
        if self.is_running:
            return
        with self._starting:
            if self.is_running or self.is_stopping:
                return
            if self._pid != os.getpid():
                self.prepare()
                self._pid, self._thread = os.getpid(), None
            thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            thread.start()
            self._thread = thread
            if self._workers is not None:
                self._workers.add(self)

    def stop(self, timeout: float = 0.0) -> None:
        """Tells the loop to end, and waits for that at most `timeout` seconds."""
        with self._starting:
            is_first, self.is_stopping = not self.is_stopping, True
            if self._workers is not None:
                self._workers.discard(self)
        if self.is_running:
            self.wake()
            self.wait(timeout)
        elif is_first and self._pid == os.getpid():
            self.finish()  # the thread has ended unasked, or could not be started

    def wait(self, timeout: float) -> None:
        """Waits for the end of the thread, at most `timeout` seconds."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def not_ready_reason(self) -> str | None:
        """What is wrong when the thread has ended that should run; None otherwise."""
        if not self.was_started or self.is_stopping or self.is_running:
            return None
        return f"the thread {self.name} has ended"

    def prepare(self) -> None:  # noqa: B027  (most need nothing)
        """Makes what the loop needs in the process that runs it. Called before its first start."""

    @abstractmethod
    def wake(self) -> None:
        """Has `run_once` look up from its wait. Never waits itself."""

    @abstractmethod
    def run_once(self) -> None:
        """One round of the loop. Waits until there is something to do, or until it is woken."""

    def _run(self) -> None:
        try:
            while not self.is_stopping:
                try:
                    self.run_once()
                except Exception:
                    log.exception("the thread %s met an error and goes on", self.name)
                    time.sleep(_PAUSE)
            self.finish()
        finally:
            if not self.is_stopping:
                log.critical("the thread %s has ended", self.name)

    def finish(self) -> None:  # noqa: B027  (most have nothing to do)
        """What is done last, when the thread was told to stop."""


class Periodic(Worker):
    """Calls `act` every `interval` seconds, and at once when it is woken."""

    def __init__(
        self,
        name: str,
        interval: float,
        act: Callable[[], object],
        workers: Workers | None = None,
    ) -> None:
        super().__init__(name, workers)
        self.interval = interval
        self._act = act
        self._woken = threading.Event()

    def wake(self) -> None:
        self._woken.set()

    def run_once(self) -> None:
        if self._woken.wait(self.interval):
            self._woken.clear()
        if not self.is_stopping:
            self._act()


class TimerWorker(Worker):
    """Calls functions when their time has come, one after the other: each has to be quick."""

    is_essential = False

    def __init__(self, name: str, workers: Workers | None = None) -> None:
        super().__init__(name, workers)
        self._numbers = itertools.count()  # of two with the same time the first comes first
        self._has_news = threading.Condition()  # guards and announces what follows
        self._due: list[tuple[float, int, Callable[[], object]]] = []  # a heap
        self._is_woken = False

    def prepare(self) -> None:
        if self._pid is not None:  # after a fork: what waits is the other process's
            self._has_news, self._due = threading.Condition(), []

    def call_later(self, seconds: float, act: Callable[[], object]) -> None:
        """Has `act` called after so many seconds. Never waits.

        Raises RuntimeError where the system has no thread for it.
        """
        self.start()
        with self._has_news:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), act))
            self._has_news.notify()

    def wake(self) -> None:
        with self._has_news:
            self._is_woken = True
            self._has_news.notify()

    def run_once(self) -> None:
        with self._has_news:
            if not self._is_woken and (not self._due or self._due[0][0] > time.monotonic()):
                self._has_news.wait(self._due[0][0] - time.monotonic() if self._due else None)
            self._is_woken = False
            if not self._due or self._due[0][0] > time.monotonic():
                return
            _, _, act = heapq.heappop(self._due)
        act()


class QueueWorker(Worker, Generic[T]):
    """Works on what others put into its queue."""

    def __init__(self, name: str, workers: Workers | None = None) -> None:
        super().__init__(name, workers)
        self._queue: queue.SimpleQueue[T | None] = queue.SimpleQueue()

    def prepare(self) -> None:
        if self._pid is not None:  # after a fork: what waits is the other process's
            self._queue = queue.SimpleQueue()

    def put(self, item: T) -> None:
        """Adds an item. Never waits."""
        self._queue.put(item)

    def wake(self) -> None:
        self._queue.put(None)

    def take(self, timeout: float | None) -> dict[T, None]:
        """Everything that is in the queue, each item once and in order.

        Waits `timeout` seconds for the first, None for as long as it takes.
        """
        taken: dict[T, None] = {}
        try:
            item = self._queue.get(timeout=timeout)
            while True:
                if item is not None:
                    taken[item] = None
                item = self._queue.get_nowait()
        except queue.Empty:
            return taken


class SelectorWorker(Worker):
    """Waits for many files at once, and does what others ask it to do.

    `register` and `unregister` are for its own thread, `call` for everybody else.
    """

    _selector: selectors.BaseSelector
    _wake_read: socket.socket
    _wake_write: socket.socket

    def __init__(self, name: str, workers: Workers | None = None) -> None:
        super().__init__(name, workers)
        self._acts: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def prepare(self) -> None:
        self._acts = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._do_acts)

    def call(self, act: Callable[[], object]) -> None:
        """Has `act` called by the thread. Never waits."""
        self._acts.put(act)
        self.wake()

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it has ended
            self._wake_write.send(b"\0")

    def register(self, file: Any, act: Callable[[], object]) -> None:
        """Has `act` called whenever `file` is readable."""
        self._selector.register(file, selectors.EVENT_READ, act)

    def unregister(self, file: Any) -> None:
        """Forgets a file; harmless for one that is not registered."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(file)

    def timeout(self) -> float | None:
        """Seconds until something must be looked at without an event; None: never."""
        return None

    def run_once(self) -> None:
        for key, _ in self._selector.select(self.timeout()):
            self.guarded(key.data)

    def guarded(self, act: Callable[[], object]) -> None:
        """Calls `act`; one that fails does not keep the others from their turn."""
        try:
            act()
        except Exception:
            log.exception("the thread %s failed at one of its tasks", self.name)

    def finish(self) -> None:
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def _do_acts(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        while True:
            try:
                act = self._acts.get_nowait()
            except queue.Empty:
                return
            self.guarded(act)


class Reader:
    """A thread that reads one source to its end, by `read`.

    A reader that fails cannot go on where it was, so its failure is not survived: it is logged, and
    `on_failure` is called, which ends whatever was read.
    """

    def __init__(
        self, name: str, read: Callable[[], object], on_failure: Callable[[], object]
    ) -> None:
        self._read = read
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread; raises RuntimeError when the system has none to give."""
        self._thread.start()

    def _run(self) -> None:
        is_done = False
        try:
            self._read()
            is_done = True
        except Exception:
            log.exception("the thread %s failed", self._thread.name)
        finally:
            if not is_done:
                self._on_failure()


class KeyedExecutor:
    """Calls functions in order for one key, at the same time for different ones.

    Has at most `width` threads, which start when they are needed. In a forked process it begins
    anew: what was submitted before is the other process's. Thread-safe.
    """

    def __init__(self, name: str, width: int) -> None:
        self._name = name
        self._width = width
        self._beginning = threading.Lock()  # guards that one thread begins anew after a fork
        self._pid = os.getpid()
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._acts: dict[str, deque[Callable[[], object]]] = {}
        # Keys that no thread is at, and None to have a thread look up. A condition in its place
        # takes twice as long where several keys come together.
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._waiting = 0  # keys that no thread is at
        self._threads = 0
        self._busy = 0  # how many of them are at a key
        self._is_closed = False

    def _begin_after_fork(self) -> None:
        """Threads do not survive a fork, and whoever had the lock has it for ever."""
        with self._beginning:
            if self._pid != os.getpid():
                was_closed = self._is_closed
                self._begin()
                self._is_closed = was_closed
                self._pid = os.getpid()

    def __repr__(self) -> str:
        threads = f"busy={self._busy} threads={self._threads}"
        return f"<KeyedExecutor {self._name} keys={len(self._acts)} {threads}>"

    def submit(self, key: str, act: Callable[[], object]) -> None:
        """Has `act` called after everything that was submitted for the key before. Never waits.

        After `close` nothing is called any more. Raises RuntimeError when the system has not even
        one thread to give; then nothing was submitted.
        """
        if self._pid != os.getpid():
            self._begin_after_fork()
        with self._lock:
            if self._is_closed:
                return
            is_new = key not in self._acts
            self._have_idle_threads(self._waiting + is_new)
            self._acts.setdefault(key, deque()).append(act)
            self._waiting += is_new
        if is_new:  # without the lock, which the thread that this wakes takes first
            self._ready.put(key)

    def close(self) -> None:
        """Takes no more; what is waiting is not begun."""
        if self._pid != os.getpid():
            self._begin_after_fork()
        with self._lock:
            self._is_closed = True
            self._acts.clear()
            self._waiting = 0
            for _ in range(self._threads):
                self._ready.put(None)

    def _have_idle_threads(self, wanted: int) -> None:
        """Starts one more thread unless `wanted` are idle, or there are as many as may be.

        Where the system has none the others do the work; the lock is held.
        """
        if self._threads - self._busy >= wanted or self._threads >= self._width:
            return
        name = f"{self._name}-{self._threads}"
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError:
            if not self._threads:
                raise
        else:
            self._threads += 1

    def _run(self) -> None:
        try:
            while (key := self._next_key()) is not None:
                self._run_key(key)
        finally:
            self._note_end()

    def _note_end(self) -> None:
        """A thread has ended; unless all were told to, others do what it leaves."""
        with self._lock:
            self._threads -= 1
            if not self._is_closed:
                log.critical("a thread of %s has ended", self._name)
            if self._waiting:
                with contextlib.suppress(RuntimeError):  # then the next submit tries again
                    self._have_idle_threads(self._waiting)

    def _next_key(self) -> str | None:
        """A key with something to do; None when the executor is closed."""
        key = self._ready.get()
        with self._lock:
            if self._is_closed or key is None:
                return None
            self._waiting -= 1
            self._busy += 1
            return key

    def _run_key(self, key: str) -> None:
        while (act := self._next_act(key)) is not None:
            try:
                act()
            except Exception:
                log.exception("the thread %s failed at one of its tasks", self._name)
            except BaseException:
                self._give_back(key)
                raise

    def _give_back(self, key: str) -> None:
        """This thread ends: another one goes on with the key."""
        with self._lock:
            self._busy -= 1
            if key in self._acts:
                self._waiting += 1
                self._ready.put(key)

    def _next_act(self, key: str) -> Callable[[], object] | None:
        """The next thing to do for a key; a key with nothing left is forgotten."""
        with self._lock:
            acts = self._acts.get(key)
            if acts:
                return acts.popleft()
            self._acts.pop(key, None)
            self._busy -= 1
            return None
