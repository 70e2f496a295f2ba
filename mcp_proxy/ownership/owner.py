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

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeVar

from mcp_proxy.backends import handshake
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import Backend, Exchange, wait_for
from mcp_proxy.background import KeyedExecutor, Periodic, Workers
from mcp_proxy.config import ProxyOptions
from mcp_proxy.errors import (
    BackendDraining,
    BackendError,
    BackendExited,
    BackendLost,
    BackendUnreached,
    Draining,
    Overloaded,
    SessionEnded,
    SessionNotFound,
    StorageError,
    StorageUnavailable,
)
from mcp_proxy.ownership.backoff import Backoff
from mcp_proxy.ownership.turns import Turns
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica, has_ended
from mcp_proxy.resumption.writing import ReadOnWorker, SessionLog
from mcp_proxy.servers import StdioServer
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.mailboxes import Mailboxes
from mcp_proxy.storage.session import (
    BACKEND_URL,
    CLAIM,
    INIT_BODY,
    PROTOCOL_VERSION,
    RESUME,
    Session,
)
from mcp_proxy.wire.urls import WorkerUrl, parse_worker_url

log = logging.getLogger(__name__)

T = TypeVar("T")

# Rounds of looking for a session's child while others change the record: each of them ends with a
# child that was found, or with somebody else's success that was gone again at once.
_ROUNDS = 5

# Children that are brought back at the same time.
_RESTORED_AT_ONCE = 64

# Seconds for a new child to answer the replay: well within a claim.
_REPLAY_TIME = claims.CLAIM_TIME / 3

# Sweeps in the time that an unused session lives, and the seconds between two at most and at least.
_SWEEPS_PER_TTL = 4
_MAX_SWEEP = 30.0
_MIN_SWEEP = 0.25


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
        if self.relay is not None:
            self.relay.close()
        self.supervisor.close()


class _Held(NamedTuple):
    session_id: str
    session_type: str
    bridge: Bridge
    log: SessionLog


class Owner:
    """The children of one server in this replica, by the `backend_url` that names them.

    Thread-safe. Nothing runs before the first session begins.
    """

    def __init__(
        self,
        server: StdioServer,
        manager: SessionManager,
        parts: ReplicaParts,
        options: ProxyOptions,
    ) -> None:
        self.server = server
        self.manager = manager
        self.relay = parts.relay
        self.events = manager.storage.event_log()
        self.backoff = Backoff()
        self.replica = parts.replica
        self.supervisor = parts.supervisor
        self.turns = parts.turns
        self.supervisor.keep_detached = options.keep_detached
        self._options = options
        self._workers = parts.workers
        self._read_on = ReadOnWorker(parts.workers)
        self._restorer = KeyedExecutor("mcp-restorer", _RESTORED_AT_ONCE)
        shortest = min(options.session_ttl, options.idle_timeout or options.session_ttl)
        self._interval = min(_MAX_SWEEP, max(_MIN_SWEEP, shortest / _SWEEPS_PER_TTL))
        self._sweeper = Periodic("mcp-sweeper", self._interval, self._sweep_once, parts.workers)
        self._sweeper.is_essential = False
        if self.relay is not None:
            self.relay.serve(self.find, on_lapse=self._sweeper.wake)
        self._lock = parts.lock  # guards _held, _starting and _pending
        self._held: dict[str, _Held] = {}
        self._starting: set[Bridge] = set()  # children that are not held yet
        # Sessions held here that ended while the store was away: their records are still there.
        # Each operation is atomic.
        self._ended: set[str] = set()
        self._pending = 0  # children that are about to be held
        self._is_closing = False
        self._owners = parts.owners
        self._owners.append(self)

    def __repr__(self) -> str:
        return f"<Owner {self.server.name} held={len(self._held)} ended={len(self._ended)}>"

    # --- a new session ---------------------------------------------------------------------------

    def start(self, has_left: Callable[[], bool] | None = None) -> Bridge:
        """A new child that belongs to no session yet: to be established, or discarded.

        Waits for its turn, unless `has_left` says meanwhile that the client has left. Raises
        Overloaded when this replica has all the sessions it may have, BackendLost when the server
        cannot be started, ClientLeft.
        """
        self._reserve()
        try:
            return self._spawn_in_turn(has_left)
        except BaseException as error:
            self._count_pending(-1)
            if isinstance(error, BackendLost):
                self.backoff.note_failure(error)
            raise

    def _spawn_in_turn(self, has_left: Callable[[], bool] | None) -> Bridge:
        """A new child, whose turn lasts until it has answered initialize."""
        turn = self.turns.take(self._options.request_timeout, has_left)
        try:
            bridge = self._spawn()
        except BaseException:
            turn.give_back()
            raise
        bridge.set_on_initialized(turn.give_back)
        return bridge

    def _reserve(self) -> None:
        """Counts one more child that is about to begin; raises Overloaded."""
        limit = self._options.max_sessions
        while not self._has_reserved(limit):
            if not self._has_stopped_idle_one():
                raise Overloaded(f"All {limit} sessions of this worker are taken")

    def _has_reserved(self, limit: int) -> bool:
        with self._lock:
            if sum(len(owner._held) + owner._pending for owner in self._owners) >= limit:
                return False
            self._pending += 1
            return True

    def _has_stopped_idle_one(self) -> bool:
        """Stops the idle child that is missed the least: never called, or not for the longest time.

        It may be of another server. False where there is none.
        """
        held = [(owner, *item) for owner in self._owners for item in owner._held_copy().items()]
        held.sort(key=lambda item: (item[2].bridge.was_called, item[2].bridge.last_used))
        seconds = self._options.evict_after
        return any(owner._stop_if_idle(url, one, seconds) for owner, url, one in held)

    def _stop_if_idle(self, url: str, held: _Held, seconds: float) -> bool:
        if not held.bridge.stop_if_idle(seconds):
            return False
        log.info("[%s] a session is idle; its server stops, its record stays", self.server.name)
        self._give_up(held.session_id, url)
        return True

    def establish(self, session: Session, bridge: Bridge) -> Session:
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
        self._count_pending(-1)
        return session

    def discard(self, bridge: Bridge, failure: BackendError | None = None) -> None:
        """Ends a child that began no session, because of `failure` if there was one."""
        self._end_start(bridge)
        self._count_pending(-1)
        if failure is not None:
            self.backoff.note_failure(failure)

    def _open_mailbox(self) -> None:
        """Without a mailbox everybody would take this replica for gone."""
        if self.relay is not None:
            self.relay.start()

    def _count_pending(self, change: int) -> None:
        with self._lock:
            self._pending += change

    # --- a known session -------------------------------------------------------------------------

    def send(self, session: Session, exchange: Exchange) -> None:
        """Sends an exchange to the session's backend; again, to a new one, where it is certain
        that the first got nothing of it.
        """
        exchange.resend = partial(self._send_to_new_backend, session)
        try:
            self.backend_of(session, has_left=exchange.has_left).send(exchange)
        except BackendUnreached:
            self._send_to_new_backend(session, exchange)

    def _send_to_new_backend(self, session: Session, exchange: Exchange) -> None:
        self._new_backend_of(session, exchange.has_left).send(exchange)

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

    def on_living_backend(self, session: Session, act: Callable[[Backend], object]) -> None:
        """Does `act` to the session's backend; one that is lost is not brought back for it.

        Raises BackendUnreached where it is lost.
        """
        backend = self._known(session, None)
        if backend is None:
            raise BackendExited("The server that this was for has exited")
        act(backend)

    def _known(self, session: Session, lost: str | None) -> Backend | None:
        """The session's child where the record says that it is; None where it is certainly lost."""
        url = session.metadata.get(BACKEND_URL, "")
        held = self._held.get(url)
        if held is not None and held.bridge.is_alive:
            if self.relay is None or self.relay.is_held:
                return held.bridge
            # After a freeze somebody may have taken over since the record was loaded.
            current = self.manager.peek(session.id)
            if current is not None and current.backend_url == url:
                return held.bridge
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

    def find(self, child: str) -> Backend | None:
        """The child of this replica that has this id."""
        held = self._held.get(str(WorkerUrl(self.replica.id, child)))
        return held.bridge if held is not None and held.bridge.is_alive else None

    def end(self, session: Session) -> None:
        """Ends a session and its child, wherever that is; a child here also without the store.

        Raises StorageUnavailable.
        """
        try:
            self.manager.end(session.id)
        except StorageUnavailable:
            self.end_without_store(session.id, session.type)
            raise
        self.backoff.forget(session.id)
        url = session.backend_url or ""
        found = parse_worker_url(url)
        if url in self._held:
            self._release(url)
        elif self.relay is not None and found is not None and not self._has_ended(found):
            self.relay.backend(*found).close()
        self.events.forget(session.id)

    def end_without_store(self, session_id: str, session_type: str) -> None:
        """Ends the child of a session, if it is here. The record follows when the store is back;
        until then the session is not brought back here.
        """
        for url, held in self._held_copy().items():
            if (held.session_id, held.session_type) == (session_id, session_type):
                self._ended.add(session_id)
                self._release(url)

    def _delete_ended(self, session_id: str) -> None:
        self.manager.end(session_id)
        self.events.forget(session_id)
        self._ended.discard(session_id)

    def end_left(self, session: Session) -> None:
        """Ends a session whose client has left; its record expires if the store is away."""
        self._release(session.backend_url or "")
        try:
            self.manager.end(session.id)
        except StorageError as error:
            log.warning("[%s] the record of a session is left: %s", self.server.name, error)

    # --- recovery --------------------------------------------------------------------------------

    def _recover(self, session: Session, has_left: Callable[[], bool] | None) -> Backend | None:
        """The session's child, brought back; None where somebody else was faster.

        A claim lasts for a minute at most, so the turn comes first. Another thread does the work,
        which goes on when the client leaves: one with a short time limit would never get a slow
        server back.
        """
        if self._is_closing:
            raise Draining
        self.backoff.require_over(session.id)
        limit = self._options.request_timeout
        turn = self.turns.take(limit, has_left)
        restored: Future[Backend | None] = Future()
        restored.add_done_callback(lambda _: turn.give_back())
        own = self.replica.id
        try:
            claimed = claims.claim(self.manager, session, own, has_ended, has_left, limit)
            if claimed is None:
                restored.cancel()
                return None
            with claims.released_on_failure(self.manager, claimed):
                self._submit(claimed.id, partial(self._restore, claimed, restored))
        except BaseException:
            restored.cancel()
            raise
        return self._awaited(restored, claimed, has_left)

    def _submit(self, session_id: str, act: Callable[[], object]) -> None:
        try:
            self._restorer.submit(session_id, act)
        except RuntimeError as error:
            raise Overloaded(f"The server cannot be started: {error}") from error

    def _awaited(
        self,
        restored: Future[Backend | None],
        claimed: Session,
        has_left: Callable[[], bool] | None,
    ) -> Backend | None:
        """What comes of bringing a child back; raises ClientLeft, and then that goes on."""
        is_done = threading.Event()
        restored.add_done_callback(lambda _: is_done.set())

        def is_over() -> bool:
            if self._is_closing and restored.cancel():  # nobody begins with it any more
                with claims.released_on_failure(self.manager, claimed):
                    raise Draining
            return has_left is not None and has_left()

        wait_for(is_done, threading.TIMEOUT_MAX, is_over)
        return restored.result()

    def _restore(self, claimed: Session, restored: Future[Backend | None]) -> None:
        """Brings the child of a session back that is claimed; in a thread of its own."""
        if not restored.set_running_or_notify_cancel():
            return
        try:
            restored.set_result(self._restored(claimed))
        except BaseException as error:
            restored.set_exception(error)

    def _restored(self, claimed: Session) -> Bridge | None:
        try:
            with claims.released_on_failure(self.manager, claimed):
                bridge = self._settled(claimed)
        except BackendDraining as error:
            raise Draining from error  # the call itself has not begun
        except BackendError as error:
            self.backoff.note_failure(error)
            self.backoff.note_exit(claimed.id, lifetime=0)
            raise
        except SessionEnded:
            self.end(claimed)
            raise
        finally:
            if self.manager.claims_left():
                self._sweeper.interval = _MIN_SWEEP
                self._sweeper.start()
                self._sweeper.wake()
        if bridge is not None:
            self.backoff.note_success()
            log.info("[%s] the server of this session was started again", bridge.name)
        return bridge

    def _settled(self, claimed: Session) -> Bridge | None:
        """A new child in the place of the claim; None, and no child, where that has gone."""
        self._reserve()
        try:
            bridge = self._bring_back(claimed)
            url = self._url(bridge)
            is_settled = False
            try:
                self._hold(url, claimed, bridge)
                is_settled = claims.settle(self.manager, claimed, **{BACKEND_URL: url})
            finally:
                if not is_settled:
                    self._release(url)
                    bridge.close()
            return bridge if is_settled else None
        finally:
            self._count_pending(-1)

    def _bring_back(self, session: Session) -> Bridge:
        """A new child in the state of the lost one, as far as the record tells."""
        body = session.metadata.get(INIT_BODY)
        version = session.metadata.get(PROTOCOL_VERSION)
        if body is None or version is None:
            raise SessionEnded
        requests = handshake.recorded(body, version, session.metadata.get(RESUME))
        self._open_mailbox()
        bridge = self._spawn()
        try:
            handshake.replay(bridge, requests, version, _REPLAY_TIME)
        except BaseException:
            self._end_start(bridge)
            raise
        return bridge

    # --- the table -------------------------------------------------------------------------------

    def _spawn(self) -> Bridge:
        limit = self._options.max_message_bytes
        bridge = Bridge(self.supervisor, self.server, limit, self._on_lost)
        with self._lock:
            self._starting.add(bridge)
        if self._is_closing:  # `close` may not have seen this one
            self._end_start(bridge)
            raise Draining
        return bridge

    def _end_start(self, bridge: Bridge, failure: BackendLost | None = None) -> None:
        """Ends a child that is not held."""
        with self._lock:
            self._starting.discard(bridge)
        bridge.close(failure)

    def _on_lost(self, bridge: Bridge) -> None:
        held = self._forget(self._url(bridge))
        if held is not None:
            self.backoff.note_exit(held.session_id, time.monotonic() - bridge.started)

    def _url(self, bridge: Bridge) -> str:
        return str(WorkerUrl(self.replica.id, bridge.child_id))

    def _hold(self, url: str, session: Session, bridge: Bridge) -> None:
        session_log = SessionLog(self.events, session.id, bridge.child_id, self._read_on)
        bridge.log = session_log
        bridge.note_session(session.id)
        bridge.on_close = partial(self._release, url)
        with self._lock:
            self._held[url] = _Held(session.id, session.type, bridge, session_log)
            self._starting.discard(bridge)
        self._sweeper.start()
        if not bridge.is_alive:  # it exited before anybody could be told
            self._on_lost(bridge)

    def _release(self, url: str) -> None:
        """Ends a child whose session is over, or elsewhere."""
        held = self._forget(url)
        if held is not None:
            held.log.close()
            held.bridge.close()

    def _forget(self, url: str) -> _Held | None:
        with self._lock:
            return self._held.pop(url, None)

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

    def sweep(self) -> None:
        """Prolongs the sessions that a client listens to, ends the children of those that are over,
        idle or have their child elsewhere.

        Raises StorageUnavailable, and then nothing counts as over.
        """
        for session_id in list(self._ended):
            self._delete_ended(session_id)
        idle_timeout = self._options.idle_timeout
        for url, held in self._held_copy().items():
            held.bridge.expire_left_calls()
            if idle_timeout is not None and self._stop_if_idle(url, held, idle_timeout):
                continue
            if not self._is_current(url, held):
                log.info("[%s] a session is over or elsewhere; its server stops", self.server.name)
                self._release(url)
                self.backoff.forget(held.session_id)

    def _is_current(self, url: str, held: _Held) -> bool:
        try:
            is_watched = held.bridge.is_watched
            find = self.manager.load if is_watched else self.manager.peek
            session = find(held.session_id)
        except SessionNotFound:
            return False
        if session is None:
            return False
        return session.backend_url == url or CLAIM in session.metadata

    # --- the end ---------------------------------------------------------------------------------

    @property
    def bridges(self) -> list[Bridge]:
        """The children of the sessions that this replica holds, the oldest first."""
        return [held.bridge for held in self._held_copy().values()]

    @property
    def has_sessions(self) -> bool:
        """Whether a server of a session runs in this replica."""
        return bool(self._held)

    def full_reason(self) -> str | None:
        """Why no session can begin here: all are taken and none can give way; None if one can."""
        limit, seconds = self._options.max_sessions, self._options.evict_after
        held = [one.bridge for owner in self._owners for one in owner._held_copy().values()]
        if len(held) < limit or any(bridge.is_idle(seconds) for bridge in held):
            return None
        return f"all {limit} sessions of this worker are taken"

    def threads_reason(self) -> str | None:
        """Which threads of this replica have ended, None if none has."""
        return self._workers.not_ready_reason()

    @property
    def is_busy(self) -> bool:
        """Whether a client waits for an answer, that to its initialize included."""
        return self._pending > 0 or any(bridge.is_busy for bridge in self.bridges)

    def end_streams(self) -> None:
        """Ends the standing streams; their clients come back, to another replica."""
        for bridge in self.bridges:
            bridge.end_stream()

    def hand_over(self) -> None:
        """Ends the children for which no client waits, so that other replicas bring them back."""
        for url, held in self._held_copy().items():
            if held.bridge.hand_over():
                self._give_up(held.session_id, url)

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
        stopped = "The proxy has stopped the server"
        with self._lock:
            starting = list(self._starting)
        self._restorer.close()
        for bridge in starting:
            self._end_start(bridge, BackendDraining(stopped))
        for url, held in self._held_copy().items():
            self._forget(url)
            held.bridge.close(BackendDraining(stopped))
        self._read_on.stop()
