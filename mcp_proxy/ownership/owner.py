"""Which child belongs to which session, and what happens when it is lost.

A session's record says where its child is: `backend_url` is `worker://<replica>/<child>`. This
module holds the children of this replica, opens new ones, finds those that another replica holds,
and brings back a lost one: the record is first swapped to a claim, then the child is started and
told everything the old one knew, then the record is swapped to the result. Whoever loses the first
swap waits for the winner; a DELETE in between wins over both.

One thread looks after what nobody asks for any more: sessions that expired, or went elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from mcp_proxy.backends.base import Backend
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.config import ProxyConfig
from mcp_proxy.errors import (
    BackendError,
    BackendLost,
    BackendUnreached,
    Draining,
    Overloaded,
    SessionEnded,
    SessionNotFound,
    StorageError,
)
from mcp_proxy.ownership.backoff import Restarts
from mcp_proxy.ownership.sweep import Sweeper
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica, has_ended
from mcp_proxy.resumption.writing import Journal, Recorder, ResumableBackend
from mcp_proxy.servers import StdioServer
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import (
    BACKEND_URL,
    CLAIM,
    INIT_BODY,
    PROTOCOL_VERSION,
    RESUME,
    Session,
)
from mcp_proxy.transports import handshake
from mcp_proxy.wire.urls import Place, parse_place

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds for a new child to answer the replay: well within a claim.
_REPLAY_TIME = claims.CLAIM_TIME / 3


class _Held(NamedTuple):
    session_id: str
    bridge: Bridge
    backend: ResumableBackend
    journal: Journal


class StdioSessions:
    """The children of one server in this replica, by the `backend_url` that names them.

    Without a `relay` there are no other replicas. Thread-safe. Nothing runs before the first
    session is opened.
    """

    def __init__(
        self,
        server: StdioServer,
        manager: SessionManager,
        replica: Replica,
        settings: ProxyConfig,
        relay: Relay | None = None,
    ) -> None:
        self.server = server
        self.manager = manager
        self.events = manager.storage.event_log()
        self.restarts = Restarts()
        self._replica = replica
        self._relay = relay
        self._recorder = Recorder()
        self._sweeper = Sweeper(server.name, settings.session_ttl, self.sweep)
        if relay is not None:
            relay.serve(self.find, on_lapse=self._sweeper.soon)
        self._settings = settings
        self._lock = threading.Lock()  # guards _held, _opening and _returning
        self._held: dict[str, _Held] = {}
        self._opening = 0
        self._returning = 0  # sessions whose children are being brought back
        self._is_closing = False

    def __repr__(self) -> str:
        return f"<StdioSessions {self.server.name} held={len(self._held)}>"

    # --- a new session ---------------------------------------------------------------------------

    def start(self) -> Bridge:
        """A new child that belongs to no session yet: to be established, or abandoned.

        Raises Overloaded when this replica has all the sessions it may have, BackendLost when the
        server cannot be started.
        """
        limit = self._settings.max_sessions
        with self._lock:
            if len(self._held) + self._opening >= limit:
                raise Overloaded(f"All {limit} sessions of this worker are taken")
            self._opening += 1
        try:
            return self._spawn()
        except BackendLost as error:
            self._opening_is_over()
            self.restarts.note_failure(str(error))
            raise

    def establish(self, session: Session, bridge: Bridge) -> Session:
        """Records a session whose child is ready for it, and returns the record.

        Raises StorageError, and then the child has been ended.
        """
        url = self._url(bridge)
        session = session.with_metadata(**{BACKEND_URL: url})
        try:
            self._announce()
            self.manager.create(session)
        except StorageError:
            self.abandon(bridge)
            raise
        self._hold(url, session.id, bridge)
        self._opening_is_over()
        self.restarts.note_success()
        return session

    def abandon(self, bridge: Bridge, failure: BackendError | None = None) -> None:
        """Ends a child that opened no session, because of `failure` if there was one."""
        bridge.close()
        self._opening_is_over()
        if failure is not None:
            self.restarts.note_failure(str(failure))

    def _announce(self) -> None:
        """Has a mailbox opened: without one, everybody would take this replica for dead."""
        if self._relay is not None:
            self._relay.start()

    def _opening_is_over(self) -> None:
        with self._lock:
            self._opening -= 1

    # --- a known session -------------------------------------------------------------------------

    def backend_of(self, session: Session, lost: str | None = None) -> Backend:
        """The session's child, here or at another replica; brought back, here, if it is lost.

        `lost` is a `backend_url` that turned out to lead nowhere. Raises BackendError when the
        child cannot be brought back, SessionEnded when it must not be, StorageUnavailable.
        """
        url = session.backend_url or ""
        held = self._held.get(url)
        if held is not None and held.bridge.is_alive and self._is_trusted(session, url):
            return held.backend
        place = parse_place(url)
        if self._relay is None or place is None or url == lost or self._is_void(place):
            return self._recover(session)
        return self._relay.backend(*place)

    def _is_trusted(self, session: Session, url: str) -> bool:
        """Whether the record still says so: nobody can have taken over, or it was looked at again.

        A replica that was frozen may hold a record that it loaded before.
        """
        if self._relay is None or self._relay.is_held:
            return True
        current = self.manager.peek(session.id)
        return current is not None and current.backend_url == url

    def _is_void(self, place: Place) -> bool:
        """Whether there can be no child at a place: it would be here, or its replica has ended."""
        return place.replica == self._replica.id or has_ended(place.replica)

    def on_backend(self, session: Session, act: Callable[[Backend], T]) -> T:
        """What `act` returns for the session's backend; done again on a new one, once, where it is
        certain that the first got nothing of it.
        """
        try:
            return act(self.backend_of(session))
        except BackendUnreached:
            return self.on_new_backend(session, act)

    def on_new_backend(self, session: Session, act: Callable[[Backend], T]) -> T:
        """What `act` returns for the backend that the session has when its last one is lost."""
        again = self.manager.load(session.id)
        return act(self.backend_of(again, lost=session.backend_url))

    def is_orphaned(self, session_id: str, child: str) -> bool:
        """Whether a child that the session once had is lost; raises StorageError."""
        session = self.manager.peek(session_id)
        place = None if session is None else parse_place(session.backend_url)
        if place is None or place.child != child:
            return True
        if place.replica == self._replica.id or self._relay is None:
            return self.find(child) is None
        return self._relay.is_gone(place.replica)

    def find(self, child: str) -> Backend | None:
        """The child of this replica that has this id."""
        held = self._held.get(Place(self._replica.id, child).url)
        return held.backend if held is not None and held.bridge.is_alive else None

    def end(self, session: Session) -> None:
        """Ends a session and its child, wherever that is."""
        self.manager.end(session.id)
        self.restarts.forget(session.id)
        url = session.backend_url or ""
        place = parse_place(url)
        if url in self._held:
            self._release(url)
        elif self._relay is not None and place is not None and not self._is_void(place):
            self._relay.backend(*place).close()
        self.events.forget(session.id)

    def dismiss(self, session: Session) -> None:
        """Ends a session whose client is gone; its record expires if the store is away."""
        self._release(session.backend_url or "")
        try:
            self.manager.end(session.id)
        except StorageError as error:
            log.warning("[%s] the record of a session is left: %s", self.server.name, error)

    # --- recovery --------------------------------------------------------------------------------

    def _recover(self, session: Session) -> Backend:
        if self._is_closing:
            raise Draining
        self.restarts.require_patience_over(session.id)
        claimed = claims.claim(self.manager, session, self._replica.id, has_ended)
        if claimed is None:
            return self.backend_of(self.manager.load(session.id))
        self._count_returning(1)
        try:
            bridge = self._bring_back_or_release(claimed)
            url = self._url(bridge)
            held = self._hold(url, session.id, bridge)
        finally:
            self._count_returning(-1)
        if not claims.settle(self.manager, claimed, **{BACKEND_URL: url}):
            self._release(url)
            return self.backend_of(self.manager.load(session.id))
        self.restarts.note_success()
        log.info("[%s] the server of a session was started again", self.server.name)
        return held.backend

    def _count_returning(self, change: int) -> None:
        with self._lock:
            self._returning += change

    def _bring_back_or_release(self, claimed: Session) -> Bridge:
        try:
            self._announce()
            return self._bring_back(claimed)
        except StorageError:
            claims.release(self.manager, claimed)
            raise
        except BackendError as error:
            self.restarts.note_failure(str(error))
            self.restarts.note_exit(claimed.id, lifetime=0)
            claims.release(self.manager, claimed)
            raise
        except SessionEnded:
            self.end(claimed)
            raise

    def _bring_back(self, session: Session) -> Bridge:
        """A new child in the state of the lost one, as far as the record tells."""
        body = session.metadata.get(INIT_BODY)
        version = session.metadata.get(PROTOCOL_VERSION)
        if body is None or version is None:
            raise SessionEnded
        bridge = self._spawn()
        try:
            handshake.replay(bridge, body, version, session.metadata.get(RESUME), _REPLAY_TIME)
        except BaseException:
            bridge.close()
            raise
        return bridge

    # --- the table -------------------------------------------------------------------------------

    def _spawn(self) -> Bridge:
        limit = self._settings.max_message_bytes
        return Bridge(self._replica.supervisor, self.server, limit, self._on_lost)

    def _on_lost(self, bridge: Bridge) -> None:
        for url, held in self._held_copy().items():
            if held.bridge is bridge:
                self.restarts.note_exit(held.session_id, time.monotonic() - bridge.started)
                self._forget(url)

    def _url(self, bridge: Bridge) -> str:
        return Place(self._replica.id, bridge.child_id).url

    def _hold(self, url: str, session_id: str, bridge: Bridge) -> _Held:
        journal = Journal(self.events, session_id)
        backend = ResumableBackend(bridge, journal, self._recorder, lambda: self._release(url))
        held = _Held(session_id, bridge, backend, journal)
        with self._lock:
            self._held[url] = held
        self._sweeper.start()
        return held

    def _release(self, url: str) -> None:
        """Ends a child whose session is over, or elsewhere."""
        held = self._forget(url)
        if held is not None:
            held.journal.close()
            held.bridge.close("The session was ended")

    def _forget(self, url: str) -> _Held | None:
        with self._lock:
            return self._held.pop(url, None)

    def _held_copy(self) -> dict[str, _Held]:
        with self._lock:
            return dict(self._held)

    # --- what nobody asks for any more -----------------------------------------------------------

    def sweep(self) -> None:
        """Prolongs the sessions that a client listens to, ends the children of those that are over
        or have their child elsewhere.

        Raises StorageUnavailable, and then nothing counts as over.
        """
        for url, held in self._held_copy().items():
            held.bridge.expire_unheard()
            if not self._is_current(url, held):
                log.info("[%s] a session is over or elsewhere; its server stops", self.server.name)
                self._release(url)
                self.restarts.forget(held.session_id)

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
    def is_busy(self) -> bool:
        """Whether a client waits for an answer, that to its initialize included."""
        is_starting = self._opening + self._returning > 0
        return is_starting or any(held.bridge.is_busy for held in self._held_copy().values())

    def end_streams(self) -> None:
        """Ends the standing streams; their clients come back, to another replica."""
        for held in self._held_copy().values():
            held.bridge.end_stream()

    def hand_over(self) -> None:
        """Ends the children for which no client waits, so that other replicas bring them back."""
        for url, held in self._held_copy().items():
            if held.bridge.retire():
                self._forget(url)
                self._disown(held.session_id, url)

    def _disown(self, session_id: str, url: str) -> None:
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
        self._sweeper.close()
        for url, held in self._held_copy().items():
            held.bridge.close("The proxy is shutting down")
            self._forget(url)
        self._recorder.close()
