"""Spares: processes of a stdio server that are started before a session needs them.

Whoever starts a server here, for a session, for one that is brought back or for a home, takes a
spare in place of a new process, if there is one: it has done all that takes time, and has been told
nothing. Another one is started when no session starts a server.

Threads: one starts spares. What a spare says waits in its reader until somebody has taken it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from mcp_proxy.auth.caller_env import CallerEnv, EnvFor
from mcp_proxy.backends.bridge import WRITE_TIMEOUT
from mcp_proxy.background import Periodic, Reader, Workers
from mcp_proxy.config import ProxyOptions
from mcp_proxy.errors import (
    BackendLost,
    BackendNotStarted,
    ClientError,
    ClientLeft,
    ProxyError,
    RequestId,
)
from mcp_proxy.ownership.backoff import Backoff
from mcp_proxy.ownership.turns import Turns
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.server_table import is_other_process
from mcp_proxy.servers import Served, StdioServer
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Response

log = logging.getLogger(__name__)

#: Seconds between attempts to start one where one is missing, and between looks where none is.
MISSING = 0.25
COMPLETE = 60.0

# Seconds for the start of a process: only until the system has it.
_START_TIME = 2.0

# What the pauses after spares that have exited are remembered by.
_SPARE = "spare"


class Spares(Periodic):
    """The spares of one server: as many as `spare_children` says, if the server can have any.

    It is a Starter. `has_room` says whether one more process may be there; it is called with `lock`
    held, which guards how many there are. Nothing runs before the first start of a server, or
    `keep`; in a forked process it begins anew. Thread-safe.
    """

    is_essential = False

    def __init__(
        self,
        server: Served,
        options: ProxyOptions,
        supervisor: Supervisor,
        turns: Turns,
        backoff: Backoff,
        lock: threading.Lock,
        has_room: Callable[[], bool],
        workers: Workers,
        env_for: EnvFor | None = None,
    ) -> None:
        super().__init__("mcp-spares", MISSING, self._fill, workers)
        self._supervisor = supervisor
        self._turns = turns
        self._backoff = backoff
        self._has_room = has_room
        self._env_for = env_for
        self._adopt(server, options)
        self._lock = lock  # guards what follows
        self._waiting: deque[_Spare] = deque()  # for somebody to take them, the oldest first
        self._generation = 0
        self._under_way = 0
        self._has_failed = False  # to start: the next attempt is made after a session's own
        self._is_logged = False  # that they exit; until one is of use

    def _adopt(self, server: Served, options: ProxyOptions) -> None:
        self._max_message = options.max_message_bytes
        # A server whose environment depends on its caller can have none: nobody knows that ahead.
        has_caller_env = CallerEnv.of(server, self._env_for) is not None
        self._server = server if isinstance(server, StdioServer) and not has_caller_env else None
        self._wanted = options.spare_children if self._server is not None else 0

    def __repr__(self) -> str:
        return f"<Spares {self.pids} of {self._wanted}>"

    @property
    def pids(self) -> list[int]:
        """The processes that somebody may take, the oldest first."""
        with self._lock:
            return [spare.pid for spare in self._waiting] if self.was_started else []

    @property
    def count(self) -> int:
        """How many there are, or are being started."""
        return len(self._waiting) + self._under_way if self.was_started else 0

    def keep(self) -> None:
        """Has spares started from now on, if any are wanted; harmless when repeated."""
        if self._wanted:
            with contextlib.suppress(RuntimeError):  # no thread: the next start tries again
                self.start()

    def change(self, server: Served, options: ProxyOptions) -> None:
        """Keeps those of another form of the server from now on; the others end."""
        outdated: list[_Spare] = []
        with self._lock:
            self._adopt(server, options)
            if self.was_started:
                outdated = [one for one in self._waiting if is_other_process(one.server, server)]
                self._waiting = deque(one for one in self._waiting if one not in outdated)
        self._end(outdated)

    def restart(self) -> None:
        """Ends those that there are; others are started in their place."""
        with self._lock:
            self._generation += 1
            outdated, self._waiting = self._waiting, deque()
        self._end(outdated)

    def _end(self, outdated: Iterable[_Spare]) -> None:
        for spare in outdated:
            spare.stop()
        self._has_failed = False
        self.interval = MISSING
        self.wake()

    def end_one(self, needed: Callable[[], int]) -> bool:
        """Ends one to make room, unless no more than `needed` are there; whether it did."""
        with self._lock:
            if self.count <= needed() or not self._waiting:
                return False
            spare = self._waiting.pop()
        spare.stop()
        self.wake()  # so that there is another one once there is room
        return True

    def close(self) -> None:
        """Ends all of them; none is started any more."""
        self.stop(_START_TIME)  # one that was begun is to be ended in order, too
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for spare in waiting:
            spare.stop()

    # --- as a starter ----------------------------------------------------------------------------

    def spawn(
        self,
        server: StdioServer,
        max_message: int,
        on_exit: Callable[[str], None],
        on_mute: Callable[[], None] | None = None,
    ) -> Any:
        """A spare, or a new process where there is none."""
        self.keep()
        spare = self._take(server, on_exit, on_mute)
        if self._wanted:
            self._has_failed = False
            self.interval = MISSING
            self.wake()
        return spare or self._supervisor.spawn(server, max_message, on_exit, on_mute)

    def read(self, child: Any, on_line: Callable[[bytes], None]) -> None:
        if isinstance(child, _Spare):
            child.read(on_line)
        else:
            self._supervisor.read(child, on_line)

    def stop_child(self, child: Any) -> None:
        if isinstance(child, _Spare):
            child.stop()
        else:
            self._supervisor.stop_child(child)

    def _take(
        self,
        server: StdioServer,
        on_exit: Callable[[str], None],
        on_mute: Callable[[], None] | None,
    ) -> _Spare | None:
        """The oldest that has not exited."""
        with self._lock:
            while self.count and self._waiting:
                if is_other_process(self._waiting[0].server, server):
                    return None
                spare = self._waiting.popleft()
                if not spare.child.has_exited():
                    spare.take(on_exit, on_mute)
                    return spare
        return None

    # --- from spares -----------------------------------------------------------------------------

    def discard(self, spare: _Spare) -> None:
        """A spare that waits here cannot be taken any more."""
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(spare)

    def note_exit(self, spare: _Spare, how: str) -> None:
        """A spare has exited by itself."""
        self._backoff.note_exit(_SPARE, lifetime=0)
        level = logging.DEBUG if self._is_logged else logging.WARNING
        self._is_logged = True
        log.log(level, "[%s] a server that was started ahead exited (%s)", spare.label, how)
        self.wake()

    def note_use(self) -> None:
        """A spare has answered whoever has taken it."""
        self._is_logged = False
        self._backoff.forget(_SPARE)

    # --- the thread ------------------------------------------------------------------------------

    def prepare(self) -> None:
        with self._lock:
            self._waiting, self._under_way = deque(), 0  # after a fork: those are the other's

    def _fill(self) -> None:
        """Starts one where one is missing, and no session starts a server."""
        is_complete = self.count >= self._wanted or self._has_failed
        self.interval = COMPLETE if is_complete else MISSING
        if is_complete or self._server is None:
            return
        try:
            self._backoff.require_over(_SPARE)
        except BackendNotStarted:
            return
        with self._lock:
            if not self._has_room():
                return
            self._under_way += 1
            generation = self._generation
        spare = None
        try:
            if self._turns.take_ahead():
                spare = _Spare(self._server, self._max_message, self._supervisor, self)
        except ProxyError as error:
            self._has_failed = True
            log.debug("[%s] no server is started ahead: %s", self._server.name, error)
        finally:
            with self._lock:
                self._under_way -= 1
                is_kept = spare is not None and self._is_wanted(spare, generation)
                if spare is not None and is_kept:
                    self._waiting.append(spare)
        if spare is not None and not is_kept:
            spare.stop()

    def _is_wanted(self, spare: _Spare, generation: int) -> bool:
        """Whether one that was started in this generation is of use. The lock is held."""
        if self.is_stopping or spare.has_ended or self._server is None:
            return False
        if generation != self._generation:
            return False
        return not is_other_process(spare.server, self._server)


class _Spare:
    """A process that was started ahead: a Peer, once somebody has taken it.

    Where it ends before it has answered anything a new process takes its place, and is told the
    first message that it was told.
    """

    headers: Mapping[str, str] = {}
    untaken: Collection[RequestId] = ()
    may_refuse = False

    def __init__(
        self, server: StdioServer, max_message: int, supervisor: Supervisor, spares: Spares
    ) -> None:
        self.server = server
        #: Whether the process has exited, or says nothing any more.
        self.has_ended = False
        self._max_message = max_message
        self._supervisor = supervisor
        self._spares = spares
        self._is_read = threading.Event()  # or nobody will read it
        self._on_line: Callable[[bytes], None] | None = None
        self._on_exit: Callable[[str], None] | None = None  # of whoever has taken it
        self._on_mute: Callable[[], None] | None = None
        self._lock = threading.Lock()  # guards what follows
        self._told: list[bytes] | None = []  # None once nothing has to be told again
        self._is_stopped = False
        self.child = supervisor.spawn(server, max_message, self._note_exit, self._note_mute)
        supervisor.read(self.child, self._note_line)

    def __repr__(self) -> str:
        return f"<_Spare {self.child!r} taken={self._on_exit is not None}>"

    def take(self, on_exit: Callable[[str], None], on_mute: Callable[[], None] | None) -> None:
        """From now on its end is told to whoever has taken it."""
        self._on_exit, self._on_mute = on_exit, on_mute

    def read(self, on_line: Callable[[bytes], None]) -> None:
        """Has `on_line` called with every line, also those that it has said so far."""
        self._on_line = on_line
        self._is_read.set()

    def stop(self) -> None:
        """Begins to end the process; harmless when repeated."""
        with self._lock:
            self._is_stopped = True
            child = self.child
        if self._on_exit is None:
            self._is_read.set()
        self._supervisor.stop_child(child)

    # --- as a peer -------------------------------------------------------------------------------

    @property
    def session(self) -> str:
        return self.child.session

    @session.setter
    def session(self, session: str) -> None:
        self.child.session = session

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def label(self) -> str:
        return self.child.label

    @property
    def end_sentence(self) -> str:
        return self.child.end_sentence

    @property
    def end_in_log(self) -> str:
        return self.child.end_in_log

    @property
    def stderr_tail(self) -> list[str]:
        return self.child.stderr_tail

    def write(
        self,
        line: bytes,
        timeout: float,
        has_left: Callable[[], bool] | None = None,
        hand_on: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        with self._lock:
            child = self.child
            if self._told and not self.has_ended:
                self._told = None  # of two messages it may have taken one
            is_told = self._told is not None
            if self._told is not None:
                self._told.append(line)
        try:
            child.write(line, timeout, has_left, hand_on)
        except ClientLeft:
            with self._lock:
                if self._told is not None:
                    self._told.remove(line)
            raise
        except BackendLost:
            if not is_told:
                raise
            self._supervisor.stop_child(child)  # another one is told, when it has exited

    # --- from the process ------------------------------------------------------------------------

    def _note_line(self, line: bytes) -> None:
        if self._on_line is None:
            self._is_read.wait()
        if self._on_line is None:
            return
        if self._told is not None and _is_answer(line):
            with self._lock:
                self._told = None
            self._spares.note_use()
        self._on_line(line)

    def _note_mute(self) -> None:
        """It has closed its output, and is being stopped."""
        self.has_ended = True
        self._spares.discard(self)
        if self._on_mute is not None and self._told is None:
            self._on_mute()

    def _note_exit(self, how: str) -> None:
        self.has_ended = True
        self._spares.discard(self)
        if self._on_exit is None:
            self._is_read.set()
            if not self._is_stopped:
                self._spares.note_exit(self, how)
        elif not self._is_replaced(how):
            self._on_exit(how)

    def _is_replaced(self, how: str) -> bool:
        """Whether another process is started, by a thread of its own, in the place of this one."""
        if self._told is None or self._is_stopped or self._on_exit is None:
            return False
        self._spares.note_exit(self, how)
        failed = partial(self._on_exit, how)
        try:
            Reader(f"mcp-spare-{self.pid}", partial(self._replace, failed), failed).start()
        except RuntimeError:  # there is no thread
            return False
        return True

    def _replace(self, failed: Callable[[], object]) -> None:
        """Starts another process for whoever has this one; `failed` tells that none can be."""
        self._is_read.wait()
        assert self._on_exit is not None
        assert self._on_line is not None
        try:
            child = self._supervisor.spawn(
                self.server, self._max_message, self._on_exit, self._on_mute
            )
        except ProxyError:
            failed()
            return
        with self._lock:
            child.session = self.child.session
            self.child = child
            told, self._told = self._told or [], None
            is_stopped = self._is_stopped
        try:
            self._supervisor.read(child, self._on_line)
            for line in told:
                child.write(line, WRITE_TIMEOUT)
        except ProxyError:
            is_stopped = True  # its exit tells why
        if is_stopped:
            self._supervisor.stop_child(child)


def _is_answer(line: bytes) -> bool:
    """Whether a server answers by this; what it says without being asked is no answer."""
    try:
        return isinstance(jsonrpc.parse_message(line), Response)
    except ClientError:
        return False
