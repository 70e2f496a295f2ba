"""Which replica holds the child of a session, and what happens when it is lost.

A session's record says where its child is: `backend_url` is `worker://<replica>/<child>`. This
module holds the children of this replica, starts new ones, finds those that another replica holds,
and brings back a lost one: the record is first swapped to a claim, then the child is started and
told everything the old one knew, then the record is swapped to the result. Whoever loses the first
swap waits for the winner; a DELETE in between wins over both.

One thread sweeps: it ends the children of sessions that expired, went elsewhere, or are idle where
idle ones are not kept. Where there is no room for another child, that of the session which was not
used for the longest time is stopped; its record stays, so that a request brings it back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import NamedTuple, TypeVar

from mcp_proxy import metrics
from mcp_proxy.auth import caller_env
from mcp_proxy.auth.caller_env import CallerEnv, EnvFor, Values
from mcp_proxy.auth.group_env import GroupEnv
from mcp_proxy.backends import handshake
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import Backend, Exchange, wait_for
from mcp_proxy.backends.group import Group
from mcp_proxy.backends.owned import OwnedBackend, Starter
from mcp_proxy.backends.switchboard import Switchboard
from mcp_proxy.background import KeyedExecutor, Periodic, TimerWorker, Workers
from mcp_proxy.config import ProxyOptions
from mcp_proxy.eras.initial import InitialSwitchboard
from mcp_proxy.errors import (
    BackendDraining,
    BackendError,
    BackendExited,
    BackendLost,
    BackendNotStarted,
    BackendTimeout,
    BackendUnreached,
    Draining,
    Overloaded,
    SessionEnded,
    SessionNotFound,
    StorageError,
    StorageUnavailable,
    UncertainEra,
    in_seconds,
)
from mcp_proxy.ownership.backoff import Backoff
from mcp_proxy.ownership.spares import Spares
from mcp_proxy.ownership.turns import Turns
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.relay.lease import boottime
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica, has_ended
from mcp_proxy.resumption.writing import ReadOnWorker, SessionLog
from mcp_proxy.server_table import is_other_process
from mcp_proxy.servers import Served, StdioServer
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager, whose
from mcp_proxy.storage.mailboxes import Mailboxes
from mcp_proxy.storage.session import (
    BACKEND_URL,
    CLAIM,
    ENV_DIGEST,
    INIT_BODY,
    PROTOCOL_VERSION,
    RESUME,
    Session,
)
from mcp_proxy.wire.urls import WorkerUrl, parse_worker_url

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds for which the record of a session held here is known.
_AUTHORITY = 1.0

# Rounds of looking for a session's child while others change the record: each of them ends with a
# child that was found, or with somebody else's success that was gone again at once.
_ROUNDS = 5

# Children that are brought back at the same time.
_RESTORED_AT_ONCE = 64

#: Seconds for a new child to answer the replay, within a claim: it may have to be fetched first.
REPLAY_TIME = claims.CLAIM_TIME * 3 / 4

# Sweeps in the time that an unused session lives, and the seconds between two at most and at least.
_SWEEPS_PER_TTL = 4
_MAX_SWEEP = 30.0
_MIN_SWEEP = 0.25

# What the log says where a session has a backend in the place of none, or of one that was lost.
_STARTED = (
    "a server was started for this session",
    "the server of this session was started again",
)
_BEGUN = ("a new conversation with the server was begun",) * 2


class ReplicaParts:
    """What the owners of one replica have in common: its id, supervisor, relay and threads, and the
    children that it may have.

    Without `mailboxes` there are no other replicas.
    """

    def __init__(self, mailboxes: Mailboxes | None) -> None:
        #: Guards what each of the owners holds, since `max_sessions` counts it together.
        self.lock = threading.Lock()
        self.owners: list[Owner] = []
        self.workers = Workers()
        self.replica = Replica()
        self.supervisor = Supervisor(self.replica, self.workers)
        self.turns = Turns(self._starts_at_once)
        self.timer = TimerWorker("mcp-timer", self.workers)
        self.relay = None
        if mailboxes is not None:
            self.relay = Relay(mailboxes, self.replica, self.workers)

    def __repr__(self) -> str:
        return f"<ReplicaParts {self.replica!r} {self.supervisor!r} {self.relay!r}>"

    def _starts_at_once(self) -> int:
        cpus = self.supervisor.cpu_affinity
        return max(2, len(cpus) if cpus else os.cpu_count() or 1)

    def close(self) -> None:
        """Ends the starts, the relay, then every child, and waits for that."""
        self.turns.close()
        self.timer.stop()
        if self.relay is not None:
            self.relay.close()
        self.supervisor.close()


class _Seen(NamedTuple):
    """A record as the store had it, and when (seconds)."""

    session: Session
    at: float


class _Held(NamedTuple):
    session_id: str
    session_type: str
    whose: str | None
    backend: OwnedBackend
    log: SessionLog


class _Left(NamedTuple):
    """What a child that is lost had of the caller of its session."""

    session_id: str
    values: Values


class Owner:
    """The children of one server in this replica, by the `backend_url` that names them.

    Thread-safe. Nothing runs before the first session begins. `starters` start what is no child of
    a session of its own, by the type of the record; `starter` begins conversations, without one the
    supervisor does, with processes. `env_for` says which variables a child gets of its caller,
    beside those that the server names. `make` makes what a session has in the place of a child.
    """

    def __init__(
        self,
        server: Served,
        manager: SessionManager,
        parts: ReplicaParts,
        options: ProxyOptions,
        starter: Starter | None = None,
        env_for: EnvFor | None = None,
        make: Callable[[], Group] | None = None,
    ) -> None:
        self.server, self._options, self._env_for, self._make = server, options, env_for, make
        #: What children get of their caller; None: nothing.
        self.caller_env: CallerEnv | GroupEnv | None = CallerEnv.of(server, env_for)
        self.manager = manager
        self.relay = parts.relay
        self.events = manager.storage.event_log()
        # To ask an HTTP server anew costs next to nothing.
        self._renewed = _STARTED if starter is None else _BEGUN
        self.backoff = Backoff() if starter is None else Backoff(longest=0.0)
        self.replica, self.supervisor, self.turns = parts.replica, parts.supervisor, parts.turns
        #: Processes that are started ahead.
        self.spares = Spares(
            server,
            options,
            parts.supervisor,
            parts.turns,
            self.backoff,
            parts.lock,
            self._has_room,
            parts.workers,
            env_for,
        )
        self.starter = starter or self.spares
        self.timer = parts.timer
        self.starters: dict[str, Callable[[Session], OwnedBackend]] = {}
        self.supervisor.keep_detached = options.keep_detached
        self._workers = parts.workers
        self._read_on = ReadOnWorker(parts.workers)
        self._restorer = KeyedExecutor("mcp-restorer", _RESTORED_AT_ONCE)
        self._interval = _sweep_interval(options)
        self._sweeper = Periodic("mcp-sweeper", self._interval, self._sweep_once, parts.workers)
        self._sweeper.is_essential = False
        if self.relay is not None:
            self.relay.serve(self.find, on_lapse=self._sweeper.wake)
        self._lock = parts.lock  # guards _held, _lent, _starting and _pending
        self._held: dict[str, _Held] = {}
        # What says whether a group needs a child although nobody calls it.
        self._lent: dict[Bridge, Callable[[], bool]] = {}
        self._starting: set[OwnedBackend] = set()  # children that are not held yet
        # Of these each operation is atomic: by the `backend_url` that the record names still, what
        # the store has said last of sessions held here, and those of them that ended while it was
        # away, so that their records are still there.
        self._left: dict[str, _Left] = {}
        self._seen: dict[str, _Seen] = {}
        self._ended: set[str] = set()
        self._pending = 0  # children that are about to be held
        self._form = 0  # how often what starts a process has changed
        self._is_closing = self._has_given_way = False
        self._owners = parts.owners
        self._owners.append(self)  # until it is closed

    def __repr__(self) -> str:
        held, ended = len(self._held), len(self._ended)
        return f"<Owner {self.server.name} held={held} ended={ended} {self.spares!r}>"

    # --- another form of the server --------------------------------------------------------------

    @property
    def options(self) -> ProxyOptions:
        """The settings of the server."""
        return self._options

    @property
    def is_group(self) -> bool:
        """Whether its sessions have several servers."""
        return self._make is not None

    def change(self, server: Served, options: ProxyOptions) -> None:
        """Serves another form of the server from now on; its name and its kind are the same.

        Where that starts another process, the children that there are end, each as soon as nobody
        waits for an answer of it, and are brought back as after a crash.
        """
        is_other = is_other_process(self.server, server)
        self.server, self._options = server, options
        self.caller_env = CallerEnv.of(server, self._env_for)
        self.spares.change(server, options)
        if is_other:
            self._replace_children()

    def restart(self) -> None:
        """Has other processes take the place of those that there are, as `change` does."""
        self.spares.restart()
        self._replace_children()

    def _replace_children(self) -> None:
        self.backoff.forget_all()
        with self._lock:
            self._form += 1
            others = [*self._starting, *self._lent]
            others += [held.backend for held in self._held.values()]
            for backend in others:
                backend.outdate(self._options.request_timeout)
        if others:
            self._hasten_sweep()

    def _hasten_sweep(self) -> None:
        self._sweeper.interval = _MIN_SWEEP
        with contextlib.suppress(RuntimeError):  # no thread: their next requests replace them
            self._sweeper.start()
        self._sweeper.wake()

    def give_way(self) -> None:
        """Has another owner of this replica take over the sessions.

        Calls in flight end here, as long as what is here is not closed, and nothing begins.
        """
        self._has_given_way = True

    def end_all(self) -> None:
        """Ends every session that has its child here, for good: the server was removed. If another
        owner has the sessions by now, only what is here ends.
        """
        ending = {} if self._has_given_way else self._held_copy()
        for url, held in ending.items():
            try:
                self.manager.end(held.session_id)
            except StorageError as error:  # it expires
                log.warning("[%s] the record of a session is left: %s", self.server.name, error)
            self._release(url)
            self.events.forget(held.session_id)
        self.close()

    # --- a new session ---------------------------------------------------------------------------

    def start(self, has_left: Callable[[], bool] | None = None) -> OwnedBackend:
        """A new child that belongs to no session yet: to be established, or discarded.

        Waits for its turn, unless `has_left` says meanwhile that the client has left. Raises
        Overloaded when this replica has all the sessions it may have, BackendLost when the server
        cannot be started, ClientLeft.
        """
        self.reserve()
        try:
            return self._spawn_in_turn(has_left)
        except BaseException as error:
            self.unreserve()
            if isinstance(error, BackendLost):
                self.backoff.note_failure(error)
                counters = metrics.current()
                if counters is not None:
                    counters.recent.note_failure(self.server.name, str(error), [])
            raise

    def _spawn_in_turn(self, has_left: Callable[[], bool] | None) -> OwnedBackend:
        """A new child, whose turn lasts until it has answered initialize."""
        if self._make is not None:
            return self._make()
        turn = self.turns.take(self._options.request_timeout, has_left)
        try:
            bridge = self.spawn()
        except BaseException:
            turn.give_back()
            raise
        bridge.set_on_initialized(turn.give_back)
        return bridge

    def reserve(self) -> None:
        """Counts one more child that is about to begin; raises Overloaded."""
        limit = self._options.max_sessions
        while not self._has_reserved(limit):
            if not (self._has_ended_spare() or self._has_stopped_idle_one()):
                raise Overloaded(f"All {limit} sessions of this worker are taken")

    def _has_reserved(self, limit: int) -> bool:
        with self._lock:
            self._pending += 1  # which may take the place of a spare
            if sum(owner._taken() for owner in self._owners) <= limit:
                return True
            self._pending -= 1
            return False

    def _has_room(self) -> bool:
        """Whether this replica may have one more spare. The lock is held."""
        return sum(owner._taken() for owner in self._owners) < self._options.max_sessions

    def _taken(self) -> int:
        """How many of the processes that a worker may have are taken here. The lock is held."""
        further = max(0, self.spares.count - self._to_start())
        return self._size() + self._pending + further

    def _to_start(self) -> int:
        """How many of the children that are about to be held have no process yet.

        Each of them takes a spare. The lock is held.
        """
        return max(0, self._pending - len(self._starting))

    def _has_ended_spare(self) -> bool:
        """Ends a spare that no start is about to take; it may be of another server."""
        return any(owner.spares.end_one(owner._to_start) for owner in self._owners)

    def end_parked_beyond(self, limit: int) -> None:
        """Ends the calls that have waited longest for their client where more than `limit` do, in
        this replica.
        """
        with self._lock:
            held = [one.backend for owner in self._owners for one in owner._held.values()]
        parked = [backend for backend in held if backend.parked]
        while sum(backend.parked for backend in parked) > limit:
            min(parked, key=lambda backend: backend.parked_since).end_oldest()

    def _size(self) -> int:
        return len(self._lent) + sum(held.backend.size for held in self._held.values())

    def _has_stopped_idle_one(self) -> bool:
        """Stops the idle child that is missed the least: never called, or not for the longest time.

        It may be of another server. False where there is none.
        """
        held = [(owner, *item) for owner in self._owners for item in owner._held_copy().items()]
        held.sort(key=lambda item: (item[2].backend.was_called, item[2].backend.last_used))
        seconds = self._options.evict_after
        if any(owner._has_stopped_lent(seconds) for owner in self._owners):
            return True
        return any(owner._stop_if_idle(url, one, seconds) for owner, url, one in held)

    def _has_stopped_lent(self, seconds: float) -> bool:
        """Whether a child of a group was stopped that nobody has called for so long."""
        with self._lock:
            lent = sorted(self._lent.items(), key=lambda item: item[0].last_used)
        now = time.monotonic()
        unused = (b for b, is_needed in lent if now - b.last_used >= seconds and not is_needed())
        return any(bridge.end_between_calls() for bridge in unused)

    def _stop_if_idle(self, url: str, held: _Held, seconds: float) -> bool:
        if not held.backend.stop_if_idle(seconds):
            return False
        log.info("[%s] a session is idle; its server stops, its record stays", self.server.name)
        self._give_up(held.session_id, url)
        return True

    def supersede(self, backend: OwnedBackend) -> None:
        """Another backend has taken the place of this one: it ends now, or once nobody needs it."""
        backend.is_superseded = True
        url = self._url(backend)
        held = self._held.get(url)
        if held is not None:
            self._stop_if_idle(url, held, 0.0)

    def lend(self, bridge: Bridge, is_needed: Callable[[], bool]) -> None:
        """A group has a child from now on that `spawn` has started.

        It counts as one that is held here, is replaced as they are where its server changes, and
        gives way to others unless a client waits for it or `is_needed` says so.
        """
        bridge.on_close = partial(self._end_loan, bridge)
        with self._lock:
            self._starting.discard(bridge)
            self._lent[bridge] = is_needed
        self._sweeper.start()
        if not bridge.is_alive:
            self._end_loan(bridge)

    def _end_loan(self, bridge: Bridge) -> None:
        with self._lock:
            self._lent.pop(bridge, None)

    def establish(self, session: Session, bridge: OwnedBackend) -> Session:
        """Records a session whose child is ready for it, and returns the record.

        Raises StorageError, and then the child has been ended.
        """
        url = self._url(bridge)
        session = session.with_metadata(**{BACKEND_URL: url})
        try:
            self._open_mailbox()
            self.manager.create(session)
        except BaseException:
            self.discard(bridge)
            raise
        try:
            self._hold(url, session, bridge)
        except BaseException:
            self._forget(url)
            self.discard(bridge)
            self.manager.end(session.id)
            raise
        self.unreserve()
        return session

    def discard(self, bridge: OwnedBackend, failure: BackendError | None = None) -> None:
        """Ends a child that began no session, because of `failure` if there was one."""
        self._end_start(bridge)
        self.unreserve()
        if failure is not None:
            self.backoff.note_failure(failure)

    def _open_mailbox(self) -> None:
        """Without a mailbox everybody would take this replica for gone."""
        if self.relay is not None:
            self.relay.start()

    def unreserve(self) -> None:
        """What was reserved is held, or did not begin."""
        with self._lock:
            self._pending -= 1

    # --- a known session -------------------------------------------------------------------------

    def send(
        self,
        session: Session,
        exchange: Exchange,
        backend: Backend | None = None,
        send_anew: Callable[[Exchange], object] | None = None,
    ) -> None:
        """Sends an exchange to the session's backend; again, to a new one, where it is certain
        that the first got nothing of it.

        `backend` is that one where it is known (`backend_at_hand`). `send_anew` is called where a
        start has left it uncertain which era the server is of.
        """
        # Whoever sends it once more does so for the same caller.
        resend = partial(self._send_to_new_backend, session, send_anew=send_anew)
        exchange.resend = partial(copy_context().run, resend)
        try:
            (backend or self.backend_of(session, has_left=exchange.has_left)).send(exchange)
        except BackendUnreached:
            self._send_to_new_backend(session, exchange, send_anew)
        except UncertainEra:
            if send_anew is None:
                raise
            send_anew(exchange)

    def _send_to_new_backend(
        self,
        session: Session,
        exchange: Exchange,
        send_anew: Callable[[Exchange], object] | None = None,
    ) -> None:
        try:
            self._new_backend_of(session, exchange.has_left).send(exchange)
        except UncertainEra:
            if send_anew is None:
                raise
            send_anew(exchange)

    def on_backend(
        self,
        session: Session,
        act: Callable[[Backend], T],
        has_left: Callable[[], bool] | None = None,
    ) -> T:
        """What `act` returns for the session's backend; done again on a new one, once, where it is
        certain that the first got nothing of it.
        """
        try:
            return act(self.backend_of(session, has_left=has_left))
        except BackendUnreached:
            return act(self._new_backend_of(session, has_left))

    def backend_of(
        self,
        session: Session,
        lost: str | None = None,
        has_left: Callable[[], bool] | None = None,
    ) -> Backend:
        """The session's child, here or at another replica; brought back, here, if it is lost.

        `lost` is a `backend_url` that turned out to lead nowhere; `has_left` says whether the
        client has left: then it waits for no other start, and raises ClientLeft. Raises
        BackendError when the child cannot be brought back, SessionEnded when it must not be,
        StorageUnavailable.
        """
        if session.id in self._ended:
            self._delete_ended(session.id)
            raise SessionEnded
        for _ in range(_ROUNDS):
            backend = self._known(session, lost) or self._recover(session, has_left)
            if backend is not None:
                return backend
            session, lost = self.manager.load(session.id), None
        raise BackendLost("The session's server was not found: others keep changing its record")

    def backend_at_hand(self, session: Session) -> Backend | None:
        """The session's child, here or at another replica; None where it would have to be brought
        back first, which takes a while. Raises StorageUnavailable.
        """
        return None if session.id in self._ended else self._known(session, None)

    def load(self, session_id: str) -> Session:
        """The record of a session, its time to live restarted; raises what the manager's does.

        While the lease is held nobody else may change where a session of this replica is, and who
        ends one waits for this replica to know: so the store is asked once a second for such a one.
        """
        seen = self._seen.get(session_id)
        if (
            seen is not None
            and boottime() - seen.at < _AUTHORITY
            and self._is_authority(seen.session)
        ):
            return seen.session
        began = boottime()
        session = self.manager.load(session_id)
        if self._is_authority(session):
            self._seen[session_id] = _Seen(session, began)
        return session

    def _is_authority(self, session: Session) -> bool:
        """Whether a session has its child here, and nobody can have taken it over."""
        held = self._held.get(session.metadata.get(BACKEND_URL, ""))
        is_here = held is not None and held.backend.is_alive and CLAIM not in session.metadata
        return is_here and self.relay is not None and self.relay.is_held

    def replica_of(self, session: Session) -> str | None:
        """The replica that has the session's child, as the record says; None where none has it."""
        url = session.backend_url
        if url in self._held:
            return self.replica.id
        found = parse_worker_url(url)
        return None if found is None else found.replica

    def on_living_backend(self, session: Session, act: Callable[[Backend], object]) -> None:
        """Does `act` to the session's backend; one that is lost is not brought back for it.

        It may be about a call that goes on at the owner which was here before this one. Raises
        BackendUnreached where it is lost.
        """
        backend, former = self._known(session, None), self._former_backend(session.id)
        if former is not None:
            act(former)
        elif backend is None:
            raise BackendExited("The server that this was for has exited")
        if backend is not None:
            act(backend)

    def _former_backend(self, session_id: str) -> OwnedBackend | None:
        """Where calls of a session are in flight at an owner that has given way; None where none
        are.
        """
        former = [owner for owner in self._owners if owner._has_given_way]
        for held in (held for owner in former for held in owner._held_copy().values()):
            if held.session_id == session_id and held.backend.is_busy:
                return held.backend
        return None

    def _known(self, session: Session, lost: str | None) -> Backend | None:
        """The session's child where the record says that it is; None where it is certainly lost."""
        url = session.metadata.get(BACKEND_URL, "")
        held = self._held.get(url)
        if held is None and self._has_given_way:  # it is not lost, but another owner's
            held = next((its for one in self._owners if (its := one._held.get(url))), None)
        if held is not None and held.backend.is_outdated and held.backend.end_between_calls():
            return None
        if held is not None and held.backend.is_alive:
            if self.caller_env is not None:  # the next start is with what the caller has now
                held.backend.caller_values = (
                    caller_env.current_values() or held.backend.caller_values
                )
            if self.relay is None or self.relay.is_held:
                return held.backend
            # After a freeze somebody may have taken over since the record was loaded.
            current = self.manager.peek(session.id)
            if current is not None and current.backend_url == url:
                return held.backend
        found = parse_worker_url(url)
        if self.relay is None or found is None or url == lost or self._has_ended(found):
            return None
        return self.relay.backend(*found)

    def _new_backend_of(self, session: Session, has_left: Callable[[], bool] | None) -> Backend:
        """The backend that the session has now that its last one is lost."""
        return self.backend_of(self.manager.load(session.id), session.backend_url, has_left)

    def _has_ended(self, url: WorkerUrl) -> bool:
        """Whether there is certainly no such child: it would be here, or its replica has ended."""
        return url.replica == self.replica.id or has_ended(url.replica)

    def is_lost(self, session_id: str, child: str) -> bool:
        """Whether a child that the session once had is lost; raises StorageError."""
        session = self.manager.peek(session_id)
        url = None if session is None else parse_worker_url(session.backend_url)
        if url is None or url.child != child:
            return True
        if url.replica == self.replica.id or self.relay is None:
            return self.find(child) is None
        return self.relay.is_gone(url.replica)

    def find(self, child: str, begins: bool = False) -> Backend | None:
        """The child of this replica that has this id; None where a call or a stream `begins`, and
        another owner has its session.
        """
        if begins and self._has_given_way:
            return None
        held = self._held.get(str(WorkerUrl(self.replica.id, child)))
        if held is not None and held.backend.is_outdated and held.backend.end_between_calls():
            return None
        return held.backend if held is not None and held.backend.is_alive else None

    def end(self, session: Session) -> None:
        """Ends a session and its child, wherever that is; a child here also without the store.

        Raises StorageUnavailable.
        """
        try:
            self.manager.end(session.id)
        except StorageUnavailable:
            self.end_without_store(session.id, session.type, session.metadata)
            raise
        self._count_ended(session)
        self.backoff.forget(session.id)
        url = session.backend_url or ""
        found = parse_worker_url(url)
        former = self._former_backend(session.id)
        if former is not None:
            former.close()
        if url in self._held:
            self._release(url)
        elif self.relay is not None and found is not None and not self._has_ended(found):
            self.relay.backend(*found).close()
        self.events.forget(session.id)

    def end_without_store(
        self, session_id: str, session_type: str, binding: Mapping[str, str]
    ) -> None:
        """Ends the child of a session that is bound so, if it is here. The record follows when the
        store is back; until then the session is not brought back here.
        """
        wanted = (session_id, session_type, whose(binding))
        for url, held in self._held_copy().items():
            if (held.session_id, held.session_type, held.whose) == wanted:
                self._ended.add(session_id)
                self._release(url)

    def _delete_ended(self, session_id: str) -> None:
        self.manager.end(session_id)
        self.events.forget(session_id)
        self._ended.discard(session_id)

    def end_left(self, session: Session) -> None:
        """Ends a session whose client has left; its record expires if the store is away."""
        self._count_ended(session)
        self._release(session.backend_url or "")
        try:
            self.manager.end(session.id)
        except StorageError as error:
            log.warning("[%s] the record of a session is left: %s", self.server.name, error)

    def _count_ended(self, session: Session) -> None:
        counters = metrics.current()
        if counters is not None:
            seconds = time.time() - session.created_at
            counters.observe(metrics.SESSIONS_ENDED, seconds, self.server.name)
            counters.recent.end_session(session.id, self.server.name)

    # --- recovery --------------------------------------------------------------------------------

    def _recover(self, session: Session, has_left: Callable[[], bool] | None) -> Backend | None:
        """The session's child, brought back; None where somebody else was faster.

        A claim lasts for a minute at most, so the turn comes first. Another thread does the work,
        which goes on when the client leaves or `request_timeout` is over, for which this waits at
        most: a short time limit would never get a slow server back.
        """
        if self._is_closing:
            raise Draining
        values = self._values_for(session)
        self.backoff.require_over(session.id)
        limit = self._options.request_timeout
        until = time.monotonic() + limit
        turn = self.turns.take(limit, has_left)
        restored: Future[Backend | None] = Future()
        restored.add_done_callback(lambda _: turn.give_back())
        own = self.replica.id
        try:
            left = max(0.0, until - time.monotonic())
            claimed = claims.claim(self.manager, session, own, has_ended, has_left, left)
            if claimed is None:
                restored.cancel()
                return None
            released = claims.released_on_failure(self.manager, claimed)
            with released, caller_env.on_behalf_of(values):
                self._submit(claimed.id, partial(self._restore, claimed, restored))
        except BaseException:
            restored.cancel()
            raise
        return self._awaited(restored, claimed, until, has_left)

    def _values_for(self, session: Session) -> Values | None:
        """What a new child of a session gets of its caller: what came with the request, else what
        the lost child had here. None where children get nothing.

        Raises SessionEnded where that is not known; the session goes on for who brings it.
        """
        if self.caller_env is None:
            return None
        values = caller_env.current_values()
        left = self._left.get(session.backend_url or "")
        if not values and left is not None and left.session_id == session.id:
            values = left.values
        if values is None or not (values or self._has_values(session, values)):
            raise SessionEnded
        return values

    def _has_values(self, session: Session, values: Values) -> bool:
        binding = self.manager.binding(None, caller_env.as_text(values))
        return session.metadata.get(ENV_DIGEST) == binding[ENV_DIGEST]

    def _submit(self, session_id: str, act: Callable[[], object]) -> None:
        try:
            self._restorer.submit(session_id, partial(copy_context().run, act))
        except RuntimeError as error:
            raise Overloaded(f"The server cannot be started: {error}") from error

    def _awaited(
        self,
        restored: Future[Backend | None],
        claimed: Session,
        until: float,
        has_left: Callable[[], bool] | None,
    ) -> Backend | None:
        """What comes of bringing a child back; raises ClientLeft, and BackendTimeout at `until`
        (monotonic), and then that goes on.
        """
        is_done = threading.Event()
        restored.add_done_callback(lambda _: is_done.set())

        def is_over() -> bool:
            if self._is_closing and restored.cancel():  # nobody begins with it any more
                with claims.released_on_failure(self.manager, claimed):
                    raise Draining
            return has_left is not None and has_left()

        if not wait_for(is_done, until - time.monotonic(), is_over):
            limit = in_seconds(self._options.request_timeout)
            raise BackendTimeout(f"The session's server was not brought back within {limit}")
        return restored.result()

    def _restore(self, claimed: Session, restored: Future[Backend | None]) -> None:
        """Brings the child of a session back that is claimed; in a thread of its own."""
        if not restored.set_running_or_notify_cancel():
            return
        try:
            restored.set_result(self._restored(claimed))
        except BaseException as error:
            restored.set_exception(error)

    def _restored(self, claimed: Session) -> OwnedBackend | None:
        try:
            with claims.released_on_failure(self.manager, claimed):
                backend = self._settled(claimed)
        except BackendDraining as error:
            raise Draining from error  # the call itself has not begun
        except UncertainEra:
            self.backoff.forget(claimed.id)  # it is another server, which has answered
            raise
        except BackendError as error:
            self.backoff.note_failure(error)
            self.backoff.note_exit(claimed.id, lifetime=0)
            raise
        except SessionEnded:
            self.end(claimed)
            raise
        finally:
            if self.manager.claims_left():
                self._hasten_sweep()
        if backend is not None:
            self.backoff.note_success()
            was_lost = claimed.backend_url is not None  # else a new home, idle, or handed over
            counters = metrics.current()
            if counters is not None and was_lost:
                counters.count(metrics.RESTARTED, self.server.name)
            log.info("[%s] %s", backend.name, self._renewed[was_lost])
        return backend

    def _settled(self, claimed: Session) -> OwnedBackend | None:
        """A new child in the place of the claim; None, and no child, where that has gone."""
        self.reserve()
        try:
            form = self._form
            backend = self._bring_back(claimed)
            url = self._url(backend)
            is_settled = False
            try:
                self._hold(url, claimed, backend)
                with self._lock:
                    if form != self._form:
                        backend.outdate(self._options.request_timeout)
                result = {BACKEND_URL: url, **self._binding_of(backend)}
                is_settled = claims.settle(self.manager, claimed, **result)
            finally:
                if not is_settled:
                    self._release(url)
                    backend.close()
            return backend if is_settled else None
        finally:
            self.unreserve()

    def _binding_of(self, backend: OwnedBackend) -> Mapping[str, str]:
        """What the record of a session has of what its child has of its caller."""
        if backend.caller_values is None:
            return {}
        return self.manager.binding(None, caller_env.as_text(backend.caller_values))

    def _bring_back(self, session: Session) -> OwnedBackend:
        """A new child in the state of the lost one, as far as the record tells."""
        starter = self.starters.get(session.type)
        if starter is not None:
            self._open_mailbox()
            return starter(session)
        body = session.metadata.get(INIT_BODY)
        version = session.metadata.get(PROTOCOL_VERSION)
        if body is None or version is None:
            raise SessionEnded
        requests = handshake.recorded(body, version, session.metadata.get(RESUME))
        self._open_mailbox()
        if self._make is not None:
            group = self._make()
            group.restore(requests[1:])
            handshake.replay(group, requests[:1], version, REPLAY_TIME)
            group.start_subscribed()
            return group
        bridge = self.spawn()
        try:
            handshake.replay(bridge, requests, version, REPLAY_TIME)
        except BaseException:
            self._end_start(bridge)
            raise
        return bridge

    # --- the table -------------------------------------------------------------------------------

    def spawn(
        self,
        switchboard: Switchboard | None = None,
        on_lost: Callable[[OwnedBackend], object] | None = None,
    ) -> Bridge:
        """A child that is ended with this owner until it is closed, or somebody else answers for it
        (`spawned`).
        """
        limit = self._options.max_message_bytes
        board = InitialSwitchboard() if switchboard is None else switchboard
        form = self._form
        server, values = self.server, None
        if self.caller_env is not None and isinstance(server, StdioServer):
            values = caller_env.current_values()
            if values is None:
                raise BackendNotStarted("The server needs what its caller has not sent")
            server = caller_env.with_values(server, values)
        bridge = Bridge(
            self.starter,
            server,
            limit,
            on_lost or self.note_lost,
            board,
            lambda: self.server.tools,
        )
        bridge.caller_values = values
        bridge.on_close = partial(self.spawned, bridge)
        with self._lock:
            self._starting.add(bridge)
            if form != self._form:
                bridge.outdate(self._options.request_timeout)
        if self._is_closing:  # `close` may not have seen this one
            self._end_start(bridge)
            raise Draining
        return bridge

    def spawned(self, bridge: OwnedBackend) -> None:
        """What is held, or about to be, answers for a child from now on."""
        with self._lock:
            self._starting.discard(bridge)

    def _end_start(self, bridge: OwnedBackend, failure: BackendLost | None = None) -> None:
        """Ends a child that is not held."""
        self.spawned(bridge)
        bridge.close(failure)

    def note_lost(self, backend: OwnedBackend) -> None:
        """A backend is lost without having been closed."""
        self.count_lost(backend)
        url = self._url(backend)
        held = self._forget(url)
        if held is not None:
            if backend.caller_values is not None:
                self._left[url] = _Left(held.session_id, backend.caller_values)
            self.backoff.note_exit(held.session_id, time.monotonic() - backend.started)

    def count_lost(self, backend: OwnedBackend) -> None:
        """Has operators see that a backend is lost, and frees its place where a group had it."""
        if isinstance(backend, Bridge):
            self._end_loan(backend)
        counters = metrics.current()
        if counters is not None and isinstance(backend, Bridge):
            counters.recent.note_failure(self.server.name, backend.lost_reason, backend.stderr_tail)

    def _url(self, backend: OwnedBackend) -> str:
        return str(WorkerUrl(self.replica.id, backend.child_id))

    def _hold(self, url: str, session: Session, backend: OwnedBackend) -> None:
        session_log = SessionLog(self.events, session.id, backend.child_id, self._read_on)
        if session.type not in self.starters:  # modern streams are never resumed
            backend.log = session_log
        backend.note_session(session.id)
        backend.on_close = partial(self._release, url)
        with self._lock:
            owned = _Held(session.id, session.type, whose(session.metadata), backend, session_log)
            self._held[url] = owned
            self._starting.discard(backend)
        self._sweeper.start()
        if not backend.is_alive:  # it exited before anybody could be told
            self.note_lost(backend)

    def _release(self, url: str) -> None:
        """Ends a child whose session is over, or elsewhere."""
        held = self._forget(url)
        if held is not None:
            held.log.close()
            held.backend.close()

    def _forget(self, url: str) -> _Held | None:
        with self._lock:
            held = self._held.pop(url, None)
        if held is not None:
            self._seen.pop(held.session_id, None)
        return held

    def _lent_copy(self) -> list[Bridge]:
        with self._lock:
            return list(self._lent)

    def _held_copy(self) -> dict[str, _Held]:
        with self._lock:
            return dict(self._held)

    # --- what nobody asks for any more -----------------------------------------------------------

    def _sweep_once(self) -> None:
        try:
            claims.give_back_left(self.manager)
            self._sweeper.interval = self._interval
            self.sweep()
        except StorageUnavailable:
            log.debug("[%s] sessions not swept: the store is away", self.server.name)
        except StorageError as error:
            log.warning("[%s] sessions not swept: %s", self.server.name, error)
        if self._has_outdated():
            self._sweeper.interval = _MIN_SWEEP

    def sweep(self) -> None:
        """Prolongs the sessions that a client listens to, ends the children of those that are over,
        idle or have their child elsewhere.

        Raises StorageUnavailable, and then nothing counts as over.
        """
        for session_id in list(self._ended):
            self._delete_ended(session_id)
        for url, left in list(self._left.items()):
            session = self.manager.peek(left.session_id)
            if session is None or session.backend_url != url:
                self._left.pop(url, None)
        idle_timeout = self._options.idle_timeout
        for url, held in self._held_copy().items():
            held.backend.expire_left_calls()
            limit = idle_timeout or held.backend.idle_limit
            if held.backend.is_superseded:
                limit = 0.0
            if limit is not None and self._stop_if_idle(url, held, limit):
                continue
            if not self._is_current(url, held):
                log.info("[%s] a session is over or elsewhere; its server stops", self.server.name)
                self._release(url)
                self.backoff.forget(held.session_id)

    def _has_outdated(self) -> bool:
        """Ends children of an older form that no call needs; whether there are more of them."""
        for url, held in self._held_copy().items():
            if held.backend.is_outdated and held.backend.end_between_calls():
                log.info(
                    "[%s] is another server now; a process of the old one ends", held.backend.name
                )
                self._give_up(held.session_id, url)
        for bridge in self._lent_copy():
            if bridge.is_outdated:
                bridge.end_between_calls()
        with self._lock:
            left = [*self._starting, *self._lent]
            left += [held.backend for held in self._held.values()]
        return any(backend.is_outdated for backend in left)

    def _is_current(self, url: str, held: _Held) -> bool:
        try:
            is_watched = held.backend.is_watched
            find = self.manager.load if is_watched else self.manager.peek
            session = find(held.session_id)
        except SessionNotFound:
            return False
        if session is None:
            return False
        if self._has_given_way and held.backend.is_busy:
            return True  # its calls end here
        return session.backend_url == url or CLAIM in session.metadata

    # --- the end ---------------------------------------------------------------------------------

    @property
    def backends(self) -> list[OwnedBackend]:
        """What this replica holds for its sessions, the oldest first."""
        return [held.backend for held in self._held_copy().values()]

    @property
    def has_sessions(self) -> bool:
        """Whether a server of a session runs in this replica."""
        return bool(self._held)

    def full_reason(self) -> str | None:
        """Why no session can begin here: all are taken and none can give way; None if one can."""
        limit, seconds = self._options.max_sessions, self._options.evict_after
        held = [one.backend for owner in self._owners for one in owner._held_copy().values()]
        lent = [bridge for owner in self._owners for bridge in owner._lent_copy()]
        taken = len(lent) + sum(backend.size for backend in held)
        if taken < limit or any(backend.is_idle(seconds) for backend in (*held, *lent)):
            return None
        return f"all {limit} sessions of this worker are taken"

    def threads_reason(self) -> str | None:
        """Which threads of this replica have ended, None if none has."""
        return self._workers.not_ready_reason()

    @property
    def is_busy(self) -> bool:
        """Whether a client waits for an answer, that to its initialize included."""
        busy = any(backend.is_busy for backend in (*self.backends, *self._lent_copy()))
        return self._pending > 0 or busy

    def end_streams(self) -> None:
        """Ends the standing streams; their clients come back, to another replica."""
        for backend in self.backends:
            backend.end_stream()

    def hand_over(self) -> None:
        """Ends the children for which no client waits, so that other replicas bring them back, and
        all spares.
        """
        self.spares.close()
        for url, held in self._held_copy().items():
            if held.backend.hand_over():
                self._give_up(held.session_id, url)

    def may_move(self, session: Session) -> bool:
        """Whether a session needs nothing of this replica, but for its record. Quick."""
        metadata = session.metadata
        if CLAIM in metadata:
            return False
        # A record is there a moment before its child is held.
        is_new = time.time() - session.updated_at < _MIN_SWEEP
        return not (is_new and BACKEND_URL in metadata) and session.backend_url not in self._held

    def homes(self) -> list[str]:
        """The sessions held here that are no client's own."""
        held = self._held_copy().values()
        return [one.session_id for one in held if one.session_type in self.starters]

    def _give_up(self, session_id: str, url: str) -> None:
        """Takes our child out of the session's record."""
        try:
            session = self.manager.peek(session_id)
            if session is None or session.backend_url != url:
                return
            if CLAIM not in session.metadata:  # else somebody takes it over already
                self.manager.swap(session, session.with_metadata(**{BACKEND_URL: None}))
        except StorageError as error:
            log.warning("[%s] a session could not be handed over: %s", self.server.name, error)

    def close(self) -> None:
        """Ends every child of this replica; the records stay, so another one can take over."""
        self._is_closing = True
        self._sweeper.stop()
        self.spares.close()
        stopped = "The proxy has stopped the server"
        with self._lock:
            starting = [*self._starting, *self._lent]
        self._restorer.close()
        for backend in starting:
            backend.close(BackendDraining(stopped))
        with self._lock:
            self._starting.clear()
        for url, held in self._held_copy().items():
            self._forget(url)
            held.backend.close(BackendDraining(stopped))
        self._read_on.stop()
        if self.relay is not None:
            self.relay.serve_no_more(self.find)
        with self._lock:
            if self in self._owners:
                self._owners.remove(self)


def _sweep_interval(options: ProxyOptions) -> float:
    """Seconds between two sweeps."""
    times = (options.session_ttl, options.idle_timeout, options.input_timeout)
    shortest = min(seconds for seconds in times if seconds is not None)
    return min(_MAX_SWEEP, max(_MIN_SWEEP, shortest / _SWEEPS_PER_TTL))
