"""The keeper of a replica's children: starts them, notices that they end, and ends them in order.

One thread serves all children: it drains their stderr, notices exits (pidfd where the system has
it, otherwise by looking ten times a second) and walks each stopping child through the steps of the
stdio transport's shutdown: input closed, then TERM, then KILL, each to the whole process group.

Nothing runs before the first child is started, and a forked process starts anew: threads and the
guardian do not survive a fork.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from mcp_proxy.errors import BackendLost
from mcp_proxy.processes.child import Child
from mcp_proxy.processes.guardian import Guardian
from mcp_proxy.servers import StdioServer

log = logging.getLogger(__name__)

#: Seconds between the steps of a stop: input closed, TERM, KILL.
GRACE = 2.0

# Seconds that output may go on after the process has ended, held open by a descendant that escaped.
_LINGER = 1.0
_POLL = 0.1

_STEPS = (signal.SIGTERM, signal.SIGKILL)


class _Watched:
    """A child with where it stands on its way out; touched by the supervisor's thread only."""

    def __init__(self, child: Child, on_exit: Callable[[str], None]) -> None:
        self.child = child
        self.on_exit = on_exit
        self.pidfd: int | None = None
        self.steps: list[signal.Signals] | None = (
            None  # what is still to be tried, None: not stopping
        )
        self.next_step = 0.0
        self.ended: str | None = None  # how the process ended, once it is reaped


class Supervisor:
    """Starts and ends children; `mark` names this replica in their environment.

    `affinity` is the set of CPUs that children may use, None for what this process uses.
    """

    def __init__(self, mark: str, affinity: frozenset[int] | None = None) -> None:
        self._mark = mark
        self._affinity = affinity
        self._guardian = Guardian(mark)
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._watched: dict[Child, _Watched] = {}
        self._leaving: set[_Watched] = set()
        self._idle = threading.Condition()  # guards and announces _alive
        self._alive = 0
        self._closing = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mcp-supervisor", daemon=True)

    def __repr__(self) -> str:
        return f"<Supervisor children={self._alive}>"

    def start(self) -> None:
        """Starts the guardian and the thread; once, in the process that will have the children."""
        self._guardian.start()
        self._thread.start()

    @property
    def children(self) -> int:
        """How many children have not ended."""
        return self._alive

    def spawn(
        self,
        server: StdioServer,
        max_message: int,
        on_line: Callable[[bytes], None],
        on_exit: Callable[[str], None],
    ) -> Child:
        """A new child whose lines go to `on_line`; raises BackendLost if it cannot be started."""
        if self._closing:
            raise BackendLost("This replica is shutting down")
        child = Child(server, self._mark, max_message, self._affinity)
        self._guardian.watch(child.pid)
        with self._idle:
            self._alive += 1
        watched = _Watched(child, on_exit)
        self._order(lambda: self._add(watched))
        reader = threading.Thread(
            target=self._read, args=(watched, on_line), name=f"mcp-child-{child.pid}", daemon=True
        )
        reader.start()
        log.debug("[%s] started as process %d", server.name, child.pid)
        return child

    def retire(self, child: Child) -> None:
        """Begins to stop a child and returns at once; harmless when it is stopping or gone."""
        self._order(lambda: self._begin_stop(child))

    def close(self, timeout: float = 2 * GRACE + _LINGER) -> None:
        """Stops every child and waits, at most `timeout` seconds; the guardian has the rest."""
        self._closing = True
        self._order(self._begin_stop_all)
        with self._idle:
            self._idle.wait_for(lambda: self._alive == 0, timeout)
        self._order(self._stop_running)
        self._thread.join(_LINGER)
        self._guardian.close()

    def _read(self, watched: _Watched, on_line: Callable[[bytes], None]) -> None:
        watched.child.read_lines(on_line)
        self._order(lambda: self._note_eof(watched))

    def _order(self, act: Callable[[], None]) -> None:
        """Has `act` done by the supervisor's thread."""
        self._orders.put(act)
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nobody cares
            self._wake_write.send(b"\0")

    # --- the supervisor's thread -----------------------------------------------------------------

    def _run(self) -> None:
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._take_orders)
        while not self._stopping:
            for key, _ in self._selector.select(self._patience()):
                self._guarded(key.data)
            for watched in list(self._leaving):
                self._guarded(partial(self._advance, watched))
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def _guarded(self, act: Callable[[], None]) -> None:
        """Whatever goes wrong with one child, the others keep their supervisor."""
        try:
            act()
        except Exception:
            log.exception("supervising a child failed")

    def _patience(self) -> float | None:
        """Seconds until something must be looked at without an event."""
        if not hasattr(os, "pidfd_open") and self._watched:
            self._leaving.update(w for w in self._watched.values() if w.child.has_exited())
            return _POLL
        return _POLL if self._leaving else None

    def _take_orders(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        while True:
            try:
                act = self._orders.get_nowait()
            except queue.Empty:
                return
            self._guarded(act)

    def _add(self, watched: _Watched) -> None:
        child = watched.child
        self._watched[child] = watched
        self._selector.register(
            child.stderr, selectors.EVENT_READ, lambda: self._drain_stderr(child)
        )
        if hasattr(os, "pidfd_open"):
            watched.pidfd = os.pidfd_open(child.pid)
            self._selector.register(
                watched.pidfd, selectors.EVENT_READ, lambda: self._leaving.add(watched)
            )

    def _drain_stderr(self, child: Child) -> None:
        if child.drain_stderr() == 0:
            self._selector.unregister(child.stderr)

    def _note_eof(self, watched: _Watched) -> None:
        if watched.child in self._watched:  # else its exit was seen first, and that was its end
            self._leaving.add(watched)

    def _begin_stop(self, child: Child) -> None:
        watched = self._watched.get(child)
        if watched is not None and watched.steps is None:
            watched.steps = list(_STEPS)
            watched.next_step = time.monotonic() + GRACE
            self._leaving.add(watched)
            child.close_stdin()

    def _begin_stop_all(self) -> None:
        for child in list(self._watched):
            self._begin_stop(child)

    def _stop_running(self) -> None:
        self._stopping = True

    def _advance(self, watched: _Watched) -> None:
        """One look at a child that is on its way out."""
        child, now = watched.child, time.monotonic()
        if watched.ended is None:
            if child.has_exited():
                self._reap(watched, now)
            elif watched.steps is None:
                self._begin_stop(child)  # it closed its output: there is nothing left to wait for
            elif watched.steps and now >= watched.next_step:
                child.signal_group(watched.steps.pop(0))
                watched.next_step = now + GRACE
        if watched.ended is not None and (child.at_eof.is_set() or now >= watched.next_step):
            self._dismiss(watched)

    def _reap(self, watched: _Watched, now: float) -> None:
        child = watched.child
        while child.drain_stderr():
            pass
        if child.stderr in self._selector.get_map():
            self._selector.unregister(child.stderr)
        if watched.pidfd is not None:
            self._selector.unregister(watched.pidfd)
            os.close(watched.pidfd)
        watched.ended = child.reap()
        watched.next_step = now + _LINGER
        self._guardian.forget(child.pid)

    def _dismiss(self, watched: _Watched) -> None:
        """The process is gone and its output read: the last word."""
        self._leaving.discard(watched)
        del self._watched[watched.child]
        assert watched.ended is not None
        log.debug("[%s] process %d ended: %s", watched.child.name, watched.child.pid, watched.ended)
        try:
            watched.on_exit(watched.ended)
        finally:
            with self._idle:
                self._alive -= 1
                self._idle.notify_all()
