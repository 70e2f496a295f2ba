"""The supervisor of this process's children: starts them, notices exits, stops them in order.

One thread serves all children: it drains their stderr, notices exits (by pidfd where the system has
it, else by polling ten times a second) and takes each stopping child through the steps of MCP's
stdio shutdown (2025-11-25, lifecycle, "Shutdown"): input closed, then TERM, then KILL, both signals
to the whole process group.

Nothing runs before the first child is started, and a forked process starts anew: threads and the
guardian do not survive a fork.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial

from mcp_proxy import metrics
from mcp_proxy.background import Reader, SelectorWorker, Workers
from mcp_proxy.errors import BackendNotStarted, Draining, Overloaded
from mcp_proxy.processes.child import Child
from mcp_proxy.processes.guardian import Guardian
from mcp_proxy.replica import Replica
from mcp_proxy.servers import StdioServer, python

log = logging.getLogger(__name__)

#: Seconds between the steps of a stop: input closed, TERM, KILL.
GRACE = 2.0

# Seconds to wait for the end of output after an exit: an escaped descendant may hold it open.
_LINGER = 1.0
_POLL = 0.1

# Seconds after the end of a child's output in which it exits, if that is why the output has ended.
_EXITING = 0.3

# Seconds for which the stderr of a flooding child is left alone, and how often it is read at last.
_PAUSE = 0.02
_LAST_READS = 64

_STEPS = (signal.SIGTERM, signal.SIGKILL)


class _Supervised:
    """A child and the state of its stop; used by the supervisor's thread only."""

    def __init__(
        self, child: Child, on_exit: Callable[[str], None], on_mute: Callable[[], None] | None
    ) -> None:
        self.child = child
        self.on_exit = on_exit
        self.on_mute = on_mute
        self.mute_at: float | None = None  # when on_mute is called
        self.pidfd: int | None = None
        self.steps: list[signal.Signals] | None = None  # still to be tried; None: not stopping
        self.next_step = 0.0
        self.exited: str | None = None  # how the process exited, once it is reaped


class Supervisor(SelectorWorker):
    """Starts and stops the children of `replica`, whose id marks them in their environment.

    `cpu_affinity` is the set of CPUs that children may use, None for those of this process.
    Every public method may be called from any thread.
    """

    #: Made anew with each start.
    guardian: Guardian

    def __init__(self, replica: Replica, workers: Workers | None = None) -> None:
        super().__init__("mcp-supervisor", workers)
        self.cpu_affinity: frozenset[int] | None = None
        #: Whether descendants that left their child's process group outlive it.
        self.keep_detached = False
        self._replica = replica
        self._supervised: dict[Child, _Supervised] = {}
        self._ending: set[_Supervised] = set()
        self._polled: set[_Supervised] = set()  # those without a pidfd
        self._flooding: dict[Child, float] = {}  # whose stderr is left alone, and until when
        self._guardian_exit: int | None = None
        self._all_exited = threading.Condition()  # guards and announces _alive
        self._alive = 0
        self._is_closing = False

    def __repr__(self) -> str:
        return f"<Supervisor children={self._alive}>"

    @property
    def children(self) -> int:
        """How many children have not exited."""
        return self._alive

    def prepare(self) -> None:
        super().prepare()
        self._supervised, self._ending, self._polled = {}, set(), set()
        self._flooding = {}
        self._alive = 0
        self.guardian = Guardian(self._replica.id, python())
        try:
            self.guardian.start()
        except OSError:
            super().finish()  # the next start makes everything anew
            raise
        self._watch_guardian()

    def spawn(
        self,
        server: StdioServer,
        max_message: int,
        on_exit: Callable[[str], None],
        on_mute: Callable[[], None] | None = None,
    ) -> Child:
        """A new child, whose output is read once `read` was called.

        `on_exit` is called by the supervisor's thread with the exit status in words, `on_mute` when
        the child has closed its output and lives on; it is stopped then. Raises BackendLost if the
        child cannot be started, Overloaded if there is no thread for that.
        """
        if self._is_closing:
            raise Draining
        try:
            self.start()
        except OSError as error:
            raise BackendNotStarted(f"The server cannot be started: {error}") from error
        except RuntimeError as error:
            raise Overloaded(f"The server cannot be started: {error}") from error
        child = Child(server, self._replica.id, max_message, self.cpu_affinity)
        try:
            self.guardian.watch(child.pid)
        except OSError as error:
            child.discard()
            raise BackendNotStarted(f"The server cannot be started: {error}") from error
        with self._all_exited:
            self._alive += 1
        counters = metrics.current()
        if counters is not None:
            counters.count(metrics.CHILDREN_STARTED, server.name)
        self.call(lambda: self._add(_Supervised(child, on_exit, on_mute)))
        log.debug("[%s] started as process %d", server.name, child.pid)
        return child

    def read(self, child: Child, on_line: Callable[[bytes], None]) -> None:
        """Calls `on_line` with every line of a child's output, in a thread of its own.

        A child whose reader fails is stopped. Raises Overloaded when no thread can be started.
        """

        def read() -> None:
            child.read_lines(on_line)
            self.call(lambda: self._note_eof(child))

        reader = Reader(f"mcp-child-{child.pid}", read, lambda: self.stop_child(child))
        try:
            reader.start()
        except RuntimeError as error:
            child.close_output()
            self.stop_child(child)
            raise Overloaded(f"The server cannot be started: {error}") from error

    def stop_child(self, child: Child) -> None:
        """Begins to stop a child and returns at once; harmless if it is stopping or has exited."""
        self.call(lambda: self._begin_stop(child))

    def close(self, timeout: float = 2 * GRACE + _LINGER) -> None:
        """Stops every child and waits at most `timeout` seconds; the guardian kills the rest."""
        self._is_closing = True
        if not self.was_started:
            return
        with contextlib.suppress(RuntimeError):
            self.start()  # again, if its thread has ended
        self.call(self._begin_stop_all)
        with self._all_exited:
            self._all_exited.wait_for(lambda: self._alive == 0, timeout)
        self.stop(_LINGER)
        self.guardian.close()

    # --- the supervisor's thread -----------------------------------------------------------------

    def run_once(self) -> None:
        super().run_once()
        for child in [c for c, until in self._flooding.items() if until <= time.monotonic()]:
            del self._flooding[child]
            self.register(child.stderr, partial(self._drain_stderr, child))
        for supervised in list(self._ending):
            self.guarded(partial(self._advance, supervised))

    def timeout(self) -> float | None:
        if self._polled:
            self._ending.update(s for s in self._polled if s.child.has_exited())
            return _POLL
        if self._flooding:
            return _PAUSE
        return _POLL if self._ending else None

    def _add(self, supervised: _Supervised) -> None:
        child = supervised.child
        self._supervised[child] = supervised
        self.register(child.stderr, lambda: self._drain_stderr(child))
        try:
            supervised.pidfd = os.pidfd_open(child.pid)
            self.register(supervised.pidfd, lambda: self._ending.add(supervised))
        except (AttributeError, OSError):  # the system has none, or none left
            self._polled.add(supervised)

    def _watch_guardian(self) -> None:
        """Has the guardian's exit noticed at once, where the system has pidfd."""
        exit_descriptor = self._guardian_exit = self.guardian.exit_descriptor()
        if exit_descriptor is not None:
            self.register(exit_descriptor, self._renew_guardian)

    def _renew_guardian(self) -> None:
        self._unwatch_guardian()
        self.guardian.renew()
        self._watch_guardian()

    def _unwatch_guardian(self) -> None:
        exit_descriptor, self._guardian_exit = self._guardian_exit, None
        if exit_descriptor is not None:
            self.unregister(exit_descriptor)
            os.close(exit_descriptor)

    def finish(self) -> None:
        self._unwatch_guardian()
        super().finish()

    def _drain_stderr(self, child: Child) -> None:
        size = child.drain_stderr()
        if size is not None and (size == 0 or child.is_flooding):
            self.unregister(child.stderr)
            if size:  # or it would have this thread for itself
                self._flooding[child] = time.monotonic() + _PAUSE

    def _note_eof(self, child: Child) -> None:
        supervised = self._supervised.get(child)
        if supervised is not None:  # None: its exit was noticed first
            self._ending.add(supervised)

    def _begin_stop(self, child: Child) -> None:
        supervised = self._supervised.get(child)
        if supervised is not None and supervised.steps is None:
            supervised.steps = list(_STEPS)
            supervised.next_step = time.monotonic() + GRACE
            self._ending.add(supervised)
            child.close_stdin()

    def _begin_stop_all(self) -> None:
        for child in list(self._supervised):
            self._begin_stop(child)

    def _advance(self, supervised: _Supervised) -> None:
        """The next step for a child that is stopping or has exited."""
        child, now = supervised.child, time.monotonic()
        if supervised.exited is None:
            if child.has_exited():
                self._reap(supervised, now)
            elif supervised.steps is None:
                self._begin_stop(child)  # it has closed its output, so it cannot answer any more
                supervised.mute_at = now + _EXITING
            elif supervised.mute_at is not None and now >= supervised.mute_at:
                supervised.mute_at = None
                if supervised.on_mute is not None:
                    supervised.on_mute()
            elif supervised.steps and now >= supervised.next_step:
                child.end(supervised.steps.pop(0))
                supervised.next_step = now + GRACE
        if supervised.exited is not None and (child.at_eof.is_set() or now >= supervised.next_step):
            self._discard(supervised, supervised.exited)

    def _reap(self, supervised: _Supervised, now: float) -> None:
        child = supervised.child
        for _ in range(_LAST_READS):  # a descendant may go on writing
            if not child.drain_stderr():
                break
        self.unregister(child.stderr)
        self._flooding.pop(child, None)
        if supervised.pidfd is not None:
            self.unregister(supervised.pidfd)
            os.close(supervised.pidfd)
        self._polled.discard(supervised)
        supervised.exited = child.reap()
        supervised.next_step = now + _LINGER
        self.guardian.forget(child.pid, "" if self.keep_detached else child.tag)

    def _discard(self, supervised: _Supervised, how: str) -> None:
        """Reports the exit of a child whose output has been read."""
        child = supervised.child
        if not child.at_eof.is_set():
            child.end_reading()
        self._ending.discard(supervised)
        del self._supervised[child]
        log.debug("[%s] process %d exited: %s", child.name, child.pid, how)
        try:
            supervised.on_exit(how)
        finally:
            with self._all_exited:
                self._alive -= 1
                self._all_exited.notify_all()
