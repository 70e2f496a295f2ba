"""Which child belongs to which session, and what happens when it is lost.

A session's record says where its child is: `backend_url` is `worker://<replica>/<child>`. This
module holds the children of this replica, opens new ones, and brings back a lost one: the record is
first swapped to a claim, then the child is started and told everything the old one knew, then the
record is swapped to the result. Whoever loses the first swap waits for the winner; a DELETE in
between wins over both.

One thread looks after what nobody asks for any more: sessions that expired, or ended elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import NamedTuple

from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.replica import Replica
from mcp_proxy.config import ProxyConfig
from mcp_proxy.errors import (
    BackendError,
    BackendLost,
    Draining,
    Overloaded,
    SessionEnded,
    SessionNotFound,
    StorageError,
)
from mcp_proxy.servers import StdioServer
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.sessions.session import (
    BACKEND_URL,
    INIT_BODY,
    PROTOCOL_VERSION,
    RESUME,
    Session,
)
from mcp_proxy.transports import handshake
from mcp_proxy.transports.restarts import Restarts

log = logging.getLogger(__name__)

# Seconds for a new child to answer each request of the replay: well within a claim.
_REPLAY_TIME = claims.CLAIM_TIME / 3

_SWEEPS_PER_TTL = 4
_MAX_SWEEP = 30.0
_MIN_SWEEP = 0.25


class _Held(NamedTuple):
    session_id: str
    bridge: Bridge


class StdioSessions:
    """The children of one server in this replica, by the `backend_url` that names them.

    Thread-safe. Nothing runs before the first session is opened.
    """

    def __init__(
        self, server: StdioServer, manager: SessionManager, replica: Replica, settings: ProxyConfig
    ) -> None:
        self.server = server
        self.manager = manager
        self.restarts = Restarts()
        self._replica = replica
        self._settings = settings
        self._lock = threading.Lock()  # guards _held, _opening and _sweeper
        self._held: dict[str, _Held] = {}
        self._opening = 0
        self._sweeper: threading.Thread | None = None
        self._closing = threading.Event()

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

    def establish(self, session: Session, bridge: Bridge) -> None:
        """Records a session whose child has answered initialize.

        Raises StorageError, and then the child has been ended.
        """
        url = self._url(bridge)
        try:
            self.manager.create(session.with_metadata(**{BACKEND_URL: url}))
        except StorageError:
            self.abandon(bridge)
            raise
        self._hold(url, session.id, bridge)
        self._opening_is_over()
        self.restarts.note_success()

    def abandon(self, bridge: Bridge, failure: BackendError | None = None) -> None:
        """Ends a child that opened no session, because of `failure` if there was one."""
        bridge.close()
        self._opening_is_over()
        if failure is not None:
            self.restarts.note_failure(str(failure))

    def _opening_is_over(self) -> None:
        with self._lock:
            self._opening -= 1

    # --- a known session -------------------------------------------------------------------------

    def backend_of(self, session: Session) -> Bridge:
        """The session's child, brought back if it is lost.

        Raises BackendError when it cannot be, SessionEnded when it must not be, StorageUnavailable.
        """
        held = self._held.get(session.backend_url or "")
        if held is not None and held.bridge.is_alive:
            return held.bridge
        return self._recover(session)

    def end(self, session_id: str) -> None:
        """Ends a session and its child."""
        self.manager.end(session_id)
        self.restarts.forget(session_id)
        for url, held in self._held_copy().items():
            if held.session_id == session_id:
                self._release(url)

    def update_resume(self, session_id: str, change: handshake.Change) -> None:
        """Remembers a log level or a subscription, for the day when the child is lost."""
        while True:
            try:
                session = claims.unclaimed(self.manager, self.manager.load(session_id))
            except SessionNotFound:
                return
            resume = handshake.changed(session.metadata.get(RESUME), change)
            if self.manager.swap(session, session.with_metadata(**{RESUME: resume})):
                return

    # --- recovery --------------------------------------------------------------------------------

    def _recover(self, session: Session) -> Bridge:
        if self._closing.is_set():
            raise Draining
        self.restarts.require_patience_over(session.id)
        claimed = claims.claim(self.manager, session)
        if claimed is None:
            return self.backend_of(self.manager.load(session.id))
        bridge = self._bring_back_or_release(claimed)
        url = self._url(bridge)
        self._hold(url, session.id, bridge)
        if not claims.settle(self.manager, claimed, **{BACKEND_URL: url}):
            self._release(url)
            return self.backend_of(self.manager.load(session.id))
        self.restarts.note_success()
        log.info("[%s] the server of a session was started again", self.server.name)
        return bridge

    def _bring_back_or_release(self, claimed: Session) -> Bridge:
        try:
            return self._bring_back(claimed)
        except BackendError as error:
            self.restarts.note_failure(str(error))
            self.restarts.note_exit(claimed.id, lifetime=0)
            claims.release(self.manager, claimed)
            raise
        except SessionEnded:
            self.end(claimed.id)
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
                with self._lock:
                    self._held.pop(url, None)

    def _url(self, bridge: Bridge) -> str:
        return f"worker://{self._replica.id}/{bridge.child_id}"

    def _hold(self, url: str, session_id: str, bridge: Bridge) -> None:
        with self._lock:
            self._held[url] = _Held(session_id, bridge)
            if self._sweeper is None:
                self._sweeper = threading.Thread(
                    target=self._sweep_for_ever, name="mcp-sweeper", daemon=True
                )
                self._sweeper.start()

    def _release(self, url: str, reason: str = "The session was ended") -> None:
        with self._lock:
            held = self._held.pop(url, None)
        if held is not None:
            held.bridge.close(reason)

    def _held_copy(self) -> dict[str, _Held]:
        with self._lock:
            return dict(self._held)

    # --- what nobody asks for any more -----------------------------------------------------------

    def _sweep_for_ever(self) -> None:
        interval = min(_MAX_SWEEP, max(_MIN_SWEEP, self._settings.session_ttl / _SWEEPS_PER_TTL))
        while not self._closing.wait(interval):
            try:
                self.sweep()
            except StorageError as error:
                log.warning("[%s] sessions not swept: %s", self.server.name, error)
            except Exception:
                log.exception("[%s] sessions not swept", self.server.name)

    def sweep(self) -> None:
        """Prolongs the sessions that a client listens to, ends the children of those that are over.

        Raises StorageUnavailable, and then nothing counts as over.
        """
        for url, held in self._held_copy().items():
            held.bridge.expire_unheard()
            if not self._is_current(held):
                log.info("[%s] a session is over; its server is stopped", self.server.name)
                self._release(url)
                self.restarts.forget(held.session_id)

    def _is_current(self, held: _Held) -> bool:
        if not held.bridge.is_watched:
            return self.manager.exists(held.session_id)
        try:
            self.manager.load(held.session_id)
        except SessionNotFound:
            return False
        return True

    # --- the end ---------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether a client waits for an answer."""
        return any(held.bridge.is_busy for held in self._held_copy().values())

    def end_streams(self) -> None:
        """Ends the standing streams; their clients come back, to another replica."""
        for held in self._held_copy().values():
            held.bridge.end_stream()

    def close(self) -> None:
        """Ends every child of this replica; the records stay, so another one can take over."""
        self._closing.set()
        for url in self._held_copy():
            self._release(url, "The proxy is shutting down")
